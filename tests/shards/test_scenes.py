"""Raw scenes: both layouts are read, and each kind of broken input gets one line that names the file."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from nsi.errors import UserError
from shards.picture import read_header
from shards.sources.folder import list_folder
from shards.sources.listing import read_scenes
from shards.sources.scene import JSON_LIMIT, PICTURE_LIMIT, Scene
from shards.writing.splits import split_by_rank, split_scenes
from shards.writing.vocabulary import known_materials
from tests.making import make_shards, survey


@pytest.fixture
def scene(scenes: Path, tmp_path: Path) -> Path:
    """A copy of one scene's folder, to break."""
    source = Path(list_folder(scenes)[0].name)
    return Path(shutil.copytree(source, tmp_path / "copy" / source.name))


def json_of(scene: Path) -> Path:
    return next(scene.glob("*.json"))


def edit(scene: Path, change: Callable[[dict], object]) -> Path:
    path = json_of(scene)
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))
    return path


def read_one(scene: Path) -> Scene:
    (found,), _ = read_scenes(list_folder(scene))
    return found


def pack_one(scene: Path) -> None:
    """All that is done to a scene on its way into a shard."""
    make_shards(scene, scene.parent.parent / "out", rule="test")


def image_of(scene: Path) -> Path:
    return scene / f"{scene.name}_0003.png"


def mask_of(scene: Path) -> Path:
    return scene / f"{scene.name}_flat_0003.png"


def test_v2_layout(scene: Path) -> None:
    found = read_one(scene)
    assert (found.image.path, found.mask.path) == (str(image_of(scene)), str(mask_of(scene)))
    assert found.key == scene.name
    assert 3 <= found.objects <= 10


def test_v1_layout(scene: Path) -> None:
    """NAME.png and NAME_flat.png beside NAME.json, whose own names lead nowhere."""
    image_of(scene).rename(scene / "CLEVRTEX_full_000000.png")
    mask_of(scene).rename(scene / "CLEVRTEX_full_000000_flat.png")
    (scene / "CLEVRTEX_full_000000_depth_0001.png").write_bytes(b"not read")
    json_of(scene).rename(scene / "CLEVRTEX_full_000000.json")
    found = read_one(scene)
    assert found.key == "CLEVRTEX_full_000000"
    assert found.image.path == str(scene / "CLEVRTEX_full_000000.png")
    assert found.mask.path == str(scene / "CLEVRTEX_full_000000_flat.png")
    pack_one(scene)


@pytest.mark.parametrize("name", ["CLEVRTEXv2_full_000000.json", "CLEVRTEXv2_full_000000_0003.png"])
@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK])
def test_a_pipe_with_a_scenes_name(tmp_path: Path, name: str, kind: int) -> None:
    """Reading one would wait for ever."""
    os.mknod(tmp_path / name, kind | 0o600)
    (tmp_path / "CLEVRTEXv2_full_000001.json").write_bytes(b"{}")
    with pytest.raises(UserError, match=f"^{tmp_path / name}: no plain file, though it has a scene's name; remove it$"):
        read_scenes(list_folder(tmp_path))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        list_folder(tmp_path / "nowhere")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no CLEVRTEX"):
        list_folder(tmp_path)


@pytest.mark.parametrize("key", ["image_index", "objects"])
def test_missing_scene_key(scene: Path, key: str) -> None:
    path = edit(scene, lambda facts: facts.pop(key))
    with pytest.raises(UserError, match=f"{path.name}: the key '{key}' is missing"):
        read_one(scene)


@pytest.mark.parametrize("key", ["shape", "size", "material", "3d_coords", "index"])
def test_missing_object_key(scene: Path, key: str) -> None:
    path = edit(scene, lambda facts: facts["objects"][1].pop(key))
    with pytest.raises(UserError, match=rf"{path.name}: objects\[1\]: the key '{key}' is missing"):
        read_one(scene)


@pytest.mark.parametrize("coords", [[0, 1], "here", [0, 1, True], [0, 1, None], [0, 1, 1e999]])
def test_bad_coordinates(scene: Path, coords: object) -> None:
    path = edit(scene, lambda facts: facts["objects"][0].update({"3d_coords": coords}))
    path.write_text(path.read_text().replace("Infinity", "1e999"))  # a number to a parser, and yet none
    with pytest.raises(UserError, match="not three finite numbers|not a JSON file"):
        read_one(scene)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_coordinates_that_are_no_number(scene: Path, value: float) -> None:
    path = edit(scene, lambda facts: facts["objects"][0].update({"3d_coords": [0, 1, value]}))
    with pytest.raises(UserError, match=f"{path.name}: not a JSON file \\(it holds NaN or Infinity\\)"):
        read_one(scene)


