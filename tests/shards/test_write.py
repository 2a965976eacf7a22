"""Shards: the bytes of the source, the same from any run, readable by plain webdataset, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from launch.cli import run as nsi
from nsi.errors import UserError
from shards.decode import decode_image, decode_image_frame
from shards.index import index_path
from shards.manifest import MANIFEST, read_manifest
from shards.processes import process_pool
from shards.reading.dataset import open_split
from shards.reading.storage import open_storage
from shards.schema_json import decode_facts, decode_schema
from shards.sources.scene import Place
from shards.temporary import remove_leftovers, temporary_mark
from shards.verify import verify as verify_storage
from shards.writing import write as writing
from shards.writing.cut import Settings, cut
from shards.writing.survey import Survey
from shards.writing.transform import Transform
from shards.writing.write import UNFINISHED, Part, count_scenes, merge_shards, write_shards
from tests.making import make_shards, silent, survey, write


@pytest.fixture(scope="module")
def found(scenes: Path) -> Survey:
    return survey(scenes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def verify(folder: Path) -> list[str]:
    with process_pool(1, folder) as pool:
        return verify_storage(open_storage(folder), pool, silent)


def write_part(found: Survey, out: Path, number: int, count: int) -> None:
    with process_pool(1, out) as pool:
        assert write_shards(found, Settings(shard_samples=10), out, pool, silent, Part(number, count)) is None


def test_members_are_the_source_files(found: Survey, shards: Path) -> None:
    split = open_split(shards, "test")
    by_key = {scene.key: scene for scene in found.scenes}
    for sample in range(len(split)):
        scene = by_key[split.key(sample)]
        assert split.read(sample, "image") == Path(scene.image.path).read_bytes()
        assert split.read(sample, "mask") == Path(scene.mask.path).read_bytes()
        member = split.read(sample, "json")
        raw = Path(scene.json.path).read_bytes()
        assert raw in member  # the scene's own facts, byte for byte
        facts = json.loads(raw)
        schema = decode_schema(member)
        assert (schema.key, schema.index, decode_facts(member)) == (scene.key, scene.index, facts)
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
    assert json.loads(samples[5]["json"])["key"] == split.key(5)


def test_shards_are_those_that_webdataset_writes(shards: Path, tmp_path: Path) -> None:
    """Our tars hold what its own writer makes of the same samples: names, order, bytes."""
    split = open_split(shards, "val")
    with webdataset.TarWriter(str(tmp_path / "theirs.tar"), encoder=False) as writer:
        for sample in range(len(split)):
            members = {"png": "image", "mask.png": "mask", "json": "json"}
            writer.write({"__key__": split.key(sample), **{s: split.read(sample, m) for s, m in members.items()}})
    theirs = list(webdataset.WebDataset(str(tmp_path / "theirs.tar"), shardshuffle=False))
    ours = list(webdataset.WebDataset(str(shards / "val-000000.tar"), shardshuffle=False))
    for one, other in zip(ours, theirs, strict=True):
        assert {**one, "__url__": "", "__local_path__": ""} == {**other, "__url__": "", "__local_path__": ""}


def test_same_bytes_whatever_the_workers(found: Survey, shards: Path, tmp_path: Path) -> None:
    write(found, tmp_path / "again", workers=3)
    assert contents(tmp_path / "again") == contents(shards)


@pytest.mark.parametrize("survivors", [0, 1, 3])
def test_a_cut_run_goes_on(
    found: Survey, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survivors: int
) -> None:
    whole = writing.pack_shard
    calls = 0

    def cut_off(job):
        nonlocal calls
        calls += 1
        if calls > survivors:
            raise KeyboardInterrupt
        return whole(job)

    monkeypatch.setattr(writing, "pack_shard", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write(found, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()
    monkeypatch.setattr(writing, "pack_shard", whole)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    write(found, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(shards)
    assert len(kept) == survivors
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())  # finished shards are not rewritten


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on(scenes: Path, shards: Path, tmp_path: Path) -> None:
    """SIGKILL to the real command after each system call that changes the folder, as the folder itself shows."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "launch",
        "shard",
        str(scenes),
        str(out),
        "--shard_samples",
        "10",
        "--workers",
        "2",
    ]
    seen: set[frozenset[str]] = set()
    kills = 0
    for _ in range(40):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            state = frozenset(path.name for path in out.rglob("*")) if out.exists() else frozenset()
            if state and state not in seen:  # a state nobody was killed in yet
                seen.add(state)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        if process.wait() == 0:
            break
    assert kills >= 5
    assert subprocess.run(command, check=False).returncode == 0
    assert contents(out) == contents(shards)


