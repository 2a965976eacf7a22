"""Shards to the public code's files: it reads from them what the scenes say, and nothing is ever half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import orjson
import pytest

from nsi.errors import UsageError, UserError
from shards.decode import decode_image
from shards.hdf5 import write_hdf5
from shards.manifest import read_manifest
from shards.processes import process_pool
from shards.reading.dataset import Split, open_split
from shards.schema_json import decode_facts, decode_schema
from shards.sources.folder import list_folder
from shards.sources.legacy import SPLITS, list_legacy, read_rows
from shards.sources.scene import HdfRow
from shards.synthetic.write import write_scenes
from shards.writing.cut import Settings
from shards.writing.survey import survey_folders
from shards.writing.write import write_shards

SIZE = 32


def silent(done: int) -> None:
    """Progress nobody watches."""


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of ten scenes: 8 train, 1 val, 1 test."""
    folder = tmp_path_factory.mktemp("few")
    write_scenes(folder / "scenes", 10, seed=3, size=(64, 48), workers=1, report=silent)
    with process_pool(1, folder) as pool:
        survey = survey_folders(list_folder(folder / "scenes"), pool, silent)
        write_shards(survey, Settings("official", 4), folder / "shards", pool, silent)
    return folder / "shards"


@pytest.fixture(scope="module")
def written(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hdf5") / "out"
    write_hdf5(shards, out, SIZE, report=silent)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def pictures(split: Split) -> np.ndarray:
    return np.stack([decode_image(split.read(sample, "image"), SIZE) for sample in range(len(split))])


def test_there_and_back(shards: Path, written: Path) -> None:
    scenes, names = list_legacy(written)
    assert len(scenes) == sum(len(open_split(shards, name)) for name in SPLITS)
    for name in SPLITS:
        split = open_split(shards, name)
        back = [scene for scene in scenes if scene.split == name]
        rows = [scene.image for scene in back if isinstance(scene.image, HdfRow)]
        assert np.array_equal(np.stack(list(read_rows(rows))), pictures(split))
        for sample, scene in enumerate(back):
            facts = decode_facts(split.read(sample, "json"))
            assert isinstance(scene.json, bytes)
            for ours, theirs in zip(orjson.loads(scene.json)["objects"], facts["objects"], strict=True):
                assert ours == {key: theirs[key] for key in ("shape", "size", "material", "3d_coords", "index")}
    assert sorted(names.materials) == list(read_manifest(shards).vocabulary.materials)


def test_as_the_public_trainer_reads(shards: Path, written: Path) -> None:
    label2program = json.loads((written / "label2program.json").read_text())
    program2label = json.loads((written / "program2label.json").read_text())
    space = json.loads((written / "program_space.json").read_text())
    assert {path.name for path in written.iterdir()} == {
        "images.h5",
        "program_space.json",
        "program2label.json",
        "label2program.json",
        *(f"{name}_labels.npy" for name in SPLITS),
    }
    for kind in ("sizes", "shapes", "materials"):
        assert program2label[kind] == {name: place for place, name in enumerate(space[kind])}
        assert label2program[kind] == {str(place): name for place, name in enumerate(space[kind])}
    for name in SPLITS:
        split = open_split(shards, name)
        with h5py.File(written / "images.h5", "r") as file:
            images: Any = file[name][:]  # type: ignore[index]
        labels = np.load(written / f"{name}_labels.npy", allow_pickle=True)
        assert images.dtype == np.float64
        assert images.shape == (len(split), SIZE, SIZE, 3)
        assert labels.dtype == object
        assert labels.shape == (len(split),)
        assert np.array_equal(images, pictures(split) / 255)
        for sample in range(len(split)):
            assert type(labels[sample]) is list
            rows = np.array(labels[sample])
            data = split.read(sample, "json")
            objects = decode_facts(data)["objects"]
            assert rows.shape == (len(objects), 6)
            for row, item, primitive in zip(rows, objects, decode_schema(data).primitives, strict=True):
                assert label2program["sizes"][str(int(row[0]))] == item["size"]
                assert label2program["shapes"][str(int(row[1]))] == item["shape"]
                assert label2program["materials"][str(int(row[2]))] == item["material"]
                assert tuple(row[:3]) == (primitive.size, primitive.shape, primitive.material)
                assert row[3:].tolist() == item["3d_coords"]


def test_scenes_with_equally_many_objects_stay_apart(few: Path, tmp_path: Path) -> None:
    write_hdf5(few, tmp_path / "out", SIZE, report=silent)
    labels = np.load(tmp_path / "out" / "val_labels.npy", allow_pickle=True)
    assert labels.shape == (1,)  # numpy alone would make (1, objects, 6) of it


def test_the_public_size_and_the_progress(few: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    write_hdf5(few, tmp_path, report=seen.append)
    assert seen == list(range(1, 11))
    with h5py.File(tmp_path / "images.h5", "r") as file:
        assert file["train"].shape == (8, 128, 128, 3)  # type: ignore[union-attr]


def test_memory_does_not_grow_with_the_scenes(few: Path, shards: Path, tmp_path: Path) -> None:
    """50 more pictures of 196 KB would be 10 MB; their labels, which the format has in one piece, are 0.1 MB."""

    def peak(source: Path, name: str) -> int:
        tracemalloc.start()
        write_hdf5(source, tmp_path / name, 64, report=silent)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    peak(few, "imports")
    assert peak(shards, "many") - peak(few, "few") < 300_000


def test_a_second_run_leaves_all_as_it_is(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_hdf5(few, out, SIZE, report=silent)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    seen: list[int] = []
    write_hdf5(few, out, SIZE, report=seen.append)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert seen == [10]


def test_a_run_that_was_cut_is_made_good(few: Path, tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    def cut(done: int) -> None:
        if done == 9:  # the training split is finished, the next is not
            raise Cut

    out, fresh = tmp_path / "out", tmp_path / "fresh"
    with pytest.raises(Cut):
        write_hdf5(few, out, SIZE, report=cut)
    assert [path.name[:12] for path in out.iterdir()] == [".unfinished-"]
    with pytest.raises(UserError, match="was begun with other shards or another size"):
        write_hdf5(few, out, SIZE + 1, report=silent)
    write_hdf5(few, out, SIZE, report=silent)
    write_hdf5(few, fresh, SIZE, report=silent)
    assert contents(out) == contents(fresh)


def test_a_crash_between_the_renames_is_made_good(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_hdf5(few, out, SIZE, report=silent)
    before = contents(out)
    unfinished = out / f".unfinished-{read_manifest(few).fingerprint[:16]}-{SIZE}"
    unfinished.mkdir()
    write_hdf5(few, out, SIZE, report=silent)  # all was renamed, and the folder not removed
    assert contents(out) == before
    unfinished.mkdir()
    (out / "images.h5").unlink()  # all but the last was renamed
    write_hdf5(few, out, SIZE, report=silent)
    assert contents(out) == before


def test_a_second_run_beside_the_first_is_told_so(few: Path, tmp_path: Path) -> None:
    out, begun = tmp_path / "out", []

    def beside(done: int) -> None:
        if done == 3:
            with pytest.raises(UserError, match=f"^{out}: another `nsi shard` is writing there"):
                write_hdf5(few, out, SIZE, report=silent)
            begun.append(done)

    write_hdf5(few, out, SIZE, report=beside)
    write_hdf5(few, tmp_path / "fresh", SIZE, report=silent)
    assert begun == [3]
    assert contents(out) == contents(tmp_path / "fresh")


def test_folders_that_hold_something_else(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_hdf5(few, out, SIZE, report=silent)
    before = contents(out)
    with pytest.raises(UserError, match="other shards or another size"):
        write_hdf5(few, out, SIZE + 1, report=silent)
    assert contents(out) == before
    (out / "val_labels.npy").unlink()
    with pytest.raises(UserError, match="other shards or another size"):
        write_hdf5(few, out, SIZE, report=silent)

    for name in ("images.h5", "thesis.tex"):
        other = tmp_path / name.replace(".", "-")
        other.mkdir()
        (other / name).write_text("mine")
        with pytest.raises(UserError, match=str(other)):
            write_hdf5(few, other, SIZE, report=silent)
        assert contents(other) == {name: b"mine"}

    with pytest.raises(UserError, match="is a file"):
        write_hdf5(few, other / "thesis.tex", SIZE, report=silent)
    with pytest.raises(UserError, match="is not empty"):
        write_hdf5(few, few, SIZE, report=silent)
    with pytest.raises(UserError, match="manifest.json: missing"):
        write_hdf5(tmp_path, tmp_path / "new", SIZE, report=silent)
    with pytest.raises(UsageError):
        write_hdf5(few, tmp_path / "new", 0, report=silent)
    assert not (tmp_path / "new").exists()


def test_no_room_is_said_before_anything_is_written(few: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the pictures need 96000000.0 GB and there are"):
        write_hdf5(few, tmp_path / "out", 20_000_000, report=silent)


def test_a_folder_that_cannot_be_written(few: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written \\(Not a directory\\)"):
        write_hdf5(few, tmp_path / "file" / "out", SIZE, report=silent)
    if os.geteuid() != 0:  # who may write anywhere
        tmp_path.chmod(0o555)
        with pytest.raises(UserError, match="cannot be written \\(Permission denied\\)"):
            write_hdf5(few, tmp_path / "out", SIZE, report=silent)
        tmp_path.chmod(0o755)


FULL_DISK = """
import resource, sys
from pathlib import Path
from typing import Any
import h5py
from nsi.errors import UserError
from shards.hdf5 import write_hdf5

shards, out = map(Path, sys.argv[1:3])
for limit in map(int, sys.argv[3:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_hdf5(shards, out, 32, report=lambda done: None)
    except UserError as error:
        print(error)
"""


def test_a_full_disk(few: Path, tmp_path: Path) -> None:
    """HDF5 crashes on one: files that may not grow beyond a limit fail in the same way, wherever the limit is."""
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    write_hdf5(few, fresh, SIZE, report=silent)
    whole = (fresh / "images.h5").stat().st_size
    limits = [0, 20, 500, 2000, 2100, 5000, 50_000, whole - 30_000, whole - 1]
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(few), str(out), *map(str, limits)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, "")
    lines = found.stdout.splitlines()
    assert len(lines) == len(limits)
    assert all(line.startswith(str(out)) and "cannot be written (File too large)" in line for line in lines)
    assert not (out / "images.h5").exists()
    write_hdf5(few, out, SIZE, report=silent)
    assert contents(out) == contents(fresh)


def test_nothing_heavy_is_loaded_for_other_sources() -> None:
    code = "import sys, shards.sources.legacy, shards.hdf5; sys.exit(bool({'h5py', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
