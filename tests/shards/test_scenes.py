"""Raw scenes: both layouts are read, and each kind of broken input gets one line that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from nsi.errors import UserError
from shards.scenes import check_distinct, find_scene_jsons, read_scene_json, summarise_scene
from shards.splits import split_by_rank
from shards.vocabulary import build_vocabulary, known_materials


@pytest.fixture
def scene(scenes: Path, tmp_path: Path) -> Path:
    """A copy of one scene's folder, to break."""
    source = find_scene_jsons(scenes)[0].parent
    return Path(shutil.copytree(source, tmp_path / "copy" / source.name))


def json_of(scene: Path) -> Path:
    return next(scene.glob("*.json"))


def edit(scene: Path, change: Callable[[dict], object]) -> Path:
    path = json_of(scene)
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))
    return path


def test_v2_layout(scene: Path) -> None:
    found = summarise_scene(json_of(scene))
    assert found.files.image.name == f"{scene.name}_0003.png"
    assert found.files.mask.name == f"{scene.name}_flat_0003.png"
    assert found.image_size == (64, 48)
    assert 3 <= found.objects <= 10


def test_v1_layout(scene: Path) -> None:
    """NAME.png and NAME_flat.png beside NAME.json, whose own names lead nowhere."""
    (scene / f"{scene.name}_0003.png").rename(scene / "CLEVRTEX_full_000000.png")
    (scene / f"{scene.name}_flat_0003.png").rename(scene / "CLEVRTEX_full_000000_flat.png")
    (scene / "CLEVRTEX_full_000000_depth_0001.png").write_bytes(b"not read")
    path = json_of(scene).rename(scene / "CLEVRTEX_full_000000.json")
    found = summarise_scene(path)
    assert (found.files.key, found.files.image.name) == ("CLEVRTEX_full_000000", "CLEVRTEX_full_000000.png")
    assert found.files.mask.name == "CLEVRTEX_full_000000_flat.png"


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        find_scene_jsons(tmp_path / "nowhere")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no CLEVRTEX"):
        find_scene_jsons(tmp_path)


@pytest.mark.parametrize("key", ["image_index", "objects"])
def test_missing_scene_key(scene: Path, key: str) -> None:
    path = edit(scene, lambda facts: facts.pop(key))
    with pytest.raises(UserError, match=f"{path.name}: the key '{key}' is missing"):
        read_scene_json(path)


@pytest.mark.parametrize("key", ["shape", "size", "material", "3d_coords", "index"])
def test_missing_object_key(scene: Path, key: str) -> None:
    path = edit(scene, lambda facts: facts["objects"][1].pop(key))
    with pytest.raises(UserError, match=rf"{path.name}: objects\[1\]: the key '{key}' is missing"):
        read_scene_json(path)


@pytest.mark.parametrize("coords", [[0, 1], [0, 1, float("nan")], [0, 1, float("inf")], "here", [0, 1, True]])
def test_bad_coordinates(scene: Path, coords: object) -> None:
    path = edit(scene, lambda facts: facts["objects"][0].update({"3d_coords": coords}))
    with pytest.raises(UserError, match="not three finite numbers"):
        read_scene_json(path)


def test_objects_out_of_order(scene: Path) -> None:
    path = edit(scene, lambda facts: facts["objects"].reverse())
    with pytest.raises(UserError, match="so the mask cannot be matched"):
        read_scene_json(path)


@pytest.mark.parametrize("text", ["{", "[1]", "", "\xff\xfe"])
def test_not_a_json(scene: Path, text: str) -> None:
    path = json_of(scene)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=path.name):
        read_scene_json(path)


def test_mask_of_another_size(scene: Path) -> None:
    mask = scene / f"{scene.name}_flat_0003.png"
    Image.open(mask).resize((32, 24)).save(mask)
    with pytest.raises(UserError, match=r"flat_0003.png: the mask is 32x24, its image 64x48"):
        summarise_scene(json_of(scene))


def test_mask_without_ids(scene: Path) -> None:
    mask = scene / f"{scene.name}_flat_0003.png"
    Image.open(mask).convert("RGB").save(mask)
    with pytest.raises(UserError, match="the mask has mode RGB, so its object ids are lost"):
        summarise_scene(json_of(scene))


def test_image_missing(scene: Path) -> None:
    (scene / f"{scene.name}_0003.png").unlink()
    with pytest.raises(UserError, match="_0003.png: missing"):
        summarise_scene(json_of(scene))


def test_image_is_no_picture(scene: Path) -> None:
    (scene / f"{scene.name}_0003.png").write_bytes(b"hello")
    with pytest.raises(UserError, match="not a readable picture"):
        summarise_scene(json_of(scene))


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "..\\x", ".hidden"])
def test_file_name_that_leads_out(scene: Path, name: str) -> None:
    edit(scene, lambda facts: facts.update(image_filename=name))
    with pytest.raises(UserError, match="lead out of the scene's folder"):
        summarise_scene(json_of(scene))


def test_unknown_material(scene: Path) -> None:
    path = edit(scene, lambda facts: facts["objects"][0].update(material="cheese"))
    with pytest.raises(UserError, match=rf"{path.name}: unknown material 'cheese'"):
        build_vocabulary([summarise_scene(path)])


def test_two_data_sets_in_one_folder(scene: Path) -> None:
    found = summarise_scene(json_of(scene))
    with pytest.raises(UserError, match="give each data set a folder of its own"):
        check_distinct([found, found])


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