def test_a_torn_note_is_no_note(found: Survey, shards: Path, tmp_path: Path) -> None:
    """A machine that lost its power may leave a name without content."""
    write_part(found, tmp_path / "out", 1, 1)
    notes = sorted((tmp_path / "out" / UNFINISHED).glob("*.tar.json"))
    notes[0].write_bytes(b"")
    notes[1].write_bytes(notes[1].read_bytes()[:20])
    (tmp_path / "out" / "train-000002.tar").write_bytes(b"cut")
    write(found, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(shards)


def test_a_complete_folder_is_left_alone(found: Survey, shards: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    write(found, shards)
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before


@pytest.mark.parametrize(
    "settings",
    [{"rule": "reference"}, {"shard_samples": 11}, {"shard_mb": 0.05}, {"transform": Transform("jpg")}],
)
def test_other_settings_are_refused(found: Survey, shards: Path, tmp_path: Path, settings: dict) -> None:
    with pytest.raises(UserError, match="other scenes or settings"):
        write(found, shards, **settings)
    write_part(found, tmp_path / "begun", 1, 2)
    with pytest.raises(UserError, match="was begun with other scenes or settings"):
        write(found, tmp_path / "begun", **settings)


def test_an_edited_scene_is_not_taken_for_done(scenes: Path, shards: Path, tmp_path: Path) -> None:
    """The same length, another meaning."""
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    path = sorted(copy.rglob("CLEVRTEX*.json"))[0]
    text = path.read_text()
    path.write_text(text.replace('"cube"', '"cone"') if '"cube"' in text else text.replace('"sphere"', '"teapot"'))
    with pytest.raises(UserError, match="other scenes or settings"):
        make_shards(copy, shards)


def test_a_scene_that_is_mended_meanwhile(scenes: Path, shards: Path, tmp_path: Path) -> None:
    """The run stops at a damaged picture; when it is mended, only what is missing is written."""
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    victim = sorted(path for path in copy.rglob("*_0003.png") if "flat" not in path.name)[40]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-50])
    with pytest.raises(UserError, match=f"{victim.name}: its end is missing"):
        make_shards(copy, tmp_path / "out")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert kept
    victim.write_bytes(whole)
    make_shards(copy, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(shards)
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())