@pytest.mark.parametrize("index", [-1, "7", 1.5, True, None, 2**64])
def test_bad_index(scene: Path, index: object) -> None:
    edit(scene, lambda facts: facts.update(image_index=index))
    with pytest.raises(UserError, match="not a number from 0"):
        read_one(scene)


def test_objects_out_of_order(scene: Path) -> None:
    edit(scene, lambda facts: facts["objects"].reverse())
    with pytest.raises(UserError, match="the mask cannot be matched"):
        read_one(scene)


@pytest.mark.parametrize("objects", [[], {}, ["cube"], [["cube"]], None])
def test_bad_objects(scene: Path, objects: object) -> None:
    path = edit(scene, lambda facts: facts.update(objects=objects))
    with pytest.raises(UserError, match=rf"{path.name}: (has no objects|objects\[0\] is no JSON object)"):
        read_one(scene)


@pytest.mark.parametrize("text", ["{", "[1]", "", "\xff\xfe", "[" * 100000])
def test_not_a_json(scene: Path, text: str) -> None:
    path = json_of(scene)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=path.name):
        read_one(scene)


def test_a_json_of_a_gigabyte(scene: Path) -> None:
    path = json_of(scene)
    with path.open("r+b") as file:
        file.truncate(1 << 30)  # a hole: it takes no space, and is never read
    assert path.stat().st_size > JSON_LIMIT
    with pytest.raises(UserError, match=f"{path.name}: 1073741824 bytes, more than any scene's JSON"):
        read_one(scene)


def test_a_picture_of_gigabytes(scene: Path) -> None:
    with image_of(scene).open("r+b") as file:
        file.truncate(1 << 31)
    assert PICTURE_LIMIT < 1 << 31
    with pytest.raises(UserError, match="_0003.png: 2147483648 bytes, too large for a picture"):
        read_one(scene)


def test_a_picture_of_a_hundred_megapixels(scene: Path) -> None:
    """A small file whose header claims more pixels than a worker's memory should hold."""
    Image.new("1", (10000, 10000)).save(image_of(scene))
    with pytest.raises(UserError, match=r"_0003.png: it is 10000x10000, too large for a scene"):
        pack_one(scene)


def test_mask_of_another_size(scene: Path) -> None:
    Image.open(mask_of(scene)).resize((32, 24)).save(mask_of(scene))
    with pytest.raises(UserError, match=r"flat_0003.png: the mask is 32x24, its image 64x48"):
        pack_one(scene)


def test_mask_without_ids(scene: Path) -> None:
    Image.open(mask_of(scene)).convert("RGB").save(mask_of(scene))
    with pytest.raises(UserError, match="the mask has mode RGB, so its object ids are lost"):
        pack_one(scene)


@pytest.mark.parametrize("missing", [image_of, mask_of])
def test_picture_missing(scene: Path, missing: Callable[[Path], Path]) -> None:
    missing(scene).unlink()
    with pytest.raises(UserError, match=f"{missing(scene).name} is missing"):
        read_one(scene)


@pytest.mark.parametrize("data", [b"hello", b"", b"\x89PNG\r\n\x1a\n"])
def test_image_is_no_picture(scene: Path, data: bytes) -> None:
    image_of(scene).write_bytes(data)
    with pytest.raises(UserError, match="_0003.png: not a readable picture"):
        pack_one(scene)


def test_a_picture_that_was_cut(scene: Path) -> None:
    image_of(scene).write_bytes(image_of(scene).read_bytes()[:-40])
    with pytest.raises(UserError, match="_0003.png: its end is missing, so it was cut"):
        pack_one(scene)


def test_headers_are_read_as_pillow_reads_them(scene: Path) -> None:
    for mode in ("L", "P", "RGB", "RGBA", "1", "I;16", "LA"):
        path = scene / "x.png"
        Image.new(mode, (7, 5)).save(path)
        with Image.open(path) as picture:
            assert read_header(path.read_bytes()) == (picture.size, picture.mode)


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "..\\x", ".hidden"])
def test_file_name_that_leads_out(scene: Path, name: str) -> None:
    edit(scene, lambda facts: facts.update(image_filename=name))
    with pytest.raises(UserError, match="lead out of the scene's folder"):
        read_one(scene)


