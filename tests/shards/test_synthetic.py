"""Synthetic scenes: the layout on disk, the sampling rules, and that a scene depends on (seed, index, size) alone."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch import progress as progress_module
from launch.progress import pace_of, progress
from launch.synth import SynthConfig, parse_size, run
from nsi.errors import UserError
from shards.synthetic.camera import Camera
from shards.synthetic.draws import Draws
from shards.synthetic.layout import (
    COLORS,
    GAP,
    MARGIN,
    RADIUS,
    REACH,
    SHAPES,
    Layout,
    Thing,
    describe,
    sample_frame,
    sample_things,
)
from shards.synthetic.materials import LOOKS, MATERIALS, texture_of
from shards.synthetic.render import render_scene
from shards.synthetic.shapes import MONKEY
from shards.synthetic.write import scene_folder, scene_name, write_scenes

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "clevrtex-sample"
SIZE = (128, 96)
SCENES = 24


def silent(done: int) -> None:
    """A report that nobody hears."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of SCENES scenes of seed 11."""
    out = tmp_path_factory.mktemp("synthetic") / "out"
    write_scenes(out, SCENES, 11, SIZE, 1, silent)
    return out


@pytest.fixture(scope="module")
def layouts() -> list[tuple[Layout, int]]:
    """400 scenes' objects, before any pixel is drawn, and how many objects each was to have."""
    scenes = []
    for index in range(400):
        draws = Draws(5, index)
        frame, count = sample_frame(draws, (320, 240))
        while (things := sample_things(draws, frame.camera, count)) is None:
            pass
        scenes.append((Layout(frame.camera, frame.light, frame.ground, things), count))
    return scenes


def files_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def load(out: Path, index: int) -> tuple[dict, np.ndarray, np.ndarray]:
    """A scene as a reader finds it: names resolved from the JSON, as facts/clevrtex.md says."""
    folder = scene_folder(out, index)
    scene = json.loads((folder / f"{scene_name(index)}.json").read_text())
    image = np.array(Image.open(folder / f"{scene['image_filename']}0003.png"))
    mask = Image.open(folder / f"{scene['mask_filename']}_0003.png")
    assert mask.mode == "P"
    return scene, image, np.array(mask)


# --- the layout on disk


def test_the_files_are_those_of_clevrtex_v2(written: Path) -> None:
    names = [f"CLEVRTEXv2_full_{index:06d}" for index in range(SCENES)]
    expected = {f"clevrtexv2_full/0/{name}/{name}{end}" for name in names for end in (".json", "_0003.png")}
    expected |= {f"clevrtexv2_full/0/{name}/{name}_flat_0003.png" for name in names}
    assert set(files_of(written)) == expected | {"synth.json"}


def test_the_thousandth_scene_opens_a_new_folder() -> None:
    assert scene_folder(Path("o"), 12_345) == Path("o/clevrtexv2_full/12/CLEVRTEXv2_full_012345")


def test_images_and_masks_have_the_size_that_was_asked_for(written: Path) -> None:
    _, image, mask = load(written, 3)
    assert image.shape == (96, 128, 3)
    assert image.dtype == np.uint8
    assert mask.shape == (96, 128)


def test_the_json_says_what_clevrtex_says(written: Path) -> None:
    scene, _, _ = load(written, 7)
    assert scene["split"] == "full"
    assert scene["image_index"] == 7
    assert scene["image_filename"] == "CLEVRTEXv2_full_000007_"
    assert scene["mask_filename"] == "CLEVRTEXv2_full_000007_flat"
    assert scene["num_objects"] == len(scene["objects"])
    assert [thing["index"] for thing in scene["objects"]] == list(range(1, scene["num_objects"] + 1))
    assert scene["ground_material"] in MATERIALS
    for thing in scene["objects"]:
        radius = RADIUS[thing["size"]]
        height = radius / math.sqrt(2) if thing["shape"] == "cube" else radius
        assert thing["3d_coords"][2] == pytest.approx(height, abs=1e-5)
        assert thing["color"] in COLORS