def test_a_scene_that_is_taken_out_meanwhile(scenes: Path, tmp_path: Path) -> None:
    """Every later scene moves up, and a shard may be one too many."""
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    write_part(survey(copy), tmp_path / "out", 1, 1)
    for folder in sorted(path.parent for path in copy.rglob("CLEVRTEX*.json"))[50:]:
        shutil.rmtree(folder)
    make_shards(copy, tmp_path / "out")
    make_shards(copy, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.parametrize("count", [2, 3, 20])
def test_parts_give_the_same_bytes(found: Survey, shards: Path, tmp_path: Path, count: int) -> None:
    out = tmp_path / "out"
    for number in range(count, 0, -1):
        if number > 1:
            with pytest.raises(UserError, match="holds no parts") if number == count else pytest.raises(UserError):
                merge_shards(out)
        write_part(found, out, number, count)
        assert not (out / MANIFEST).exists()
    merge_shards(out)
    assert contents(out) == contents(shards)
    merge_shards(out)  # again: nothing happens


def test_missing_parts_are_named(found: Survey, tmp_path: Path) -> None:
    for number in (1, 3):
        write_part(found, tmp_path / "out", number, 4)
    with pytest.raises(UserError, match=r"of 7 shards are missing \(part 2/4, 4/4: train-000001.tar"):
        merge_shards(tmp_path / "out")


def test_parts_that_see_different_scenes(scenes: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    write_part(survey(copy), tmp_path / "out", 1, 2)
    shutil.rmtree(sorted(path.parent for path in copy.rglob("CLEVRTEX*.json"))[50])
    with pytest.raises(UserError, match="part 2/2 sees other scenes than the parts before it"):
        write_part(survey(copy), tmp_path / "out", 2, 2)


def test_parts_that_count_differently(found: Survey, tmp_path: Path) -> None:
    write_part(found, tmp_path / "out", 1, 2)
    with pytest.raises(UserError, match="was begun in 2 parts, not 3; keep their number"):
        write_part(found, tmp_path / "out", 2, 3)


def test_shards_by_size(found: Survey, tmp_path: Path) -> None:
    limit = 0.06
    plan = cut(found, Settings(shard_mb=limit))
    assert [scene for shard in plan.shards if shard.split == "train" for scene in shard.scenes] == list(
        found.scenes[12:]
    )
    for shard, after in zip(plan.shards, plan.shards[1:], strict=False):
        size = sum(scene.size for scene in shard.scenes)
        assert size <= limit * 1e6 or len(shard.scenes) == 1
        if shard.split == after.split:  # and not one fewer than fit
            assert size + after.scenes[0].size > limit * 1e6
    write(found, tmp_path / "out", shard_mb=limit)
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("transform", "suffix", "said"),
    [
        (Transform("png", (32, 32)), "png", "resized to 32x32 (bicubic), png"),
        (Transform("jpg", None, 90), "jpg", "jpg quality 90"),
        (Transform("webp", (40, 24), 80), "webp", "resized to 40x24 (bicubic), webp quality 80"),
    ],
)
def test_images_encoded_anew(found: Survey, shards: Path, tmp_path: Path, transform, suffix: str, said: str) -> None:
    manifest = write(found, tmp_path / "out", transform=transform)
    assert manifest.transform == said
    assert manifest.image_size == (transform.size or (64, 48))
    assert manifest.mask_size == (64, 48)
    plain, split = open_split(shards, "val"), open_split(tmp_path / "out", "val")
    for sample in range(len(split)):
        assert split.read(sample, "mask") == plain.read(sample, "mask")
        frame = decode_image_frame(split.read(sample, "image"))
        assert frame.shape[1::-1] == manifest.image_size
        original = Image.fromarray(decode_image_frame(plain.read(sample, "image")))
        expected = np.asarray(original.resize(manifest.image_size, Image.Resampling.BICUBIC), float)
        assert np.abs(frame - expected).mean() < (0.5 if suffix == "png" else 12)
    names = {name.partition(".")[2] for name in _names(tmp_path / "out" / "val-000000.tar")}
    assert names == {suffix, "mask.png", "json"}
    assert verify(tmp_path / "out") == []


def test_a_png_resized_here_trains_alike(found: Survey, shards: Path, tmp_path: Path) -> None:
    """Pixels are what the loader would have made of the source."""
    write(found, tmp_path / "out", transform=Transform("png", (32, 32)))
    plain, split = open_split(shards, "train"), open_split(tmp_path / "out", "train")
    for sample in range(0, len(split), 7):
        ours, theirs = (decode_image(each.read(sample, "image"), 32) for each in (split, plain))
        assert np.array_equal(ours, theirs)


def test_a_picture_that_cannot_be_decoded_is_named(scenes: Path, tmp_path: Path) -> None:
    """Its header and its end are whole, so that only decoding shows."""
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    victim = sorted(path for path in copy.rglob("*_0003.png") if "flat" not in path.name)[0]
    data = victim.read_bytes()
    victim.write_bytes(data[:300] + data[-12:])
    make_shards(copy, tmp_path / "out")
    assert any("the image cannot be decoded" in fault for fault in verify(tmp_path / "out"))
    with pytest.raises(UserError, match=f"{victim.name}: cannot be decoded"):
        make_shards(copy, tmp_path / "jpg", transform=Transform("jpg"))


def test_a_strangers_folder_is_refused(found: Survey, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no shards"):
        write(found, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_broken_scene_leaves_nothing_behind(scenes: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    sorted(copy.rglob("CLEVRTEX*.json"))[40].write_bytes(b"{")
    assert nsi(["shard", str(copy), str(tmp_path / "out"), "--workers", "1"]) == 1
    assert not (tmp_path / "out").exists()


def test_a_full_disk(found: Survey, shards: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); mend that and run"):
            write(found, disk / "out")
        assert not list((disk / "out").rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        write(found, disk / "out")
        assert contents(disk / "out") == contents(shards)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_written(found: Survey, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("a read-only disk can be mounted by root alone")
    try:
        with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"):
            write(found, disk / "out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_leftovers_of_the_dead_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mark = temporary_mark()
    here = mark.rsplit(".", 2)[0]
    for name in (f"a.tar.{here}.{dead.pid}.tmp", f"b.tar.{mark}", f"c.tar.elsewhere.{dead.pid}.tmp", "notes.tmp"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["b", "c", "n"]


def test_a_complete_folder_that_lost_shards_gets_them_back(found: Survey, shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    os.truncate(copy / "train-000001.tar", 1000)
    (copy / "train-000002.tar").unlink()
    index_path(copy / "val-000000.tar").unlink()
    kept = {path: path.stat().st_mtime_ns for path in copy.glob("train-00000[034].*")}
    write(found, copy)
    assert contents(copy) == contents(shards)
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())


def test_a_lost_shard_whose_scenes_are_others_now(scenes: Path, shards: Path, tmp_path: Path) -> None:
    """The same JSONs and sizes, so that the pictures' bytes alone can tell."""
    copy = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    picture = sorted(path for path in copy.rglob("*_0003.png") if "flat" not in path.name)[30]
    data = bytearray(picture.read_bytes())
    data[100] ^= 1
    picture.write_bytes(data)
    out = Path(shutil.copytree(shards, tmp_path / "out"))
    (out / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000001.tar: missing or cut, and its scenes have other bytes"):
        make_shards(copy, out)
    assert not list(out.glob("*.tmp"))


def test_another_run_in_the_same_folder_is_told_so(found: Survey, shards: Path, tmp_path: Path) -> None:
    """The first run is another process, which is killed in the end: nothing of it keeps the folder locked."""
    out = tmp_path / "out"
    out.mkdir()
    holding = f"from shards.writing.disk import held\nfrom pathlib import Path\nwith held(Path({str(out)!r}), {{}}):\n"
    command = [sys.executable, "-c", holding + "    print(flush=True)\n    input()"]
    for shared in (False, True):
        code = [*command[:2], command[2].format(shared)]
        with subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
            assert first.stdout is not None
            first.stdout.readline()
            with pytest.raises(UserError, match=f"^{out}: another `nsi shard` is writing there; wait for its end"):
                write(found, out)
            assert list(out.iterdir()) == []
            if shared:
                write_part(found, out, 1, 2)
            first.kill()
    write(found, out)
    assert contents(out) == contents(shards)


def test_a_kill_after_the_manifest_leaves_nothing(found: Survey, shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    (copy / UNFINISHED).mkdir()
    (copy / UNFINISHED / "plan.json").write_text("{}")
    write(found, copy)
    assert contents(copy) == contents(shards)


def test_a_disk_that_is_full_at_the_first_note(scenes: Path, shards: Path, tmp_path: Path, monkeypatch) -> None:
    """The shard is there and its note is not: the same command goes on."""
    write_file = writing.write_file

    def full(path: Path, data: bytes, synced: bool) -> None:
        if path.name.endswith(".tar.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_file(path, data, synced)

    command = ["shard", str(scenes), str(tmp_path / "out"), "--shard_samples", "10", "--workers", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(writing, "write_file", full)
        assert nsi(command) == 1
    assert nsi(command) == 0
    assert contents(tmp_path / "out") == contents(shards)


def test_parts_count_their_own_scenes(found: Survey) -> None:
    settings = Settings(shard_samples=10)
    counts = [count_scenes(found, settings, Part(number, 4)) for number in (1, 2, 3, 4)]
    assert sum(counts) == count_scenes(found, settings, None) == len(found.scenes)
    assert max(counts) < len(found.scenes)


def test_an_index_that_is_not_its_tars_is_written_again(found: Survey, shards: Path, tmp_path: Path) -> None:
    write_part(found, tmp_path / "out", 1, 1)
    index_path(tmp_path / "out" / "train-000001.tar").write_bytes(b"another")
    write(found, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(shards)
    index_path(tmp_path / "out" / "val-000000.tar").write_bytes(b"another")  # of a folder that is complete, too
    write(found, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(shards)


def test_places_of_a_tar_give_the_same_shards(found: Survey, shards: Path, tmp_path: Path) -> None:
    """Where members lie does not matter: here all of them one after the other in one file."""
    spool, at, moved = tmp_path / "spool", 0, []
    with spool.open("wb") as file:
        for scene in found.scenes:
            places = []
            for place in (scene.json, scene.image, scene.mask):
                file.write(Path(place.path).read_bytes())
                places.append(Place(str(spool), at, place.size))
                at += place.size
            moved.append(type(scene)(scene.key, scene.index, *places, scene.objects, scene.variant, scene.digest))
    write(Survey(tuple(moved), found.vocabulary), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(shards)


def test_verify_finds_nothing_wrong(shards: Path) -> None:
    assert verify(shards) == []


def flip(path: Path, place: int) -> None:
    """Changes one byte."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def test_verify_names_a_flipped_byte(copy: Path) -> None:
    tar = copy / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    damage, whole = verify(copy)
    assert "train-000001.tar: image of CLEVRTEXv2_full_000022 at offset 512 does not have its checksum" in damage
    assert "train-000001.tar: its bytes are not those that were written" in whole


def test_verify_names_a_flipped_byte_between_members(copy: Path) -> None:
    tar = copy / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[20] ^= 1  # in the first header
    tar.write_bytes(data)
    assert any("all samples are whole, so a header or the padding" in fault for fault in verify(copy))


def test_verify_decodes_samples_without_masks(found: Survey, tmp_path: Path) -> None:
    """As those that were made of HDF5 files. One picture lost its pixels before it became a shard."""
    picture = bytearray(Path(found.scenes[0].image.path).read_bytes())
    picture[100:200] = bytes(100)
    (tmp_path / "broken.png").write_bytes(picture)
    scenes = [scene._replace(mask=None) for scene in found.scenes]
    scenes[0] = scenes[0]._replace(image=Place(str(tmp_path / "broken.png"), 0, len(picture)))
    out = tmp_path / "out"
    write(Survey(tuple(scenes), found.vocabulary), out)
    (undecodable,) = verify(out)
    assert f"test-000000.tar: {scenes[0].key} at offset 512: the image cannot be decoded" in undecodable
    flip(out / "val-000000.tar", 20)  # in the first header
    _, between, whole = verify(out)
    assert between.endswith("val-000000.tar: all samples are whole, so a header or the padding between them is damaged")
    assert "val-000000.tar: its bytes are not those that were written" in whole


def test_verify_looks_into_a_tar_whose_index_is_of_no_use(copy: Path) -> None:
    index_path(copy / "train-000000.tar").write_bytes(b"another")
    index_path(copy / "train-000001.tar").unlink()
    flip(copy / "train-000001.tar", 5000)
    index_path(copy / "val-000000.tar").unlink()
    (copy / "val-000000.tar").unlink()
    shutil.copy(copy / "train-000002.tar", copy / "train-000003.tar")
    shutil.copy(index_path(copy / "train-000002.tar"), index_path(copy / "train-000003.tar"))
    faults = verify(copy)
    for told in (
        "train-000000.index.npy: is not the index that was written",
        "train-000001.index.npy: missing",
        "train-000001.tar: its bytes are not those that were written",
        "train-000001.tar: CLEVRTEXv2_full_000022 at offset 512: the image cannot be decoded",
        "val-000000.index.npy: missing",
        "val-000000.tar: missing",
        "train-000003.index.npy: is not the index that was written",
        "train-000003.tar: its bytes are not those that were written",
    ):
        assert sum(told in fault for fault in faults) == 1, told
    doubled = [fault for fault in faults if "is also in" in fault]
    assert len(doubled) == 10
    assert len(faults) == 19


def test_reading_a_flipped_byte_names_shard_key_and_offset(copy: Path) -> None:
    split = open_split(copy, "val")
    place = next(split.indexes())[2]["image"]
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
        open_split(copy, "train").check_complete()
    with pytest.raises(UserError, match=r"train-000002.tar: has \d+ bytes, the manifest says \d+"):
        open_split(copy, "train").read(25, "json")
    assert any("has" in fault and "bytes, the manifest says" in fault for fault in verify(copy))


def test_missing_pieces(copy: Path) -> None:
    index_path(copy / "val-000000.tar").unlink()
    (copy / "test-000000.tar").unlink()
    faults = verify(copy)
    assert any("val-000000.index.npy: missing" in fault for fault in faults)
    assert any("test-000000.tar: missing" in fault for fault in faults)
    for name, missing in (("test", "test-000000.tar"), ("val", "val-000000.index.npy")):
        with pytest.raises(UserError, match=f"{missing}: (missing|not found)"):
            open_split(copy, name).check_complete()
        with pytest.raises(UserError, match=f"{missing}: (missing|not found)"):
            open_split(copy, name).read(0, "image")


def test_an_index_of_another_shard(copy: Path) -> None:
    shutil.copy(copy / "val-000000.index.npy", copy / "train-000004.index.npy")
    assert any("train-000004.index.npy" in fault for fault in verify(copy))


def test_strangers_and_unfinished_runs_are_named(copy: Path) -> None:
    shutil.copy(copy / "val-000000.tar", copy / "val-000001.tar")
    (copy / UNFINISHED).mkdir()
    faults = verify(copy)
    assert any("val-000001.tar: not in the manifest" in fault for fault in faults)
    assert any("has not finished" in fault for fault in faults)


def test_an_edited_manifest_is_refused(copy: Path) -> None:
    path = copy / MANIFEST
    path.write_text(path.read_text().replace('"max_objects": ', '"max_objects": 1'))
    with pytest.raises(UserError, match="its fingerprint does not fit"):
        read_manifest(copy)


def test_a_newer_manifest_is_refused(copy: Path) -> None:
    path = copy / MANIFEST
    path.write_text(path.read_text().replace('"format": 3', '"format": 99'))
    with pytest.raises(UserError, match="format 99, but this version reads 3; upgrade"):
        read_manifest(copy)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest.json: missing; write the shards with `nsi shard"):
        read_manifest(tmp_path)


def test_index_offsets_are_those_of_the_tar(shards: Path) -> None:
    split = open_split(shards, "train")
    record = next(split.indexes())[0]
    data = (shards / "train-000000.tar").read_bytes()
    offset, size, _ = (int(value) for value in record["image"])
    assert data[offset : offset + 8] == b"\x89PNG\r\n\x1a\n"
    assert data[offset : offset + size] == split.read(0, "image")


def _names(tar: Path) -> list[str]:
    import tarfile

    with tarfile.open(tar) as archive:
        return archive.getnames()
