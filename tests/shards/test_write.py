"""Shards: the bytes of the source, the same from any run, readable by plain webdataset, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset

from nsi.errors import UserError
from shards import write
from shards.dataset import open_split
from shards.decode import decode_schema
from shards.index import index_path
from shards.loader import BatchShape, whole_split
from shards.manifest import MANIFEST, read_manifest
from shards.scenes import SceneSummary
from shards.verify import verify
from shards.write import UNFINISHED, survey, write_shards


def silent(done: int) -> None:
    """Progress nobody watches."""


@pytest.fixture(scope="module")
def found(scenes: Path) -> list[SceneSummary]:
    return survey(scenes, 1, silent)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_members_are_the_source_files(found: list[SceneSummary], shards: Path) -> None:
    split = open_split(shards, "test")
    by_key = {scene.files.key: scene for scene in found}
    for sample in range(len(split)):
        files = by_key[split.key(sample)].files
        assert split.read(sample, "image") == files.image.read_bytes()
        assert split.read(sample, "mask") == files.mask.read_bytes()
        schema = decode_schema(split.read(sample, "json"))
        facts = json.loads(files.json.read_text())
        assert schema.facts == facts  # the scene's own facts, whole
        vocabulary = split.manifest.vocabulary
        for primitive, item in zip(schema.primitives, facts["objects"], strict=True):
            names = vocabulary.decode(primitive.size, primitive.shape, primitive.material)
            assert names == (item["size"], item["shape"], item["material"])
            assert list(primitive.position) == item["3d_coords"]


def test_official_split(shards: Path) -> None:
    manifest = read_manifest(shards)
    assert {name: manifest.samples(name) for name in manifest.splits} == {"train": 48, "val": 6, "test": 6}
    indices = [decode_schema(open_split(shards, "test").read(i, "json")).index for i in range(6)]
    assert indices == list(range(6))  # the first tenth of the indices


def test_plain_webdataset_reads_them(shards: Path) -> None:
    urls = [str(path) for path in sorted(shards.glob("train-*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    split = open_split(shards, "train")
    assert [sample["__key__"] for sample in samples] == [split.key(i) for i in range(len(split))]
    assert all({"png", "mask.png", "json"} <= set(sample) for sample in samples)
    assert samples[5]["png"] == split.read(5, "image")


def test_same_bytes_whatever_the_workers(found: list[SceneSummary], shards: Path, tmp_path: Path) -> None:
    write_shards(found, tmp_path / "again", "official", 10, 4, silent)
    assert contents(tmp_path / "again") == contents(shards)


@pytest.mark.parametrize("survivors", [0, 1, 3])
def test_a_cut_run_goes_on(
    found: list[SceneSummary], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survivors: int
) -> None:
    whole = write._write_shard
    calls = 0

    def cut(*arguments):
        nonlocal calls
        calls += 1
        if calls > survivors:
            (tmp_path / "out" / "train-000004.tar.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(write, "_write_shard", cut)
    with pytest.raises(KeyboardInterrupt):
        write_shards(found, tmp_path / "out", "official", 10, 1, silent)
    assert not (tmp_path / "out" / MANIFEST).exists()
    monkeypatch.setattr(write, "_write_shard", whole)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    write_shards(found, tmp_path / "out", "official", 10, 1, silent)
    assert contents(tmp_path / "out") == contents(shards)
    assert len(kept) == survivors
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())  # finished shards are not rewritten


def test_a_complete_folder_is_left_alone(found: list[SceneSummary], shards: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    write_shards(found, shards, "official", 10, 1, silent)
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before


@pytest.mark.parametrize(("rule", "size"), [("reference", 10), ("official", 11)])
def test_other_settings_are_refused(found: list[SceneSummary], shards: Path, rule, size: int) -> None:
    with pytest.raises(UserError, match="other scenes or settings"):
        write_shards(found, shards, rule, size, 1, silent)


def test_an_edited_scene_is_not_taken_for_done(scenes: Path, shards: Path, tmp_path: Path) -> None:
    """The same length, another meaning."""
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    path = sorted(copy.rglob("*.json"))[0]
    text = path.read_text()
    path.write_text(text.replace('"cube"', '"cone"') if '"cube"' in text else text.replace('"sphere"', '"teapot"'))
    with pytest.raises(UserError, match="other scenes or settings"):
        write_shards(survey(copy, 1, silent), shards, "official", 10, 1, silent)


def test_a_picture_that_cannot_be_decoded_is_named(scenes: Path, tmp_path: Path) -> None:
    """Its header is whole, so that only reading it shows."""
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    victim = sorted(path for path in copy.rglob("*_0003.png") if "flat" not in path.name)[0]
    victim.write_bytes(victim.read_bytes()[:400])
    write_shards(survey(copy, 1, silent), tmp_path / "out", "official", 10, 1, silent)
    with pytest.raises(UserError, match=rf"test-000000.tar: image of {victim.parent.name} cannot be decoded"):
        list(whole_split(open_split(tmp_path / "out", "test"), BatchShape(32, 10), 6, 0, 1, 1))
    assert any("the image cannot be decoded" in fault for fault in verify(tmp_path / "out", 1, silent))


def test_a_strangers_folder_is_refused(found: list[SceneSummary], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no shards"):
        write_shards(found, tmp_path, "official", 10, 1, silent)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_broken_scene_leaves_nothing_behind(scenes: Path, tmp_path: Path) -> None:
    from launch.cli import run

    copy = shutil.copytree(scenes, tmp_path / "scenes")
    victim = sorted(copy.rglob("*_flat_0003.png"))[40]
    victim.write_bytes(b"")
    assert run(["shard", str(copy), str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_verify_finds_nothing_wrong(shards: Path) -> None:
    assert verify(shards, 2, silent) == []


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def test_verify_names_a_flipped_byte(copy: Path) -> None:
    tar = copy / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    faults = verify(copy, 1, silent)
    assert len(faults) == 1
    assert "train-000001.tar: its bytes are not those that were written" in faults[0]


def test_reading_a_flipped_byte_names_shard_key_and_offset(copy: Path) -> None:
    split = open_split(copy, "val")
    place = split.indexes[0][2]["image"]
    tar = copy / "val-000000.tar"
    data = bytearray(tar.read_bytes())
    data[int(place["offset"]) + 10] ^= 1
    tar.write_bytes(data)
    key = split.key(2)
    with pytest.raises(UserError, match=rf"val-000000.tar: image of {key} at offset {int(place['offset'])}"):
        open_split(copy, "val").read(2, "image")


def test_a_cut_shard_is_noticed_at_opening(copy: Path) -> None:
    tar = copy / "train-000002.tar"
    tar.write_bytes(tar.read_bytes()[:-10240])
    with pytest.raises(UserError, match=r"train-000002.tar: has \d+ bytes, the manifest says \d+"):
        open_split(copy, "train")


def test_missing_pieces(copy: Path) -> None:
    index_path(copy / "val-000000.tar").unlink()
    (copy / "test-000000.tar").unlink()
    faults = verify(copy, 1, silent)
    assert any("val-000000.index.npy: missing" in fault for fault in faults)
    assert any("test-000000.tar: missing" in fault for fault in faults)
    with pytest.raises(UserError, match=r"test-000000.tar: cannot be read"):
        open_split(copy, "test")
    with pytest.raises(UserError, match=r"val-000000.index.npy: missing"):
        open_split(copy, "val")


def test_an_index_of_another_shard(copy: Path) -> None:
    shutil.copy(copy / "val-000000.index.npy", copy / "train-000004.index.npy")
    assert any("train-000004.index.npy" in fault for fault in verify(copy, 1, silent))


def test_strangers_and_unfinished_runs_are_named(copy: Path) -> None:
    shutil.copy(copy / "val-000000.tar", copy / "val-000001.tar")
    (copy / UNFINISHED).mkdir()
    faults = verify(copy, 1, silent)
    assert any("val-000001.tar: not in the manifest" in fault for fault in faults)
    assert any("has not finished" in fault for fault in faults)


def test_an_edited_manifest_is_refused(copy: Path) -> None:
    path = copy / MANIFEST
    path.write_text(path.read_text().replace('"max_objects": ', '"max_objects": 1'))
    with pytest.raises(UserError, match="its fingerprint does not fit"):
        read_manifest(copy)


def test_a_newer_manifest_is_refused(copy: Path) -> None:
    path = copy / MANIFEST
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(UserError, match="format 99, but this version reads 1"):
        read_manifest(copy)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest.json: missing; write the shards with `nsi shard"):
        read_manifest(tmp_path)


def test_index_offsets_are_those_of_the_tar(shards: Path) -> None:
    split = open_split(shards, "train")
    record = np.asarray(split.indexes[0])[0]
    data = (shards / "train-000000.tar").read_bytes()
    offset, size, _ = (int(value) for value in record["image"])
    assert data[offset : offset + 8] == b"\x89PNG\r\n\x1a\n"
    assert data[offset : offset + size] == split.read(0, "image")