def kinds(value: object) -> object:
    """The keys and types of a JSON value; of a list the kinds that occur in it, in lists of any length."""
    if isinstance(value, dict):
        return {key: kinds(part) for key, part in value.items()}
    if isinstance(value, list):
        return [kind for _, kind in sorted({str(kinds(part)): kinds(part) for part in value}.items())]
    return type(value).__name__


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample of real scenes is not here")
def test_keys_and_types_are_those_of_a_real_scene(written: Path) -> None:
    real_json = min(path for path in SAMPLE.rglob("*.json") if json.loads(path.read_text())["num_objects"] > 3)
    real = json.loads(real_json.read_text())
    ours = max((load(written, index)[0] for index in range(SCENES)), key=lambda scene: scene["num_objects"])
    assert kinds(ours) == kinds(real)
    assert list(ours) == list(real)
    assert list(ours["objects"][0]) == list(real["objects"][0])
    real_name = real_json.with_suffix("")
    assert Image.open(f"{real_name}_flat_0003.png").mode == "P"
    real_files = {path.name.removeprefix(real_name.name) for path in real_json.parent.iterdir()}
    assert {".json", "_0003.png", "_flat_0003.png"} <= real_files


def test_the_material_names_are_the_sixty_of_the_main_set() -> None:
    known = json.loads(resources.files("shards.writing").joinpath("known_materials.json").read_text())
    assert sorted(known["v2_main"]) == list(MATERIALS)
    assert len(MATERIALS) == 60


# --- what the mask and the numbers say of the picture


def test_every_object_shows_enough_pixels_under_its_index(written: Path) -> None:
    fewest = 200 * (SIZE[0] * SIZE[1]) / (320 * 240)
    for index in range(SCENES):
        scene, _, mask = load(written, index)
        pixels = np.bincount(mask.ravel())
        assert len(pixels) == scene["num_objects"] + 1
        assert pixels[1:].min() > fewest


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_mask_is_what_marching_along_each_ray_finds(index: int) -> None:
    """Against a slow definition: the first of many points along a pixel's ray that lies inside an object."""
    render = render_scene(21, index, (48, 36))
    camera, things = render.layout.camera, render.layout.things
    rows, columns = np.mgrid[0:36, 0:48].reshape(2, -1)
    directions = (
        np.array(camera.forward)
        + ((columns + 0.5 - 24) / camera.focal)[:, None] * np.array(camera.right)
        + ((18 - rows - 0.5) / camera.focal)[:, None] * np.array(camera.up)
    )
    found = np.zeros(len(directions), dtype=np.int64)
    for depth in np.arange(5.0, 17.0, 0.02):
        points = np.array(camera.position) + depth * directions
        for place, thing in enumerate(things, 1):
            found[(found == 0) & is_inside(thing, points)] = place
    assert (found.reshape(36, 48) == render.mask_HW).mean() > 0.99
    assert set(np.unique(found)) >= set(range(1, len(things) + 1))


def is_inside(thing: Thing, points_N3: np.ndarray) -> np.ndarray:
    angle, half = math.radians(thing.rotation), thing.half
    x, y, z = (points_N3 - np.array(thing.centre)).T / half
    x, y = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if thing.shape == "cube":
        return np.maximum(np.maximum(abs(x), abs(y)), abs(z)) < 1
    if thing.shape == "cylinder":
        return (np.hypot(x, y) < 1) & (abs(z) < 1)
    if thing.shape == "sphere":
        return x * x + y * y + z * z < 1
    local_N3 = np.stack([x, y, z], axis=1)
    return np.any([(((local_N3 - c) / np.array(h)) ** 2).sum(axis=1) < 1 for c, h in MONKEY], axis=0)


def test_pixel_coords_are_where_the_nearest_objects_lie(written: Path) -> None:
    checked = 0
    for index in range(SCENES):
        scene, _, mask = load(written, index)
        nearest = min(scene["objects"], key=lambda thing: thing["pixel_coords"][2])  # nothing hides it
        rows, columns = np.nonzero(mask == nearest["index"])
        if nearest["shape"] != "sphere" or rows.min() == 0 or columns.min() == 0:
            continue
        if rows.max() == mask.shape[0] - 1 or columns.max() == mask.shape[1] - 1:
            continue
        x, y, depth = nearest["pixel_coords"]
        assert abs(columns.mean() + 0.5 - x) < 1.5
        assert abs(rows.mean() + 0.5 - y) < 1.5
        seen_radius = RADIUS[nearest["size"]] * 140 / depth  # 140 pixels: the focal length of a 128x96 frame
        assert len(rows) == pytest.approx(math.pi * seen_radius**2, rel=0.15)
        checked += 1
    assert checked >= 3