def test_a_scene_without_its_json(scenes: Path, tmp_path: Path) -> None:
    """It must not get lost in silence, be it alone in its folder (v2) or among others (v1)."""
    copy = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    victim = Path(list_folder(copy)[7].name)
    json_of(victim).unlink()
    with pytest.raises(UserError, match=f"{victim.name}_(flat_)?0003.png: its {victim.name}.json is missing"):
        survey(copy)


def test_fewer_objects_than_promised(scene: Path) -> None:
    edit(scene, lambda facts: facts["objects"].pop())
    with pytest.raises(UserError, match=r"num_objects is \d+, but \d+ are listed"):
        read_one(scene)


def test_a_file_that_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "scenes.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="scenes.zip: neither a folder nor an archive that is read here"):
        list_folder(tmp_path / "scenes.zip")


def test_a_key_with_a_dot(scene: Path) -> None:
    json_of(scene).rename(scene / "CLEVRTEXv2_full.1.json")
    for picture in (image_of(scene), mask_of(scene)):
        picture.unlink()
    with pytest.raises(UserError, match="a key ends at its first dot"):
        read_one(scene)


def test_unknown_material(scene: Path) -> None:
    path = edit(scene, lambda facts: facts["objects"][0].update(material="cheese"))
    with pytest.raises(UserError, match=rf"{path.name}: unknown material 'cheese'"):
        survey(scene)


@pytest.mark.parametrize(
    ("change", "message"),
    [({}, "scene 0 is also in"), ({"image_index": 1, "split": "camo"}, "variant camo, but CLEVRTEX")],
)
def test_two_data_sets_in_one_folder(scene: Path, change: dict, message: str) -> None:
    other = scene.parent / "CLEVRTEX_other"
    shutil.copytree(scene, other)
    for path in other.iterdir():
        path.rename(other / path.name.replace(scene.name, other.name))
    edit(other, lambda facts: facts.update(image_filename="", mask_filename="", **change))
    with pytest.raises(UserError, match=message):
        survey(scene.parent)


def test_images_of_two_sizes(scenes: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    last = Path(list_folder(copy)[-1].name)
    for path in (image_of(last), mask_of(last)):
        with Image.open(path) as picture:
            picture.resize((32, 24)).save(path)
    with pytest.raises(UserError, match=f"{last.name}.json: its image is 32x24, not 64x48"):
        make_shards(copy, tmp_path / "out")
    with pytest.raises(UserError, match="its pictures are 32x24, those of train-000000.tar 64x48"):
        make_shards(copy, tmp_path / "each-alone", shard_samples=1)


def test_the_variant_without_a_split_is_all_test(scenes: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    for path in copy.rglob("CLEVRTEX*.json"):
        facts = json.loads(path.read_text())
        path.write_text(json.dumps({**facts, "split": "outd"}))
    found = survey(copy)
    assert {name: len(part) for name, part in split_scenes(found.scenes, "official")[1].items()} == {"test": 60}
    manifest = make_shards(copy, tmp_path / "out")
    assert (manifest.variant, manifest.split_rule, manifest.samples("test")) == ("outd", "test", 60)


def test_known_materials() -> None:
    assert (
        len(known_materials()) == 171
    )  # 86 v2, 85 v1 of which one is in v2 too, and a name by which v1 data calls another


@pytest.mark.parametrize(
    ("rule", "cuts"),
    [("official", (range(10000, 50000), range(5000, 10000), range(5000))),
     ("reference", (range(37500), range(37500, 40000), range(40000, 50000)))],
)  # fmt: skip
def test_published_splits_at_full_size(rule: str, cuts: tuple[range, range, range]) -> None:
    parts = split_by_rank(range(50000), rule)  # type: ignore[arg-type]
    assert (parts["train"], parts["val"], parts["test"]) == cuts


@pytest.mark.parametrize("count", [3, 4, 5, 9, 10, 11, 101])
def test_small_splits_are_never_empty_and_lose_nothing(count: int) -> None:
    parts = split_by_rank(range(count), "official")
    assert all(len(part) for part in parts.values())
    assert sorted(item for part in parts.values() for item in part) == list(range(count))


def test_too_few_scenes() -> None:
    with pytest.raises(UserError, match="at least 3"):
        split_by_rank(range(2), "official")
