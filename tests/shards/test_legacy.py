"""The public code's files as a source: every scene, its names and its pixels, and one line for all that is amiss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import orjson
import pytest
import xxhash

from nsi.errors import UserError
from nsi.schema import Vocabulary
from shards.sources.legacy import is_legacy, list_legacy, read_row, read_rows
from shards.sources.scene import HdfRow, parse_facts
from shards.writing.cut import Settings, cut
from shards.writing.survey import Survey
from tests.shards.legacy_files import SPACE, make_scene, object_array, write_space

SIZE_NAMES, SHAPE_NAMES, MATERIAL_NAMES = SPACE["sizes"], SPACE["shapes"], SPACE["materials"]
COUNTS = {"train": 5, "val": 2, "test": 3}


def save(path: Path, scenes: list) -> None:
    np.save(path, object_array(scenes), allow_pickle=True)


def change(folder: Path) -> Any:
    """The images, open for the harm that a test does to them."""
    return h5py.File(folder / "images.h5", "r+")


@pytest.fixture
def labels() -> dict[str, list[list[list[float]]]]:
    generator = np.random.default_rng(1)
    return {split: [make_scene(generator, 3 + row) for row in range(count)] for split, count in COUNTS.items()}


@pytest.fixture
def pixels() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(2)
    return {split: generator.integers(0, 256, (count, 8, 8, 3), np.uint8) for split, count in COUNTS.items()}


@pytest.fixture
def folder(tmp_path: Path, labels: dict[str, list], pixels: dict[str, np.ndarray]) -> Path:
    """The files as the public build script leaves them, but for 8x8 pixels."""
    write_space(tmp_path, SPACE)
    with h5py.File(tmp_path / "images.h5", "w") as file:
        for split, scenes in labels.items():
            save(tmp_path / f"{split}_labels.npy", scenes)
            file.create_dataset(split, data=pixels[split] / 255)
    return tmp_path


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        list_legacy(folder)
    text = str(error.value)
    assert "\n" not in text
    assert all(part in text for part in (str(folder), *parts)), text


def test_scenes(folder: Path, labels: dict[str, list]) -> None:
    assert is_legacy(folder)
    assert not is_legacy(folder.parent)
    scenes, names = list_legacy(folder)
    assert [scene.key for scene in scenes] == [
        f"LEGACY_{split}_{row:06d}" for split in ("train", "val", "test") for row in range(COUNTS[split])
    ]
    assert [scene.index for scene in scenes] == list(range(10))
    for scene, made in zip(scenes, [each for split in COUNTS for each in labels[split]], strict=True):
        assert isinstance(scene.json, bytes)
        facts = parse_facts(scene.json, scene.where)
        assert facts["image_index"] == scene.index
        assert facts["split"] == scene.variant == "full"
        assert scene.digest == xxhash.xxh3_128_digest(scene.json)
        assert scene.objects == len(made)
        for place, (item, row) in enumerate(zip(facts["objects"], made, strict=True)):
            size, shape, material, *position = row
            assert item["size"] == SIZE_NAMES[int(size)]
            assert item["shape"] == SHAPE_NAMES[int(shape)]
            assert item["material"] == MATERIAL_NAMES[int(material)]
            assert item["3d_coords"] == position
            assert item["index"] == place + 1
    row = scenes[6]
    assert row.image[:4] == HdfRow(str(folder / "images.h5"), "val", 1, 8 * 8 * 3)[:4]
    assert row.mask is None
    assert row.split == "val"
    assert set(names.materials) <= set(SPACE["materials"])
    assert names.sizes[SIZE_NAMES[int(labels["train"][0][0][0])]] == f"{folder}/train_labels.npy: scene 0"


def test_pixels(folder: Path, pixels: dict[str, np.ndarray]) -> None:
    scenes, _ = list_legacy(folder)
    rows = [scene.image for scene in scenes if isinstance(scene.image, HdfRow)]
    assert np.array_equal(np.stack(list(read_rows(rows))), np.concatenate([pixels[split] for split in COUNTS]))
    assert np.array_equal(read_row(rows[-1]), pixels["test"][2])
    assert read_row(rows[0]).dtype == np.uint8


def test_other_pictures_of_the_same_scenes_are_other_scenes(folder: Path) -> None:
    """Rows are all of one size, so that the shards of other pictures would pass for theirs."""
    before, _ = list_legacy(folder)
    with change(folder) as file:
        file["val"][1] = file["val"][1] / 2
    after, _ = list_legacy(folder)
    assert [one == other for one, other in zip(before, after, strict=True)].count(False) == 1
    settings = Settings("official", 4)
    plans = [cut(Survey(tuple(scenes), Vocabulary((), (), ())), settings) for scenes in (before, after)]
    assert plans[0].digest != plans[1].digest


def test_pixels_between_two_colours_are_rounded(folder: Path) -> None:
    values = np.array([0, 0.4, 0.6, 254.5001, 255, 255 + 2e-5]) / 255  # the last: rounding of a float32
    with change(folder) as file:
        file["train"][0, 0, :2] = values.reshape(2, 3)
    picture = read_row(HdfRow(str(folder / "images.h5"), "train", 0, 192))
    assert picture[0, :2].ravel().tolist() == [0, 0, 1, 255, 255, 255]


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.dtype(">f8")])
def test_other_dtypes_and_oblong_sizes(folder: Path, dtype: np.dtype) -> None:
    wanted = np.random.default_rng(0).integers(0, 256, (5, 6, 10, 3), np.uint8)
    with change(folder) as file:
        del file["train"]
        content = wanted if dtype == np.uint8 else (wanted / 255).astype(dtype)
        file.create_dataset("train", data=content, chunks=(2, 6, 10, 3), compression="gzip")
    rows = [scene.image for scene in list_legacy(folder)[0][:5] if isinstance(scene.image, HdfRow)]
    assert rows[0].size == 6 * 10 * 3
    assert np.array_equal(np.stack(list(read_rows(rows))), wanted)


@pytest.mark.parametrize("value", [1.01, -0.01, math.nan, math.inf, 255.0])
def test_values_that_are_no_colours(folder: Path, value: float) -> None:
    with change(folder) as file:
        file["val"][1, 2, 3, 0] = value
    rows = [HdfRow(str(folder / "images.h5"), "val", row, 192) for row in range(2)]
    read_row(rows[0])
    with pytest.raises(UserError, match=r"val\[1\] has values from"):
        list(read_rows(rows))


def test_a_row_is_read_and_not_its_split(tmp_path: Path) -> None:
    """A gigabyte that was never written: reading it all would show."""
    import tracemalloc

    with h5py.File(tmp_path / "images.h5", "w") as file:
        file.create_dataset("train", (2600, 128, 128, 3), np.float64)
    tracemalloc.start()
    picture = read_row(HdfRow(str(tmp_path / "images.h5"), "train", 2599, 128 * 128 * 3))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert picture.shape == (128, 128, 3)
    assert peak < 8 << 20


def test_a_split_that_is_not_there_at_all(folder: Path) -> None:
    with change(folder) as file:
        del file["val"]
    (folder / "val_labels.npy").unlink()
    scenes, _ = list_legacy(folder)
    assert [(scene.split, scene.index) for scene in scenes[4:7]] == [("train", 4), ("test", 5), ("test", 6)]


def test_a_split_without_scenes(folder: Path) -> None:
    with change(folder) as file:
        del file["val"]
        file.create_dataset("val", (0, 8, 8, 3), np.float64)
    save(folder / "val_labels.npy", [])
    scenes, _ = list_legacy(folder)
    assert len(scenes) == 8


# Files that do not fit


GOOD = [0, 1, 2, 0.5, -0.5, 1.0]


@pytest.mark.parametrize(
    ("scene", "said"),
    [
        ([], "has no objects"),
        (np.zeros((0, 6)), "has no objects"),
        ([GOOD, GOOD[:5]], "object 1 has 5 numbers"),
        ([GOOD, [*GOOD, 1]], "object 1 has 7 numbers"),
        (GOOD, "is not a list"),
        ([[GOOD]], "is not a list"),
        ("abcdef", "is not a list"),
        ({"a": 1}, "is not a list"),
        ([["a", *GOOD[1:]]], "is not a list"),
        ([[True, *GOOD[1:]]], "is not a list"),
        ([[10**400, *GOOD[1:]]], "is not a list"),
        (np.array([GOOD], complex), "is not a list"),
        (np.array([GOOD]).astype("S8"), "is not a list"),
        ([[0.5, *GOOD[1:]]], "size id is 0.5"),
        ([[math.nan, *GOOD[1:]]], "size id is nan"),
        ([[0, -1, *GOOD[2:]]], "shape id is -1"),
        ([[3, *GOOD[1:]]], "object 0 has the size id 3"),
        ([GOOD, [0, 4, *GOOD[2:]]], "object 1 has the shape id 4"),
        ([[0, 0, 60, *GOOD[3:]]], "object 0 has the material id 60"),
        ([[*GOOD[:5], math.nan]], "position is (0.5, -0.5, nan)"),
        ([[*GOOD[:3], math.inf, 0, 0]], "position is (inf"),
        (np.array([[*GOOD[:5], math.nan]]), "position is (0.5, -0.5, nan)"),
    ],
)
def test_scenes_that_say_nothing_usable(folder: Path, labels: dict[str, list], scene: Any, said: str) -> None:
    scenes = labels["train"]
    scenes[3] = scene
    save(folder / "train_labels.npy", scenes)
    refused(folder, "train_labels.npy: scene 3", said)


def test_counts_that_differ(folder: Path, labels: dict[str, list]) -> None:
    save(folder / "test_labels.npy", labels["test"][:2])
    refused(folder, "test_labels.npy: has 2 scenes", "3 pictures")


@pytest.mark.parametrize("name", ["val_labels.npy", "label2program.json", "program2label.json"])
def test_missing_files(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, name)


def test_missing_data_sets(folder: Path) -> None:
    with change(folder) as file:
        del file["test"]
    refused(folder, "images.h5", "'test'", "missing")
    with change(folder) as file:
        file.create_group("test")
    refused(folder, "images.h5", "no data set 'test'")
    for split in COUNTS:
        (folder / f"{split}_labels.npy").unlink()
    with h5py.File(folder / "images.h5", "w"):
        pass
    refused(folder, "images.h5", "holds no pictures")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 8, 8), "f8"),
        ((5, 8, 8, 4), "f8"),
        ((5, 3, 8, 8), "f8"),
        ((5, 0, 8, 3), "f8"),
        ((5, 8, 8, 3), "i8"),
        ((5, 1 << 20, 1 << 20, 3), "f4"),
        ((), "f8"),
    ],
)
def test_data_sets_that_are_no_pictures(folder: Path, shape: tuple[int, ...], dtype: str) -> None:
    with change(folder) as file:
        del file["train"]
        file.create_dataset("train", shape, dtype)
    refused(folder, "images.h5: train has shape")


def test_not_an_hdf5_file(folder: Path) -> None:
    path = folder / "images.h5"
    whole = path.read_bytes()
    for content in (b"", b"not HDF5", whole[:-8], whole[: len(whole) // 2], whole[:100]):
        path.write_bytes(content)
        refused(folder, "images.h5")


def test_images_that_change_meanwhile(folder: Path) -> None:
    path = folder / "images.h5"
    for row in (HdfRow(str(path), "train", 5, 192), HdfRow(str(path), "extra", 0, 192)):
        with pytest.raises(UserError, match="images.h5"):
            read_row(row)
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        read_row(HdfRow(str(path), "train", 0, 192))


# What ids mean


def test_names_follow_the_jsons(folder: Path, labels: dict[str, list]) -> None:
    """The same labels beside another order of the names are other scenes."""
    materials = [*reversed(SPACE["materials"]), "mymetal"]  # and a name more than there are materials
    write_space(folder, {**SPACE, "materials": materials})
    scenes, names = list_legacy(folder)
    found = [item["material"] for item in orjson.loads(scenes[0].json)["objects"]]  # type: ignore[arg-type]
    assert found == [materials[int(row[2])] for row in labels["train"][0]]
    assert "mymetal" not in names.materials


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("label2program.json", "{", "not a JSON file"),
        ("label2program.json", "[]", "has no ids with names"),
        ("label2program.json", '{"sizes": {}, "shapes": {}}', "has no ids with names"),
        ("label2program.json", '{"sizes": [], "shapes": {}, "materials": {}}', "has no ids with names"),
        ("label2program.json", '{"sizes": {"a": "b"}, "shapes": {}, "materials": {}}', "has no ids with names"),
        ("label2program.json", '{"sizes": {"0": 1}, "shapes": {}, "materials": {}}', "no text"),
        ("label2program.json", '{"sizes": {"0": []}, "shapes": {}, "materials": {}}', "has no ids with names"),
        ("program2label.json", "{}", "has no ids with names"),
        ("program2label.json", '{"sizes": {"small": 1}, "shapes": {}, "materials": {}}', "disagrees"),
    ],
)
def test_jsons_that_do_not_say_what_ids_mean(folder: Path, name: str, content: str, said: str) -> None:
    (folder / name).write_text(content)
    refused(folder, "label2program.json", said)