def test_directions_and_relations_fit_the_positions(written: Path) -> None:
    for index in range(SCENES):
        scene, _, _ = load(written, index)
        ways = {way: np.array(vector) for way, vector in scene["directions"].items()}
        assert np.allclose(ways["left"], -ways["right"])
        assert np.allclose(ways["front"], -ways["behind"])
        assert abs(ways["left"] @ ways["front"]) < 1e-6
        assert np.allclose(np.cross(ways["right"], ways["behind"]), ways["above"], atol=1e-6)
        places = np.array([thing["3d_coords"] for thing in scene["objects"]])
        for way in ("behind", "front", "left", "right"):
            ahead = (places[None] - places[:, None]) @ ways[way] > 0.2
            assert scene["relationships"][way] == [np.nonzero(row)[0].tolist() for row in ahead]
        for one, other in ((a, b) for a in range(len(places)) for b in range(a)):
            on_left = other in scene["relationships"]["left"][one]
            assert on_left != (other in scene["relationships"]["right"][one])
        # What lies further behind is further from the camera.
        depths = np.array([thing["pixel_coords"][2] for thing in scene["objects"]])
        flat = places[:, :2] @ ways["behind"][:2]
        assert np.corrcoef(depths, flat)[0, 1] > 0.9


# --- the sampling rules


def test_objects_keep_to_the_square_and_to_their_distances(layouts: list[tuple[Layout, int]]) -> None:
    for layout, count in layouts:
        assert len(layout.things) == count
        left = np.array(layout.camera.directions()["left"][:2])
        front = np.array(layout.camera.directions()["front"][:2])
        for place, thing in enumerate(layout.things):
            assert max(abs(thing.x), abs(thing.y)) <= REACH
            assert 0 <= thing.rotation <= 360
            for other in layout.things[:place]:
                apart = np.array([thing.x - other.x, thing.y - other.y])
                assert np.hypot(*apart) >= RADIUS[thing.size] + RADIUS[other.size] + GAP - 1e-5
                assert min(abs(apart @ left), abs(apart @ front)) >= MARGIN - 1e-5


def is_uniform(names: list, values: tuple) -> bool:
    """No value is missing, none unknown, and each is within five standard deviations of its share."""
    counts, share = Counter(names), 1 / len(values)
    spread = 5 * math.sqrt(len(names) * share * (1 - share))
    return set(counts) == set(values) and all(abs(n - len(names) * share) < spread for n in counts.values())


def test_counts_names_and_places_are_uniform(layouts: list[tuple[Layout, int]]) -> None:
    frames = [sample_frame(Draws(9, index), SIZE) for index in range(3000)]
    assert is_uniform([count for _, count in frames], tuple(range(3, 11)))
    assert is_uniform([frame.ground for frame, _ in frames], MATERIALS)
    things = [thing for layout, _ in layouts for thing in layout.things]
    assert is_uniform([thing.shape for thing in things], SHAPES)
    assert is_uniform([thing.material for thing in things], MATERIALS)
    assert is_uniform([thing.color for thing in things], COLORS)
    assert is_uniform([thing.rotation // 45 for thing in things], tuple(range(8)))
    share_large = sum(thing.size == "large" for thing in things) / len(things)
    assert 0.2 < share_large < 0.4  # uniform but for the places that crowded scenes leave
    assert abs(np.mean([thing.x for thing in things])) < 0.2


def test_crowded_scenes_are_not_dropped_for_their_hidden_objects() -> None:
    """A scene whose objects hide one another is sampled anew with as many objects."""
    for index in range(12):
        assert len(render_scene(6, index, (64, 48)).layout.things) == sample_frame(Draws(6, index), (64, 48))[1]


def test_the_camera_moves_from_scene_to_scene_and_looks_at_the_origin(layouts: list[tuple[Layout, int]]) -> None:
    cameras: list[Camera] = [layout.camera for layout, _ in layouts]
    places = np.array([camera.position for camera in cameras])
    assert np.allclose(places.mean(axis=0), (7.4811, -6.5076, 5.3437), atol=0.1)
    assert (np.ptp(places, axis=0) > 0.9).all()
    assert (np.ptp(places, axis=0) <= 1.0).all()
    for camera in cameras[:20]:
        assert camera.project((0.0, 0.0, 0.0))[:2] == pytest.approx((160.0, 120.0), abs=1e-4)


# --- that materials, shapes and sizes can be seen


def test_textures_differ_and_repeat_without_a_seam() -> None:
    digests = {hashlib.sha256(texture_of(name).texels.tobytes()).hexdigest() for name in MATERIALS}
    assert len(digests) == 60
    assert len({(look.first, look.second) for look in LOOKS.values()}) == 60
    for name in MATERIALS:
        tile = texture_of(name).texels[: 128 * 128].view(np.uint8).reshape(128, 128, 4)[..., :3].astype(int)
        for rows in (tile, tile.swapaxes(0, 1)):
            steps = np.abs(rows - np.roll(rows, 1, axis=0)).mean(axis=(1, 2))  # the first: across the tile's edge
            assert steps[0] <= 1.5 * steps[1:].max(), name


def test_a_material_can_be_told_by_its_colours() -> None:
    """Nearest class mean of six numbers (mean and spread of each channel), far above chance, at 64x48 pixels."""
    seen: list[np.ndarray] = []
    names: list[str] = []
    for index in range(330):
        render = render_scene(13, index, (64, 48))
        for place, thing in enumerate(render.layout.things, 1):
            pixels_N3 = render.image_HW3[render.mask_HW == place] / 255
            seen.append(np.concatenate([pixels_N3.mean(axis=0), pixels_N3.std(axis=0)]))
            names.append(thing.material)
    features, labels = np.array(seen), np.array([MATERIALS.index(name) for name in names])
    cut = len(labels) * 3 // 4
    means = np.array([features[:cut][labels[:cut] == label].mean(axis=0) for label in range(60)])
    distances = ((features[cut:, None] - means) ** 2).sum(axis=2)
    assert (distances.argmin(axis=1) == labels[cut:]).mean() > 0.4  # chance is 0.017


def test_the_image_shows_the_objects_that_the_mask_marks() -> None:
    """Across an outline the image changes more than between two pixels of one surface."""
    across, within = [], []
    for index in range(10):
        render = render_scene(2, index, SIZE)
        image, mask = render.image_HW3.astype(float), render.mask_HW
        change = np.abs(image[:, 2:] - image[:, :-2]).mean(axis=2)
        edge = mask[:, 2:] != mask[:, :-2]
        across.append(change[edge].mean())
        within.append(change[~edge].mean())
    assert np.mean(across) > 2 * np.mean(within)


# --- that a scene depends on (seed, index, size) alone


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    write_scenes(tmp_path / "one", 70, 3, (64, 48), 1, silent)
    counts: list[int] = []
    write_scenes(tmp_path / "three", 70, 3, (64, 48), 3, counts.append)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 70)


def test_a_scene_is_the_same_alone_and_among_others(written: Path) -> None:
    scene, image, mask = load(written, 17)
    render = render_scene(11, 17, SIZE)
    assert np.array_equal(render.image_HW3, image)
    assert np.array_equal(render.mask_HW, mask)
    assert json.loads(json.dumps(describe(render.layout, scene_name(17), 17))) == scene


def test_seeds_and_scenes_differ() -> None:
    images = [render_scene(seed, index, (64, 48)).image_HW3.tobytes() for seed in (0, 1, 2**64 - 1) for index in (0, 1)]
    assert len(set(images)) == 6


def test_the_stream_of_draws_is_frozen() -> None:
    draws = Draws(7, 2)
    assert [draws.below(1000) for _ in range(6)] == GOLDEN_DRAWS


def test_a_scene_is_frozen() -> None:
    """Exact on any machine: the renderer adds, multiplies, divides and takes roots, which round alike everywhere."""
    render = render_scene(2024, 5, (320, 240))
    text = json.dumps(describe(render.layout, scene_name(5), 5))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == GOLDEN_JSON
    assert hashlib.sha256(render.mask_HW.tobytes()).hexdigest()[:16] == GOLDEN_MASK
    assert hashlib.sha256(render.image_HW3.tobytes()).hexdigest()[:16] == GOLDEN_IMAGE


# --- runs that were cut off, and folders that hold something else


def test_a_second_run_mends_what_is_missing_and_nothing_else(written: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(written, out)
    whole = files_of(out)
    (scene_folder(out, 4) / f"{scene_name(4)}_flat_0003.png").unlink()
    (scene_folder(out, 5) / f"{scene_name(5)}.json").write_text("")
    partial = scene_folder(out, 6).with_name(f"{scene_name(6)}.partial")
    scene_folder(out, 6).rename(partial)
    (partial / "rubbish").write_text("cut off")
    untouched = scene_folder(out, 7) / f"{scene_name(7)}_0003.png"
    untouched.write_bytes(b"not looked at")
    counts: list[int] = []
    write_scenes(out, SCENES, 11, SIZE, 1, counts.append)
    whole[str(untouched.relative_to(out))] = b"not looked at"
    assert files_of(out) == whole
    assert counts == [SCENES - 3, SCENES - 2, SCENES - 1, SCENES]


def test_more_scenes_are_added_to_a_folder(tmp_path: Path) -> None:
    write_scenes(tmp_path / "grown", 2, 3, (64, 48), 1, silent)
    write_scenes(tmp_path / "grown", 4, 3, (64, 48), 1, silent)
    write_scenes(tmp_path / "at_once", 4, 3, (64, 48), 1, silent)
    assert files_of(tmp_path / "grown") == files_of(tmp_path / "at_once")


@pytest.mark.parametrize(("seed", "size"), [(12, SIZE), (11, (64, 48))])
def test_another_seed_or_size_is_refused(written: Path, seed: int, size: tuple[int, int]) -> None:
    before = files_of(written)
    with pytest.raises(UserError, match=r"made with --seed 11 --size 128x96, not with --seed"):
        write_scenes(written, SCENES + 1, seed, size, 1, silent)
    assert files_of(written) == before


def test_a_folder_of_other_scenes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clevrtexv2_full" / "0").mkdir(parents=True)
    with pytest.raises(UserError, match="nsi synth did not write"):
        write_scenes(tmp_path, 1, 0, (64, 48), 1, silent)


@pytest.mark.parametrize("text", ["", "[]", '{"seed": 0}'])
def test_an_unreadable_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "synth.json").write_text(text)
    with pytest.raises(UserError, match=r"can't be read in its synth\.json"):
        write_scenes(tmp_path, 1, 0, (64, 48), 1, silent)


def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give a folder that you can write to") as caught:
        write_scenes(tmp_path / "file" / "out", 1, 0, (64, 48), 1, silent)
    assert "\n" not in str(caught.value)


# --- the command


def test_the_command_writes_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = SynthConfig(tmp_path / "out", scenes=3, seed=1, size="64x48", workers=1)
    run(config)
    first = capsys.readouterr().out
    run(config)
    second = capsys.readouterr().out
    assert first.startswith(f"{tmp_path / 'out' / 'clevrtexv2_full'}: 3 scenes of 64x48, seed 1; all rendered in ")
    assert first.endswith(" scenes/s\n")
    assert second.endswith("all were there already\n")
    assert len(list(tmp_path.rglob("*.json"))) == 4


@pytest.mark.parametrize("text", ["320", "320x", "axb", "-64x64", "31x64", "64x4097", "0x0", "64x64x3", "", "9" * 30])
def test_a_bad_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--size"):
        parse_size(text)


def test_a_good_size_is_read() -> None:
    assert [parse_size(text) for text in ("320x240", " 64X48 ", "32x4096")] == [(320, 240), (64, 48), (32, 4096)]


@pytest.mark.parametrize("wrong", [{"scenes": 0}, {"workers": 0}, {"seed": -1}, {"seed": 2**64}])
def test_wrong_numbers_are_refused_before_anything_is_written(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        run(SynthConfig(tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()


def test_the_command_starts_without_torch() -> None:
    code = "import sys, launch.synth; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- progress


def test_the_pace_counts_from_the_first_report() -> None:
    times = iter([100.0, 110.0, 120.0])
    pace = pace_of(1000, "scenes", clock=lambda: next(times))
    assert [pace(500), pace(550), pace(700)] == ["", "5 scenes/s, 1:30 left", "10 scenes/s, 0:30 left"]


def test_without_a_total_nothing_is_said_of_the_time_left() -> None:
    """As of an archive that a server does not know the size of."""
    times = iter([100.0, 110.0])
    pace = pace_of(0, "MB", clock=lambda: next(times))
    assert [pace(10), pace(60)] == ["", "5 MB/s"]


def test_plain_lines_come_a_few_seconds_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    monkeypatch.setattr(progress_module, "pace_of", lambda total, unit: pace_of(total, unit, clock=lambda: now))
    with progress("rendering", 120, unit="scenes") as advance:
        for done in range(1, 121):
            now = done / 10
            advance(done)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "rendering: 50/120 scenes, 10 scenes/s, 0:07 left",
        "rendering: 100/120 scenes, 10 scenes/s, 0:02 left",
    ]


# Frozen: where one of these changes, the same seed gives other scenes, and `write.GENERATION` must be raised.
GOLDEN_DRAWS = [836, 587, 792, 471, 479, 766]
GOLDEN_JSON = "1097d90fead96f4d"
GOLDEN_MASK = "5bc845c6f84f7911"
GOLDEN_IMAGE = "6009c9a08e84d297"
