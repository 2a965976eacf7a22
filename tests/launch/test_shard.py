"""`nsi shard` from the outside: whatever the source, the parts and the interruptions, the same shards."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.decode import decode_image, decode_image_frame
from shards.manifest import MANIFEST, read_manifest
from shards.reading.dataset import open_split
from shards.schema_json import decode_schema
from tests.launch.outside import contents, done, edited, in_form, in_v1, nsi, refused, shard, write_files
from tests.shards.archives import Files, archive_of, archive_server, files_of

ROOT = Path(__file__).parents[2]
SCENES = 24  # 2 test, 3 val, 19 train
JPG = ("--image", "jpg", "--resize", "32")
FORMS = ("v1", "tar", "tar.gz", "three tar.gz", "URL", "URL of tar.gz")


@pytest.fixture(scope="module", autouse=True)
def _no_proxy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        yield


@pytest.fixture(scope="module")
def files(scenes: Path) -> Files:
    return files_of(scenes, SCENES)


@pytest.fixture(scope="module")
def source(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A v2 folder."""
    return write_files(files, tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its shards."""
    out = tmp_path_factory.mktemp("shards") / "plain"
    assert "6 shards; scenes: train 19, val 3, test 2; " in done(shard(source, out))
    return out


@pytest.fixture(scope="module")
def small(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its shards with small JPEGs."""
    out = tmp_path_factory.mktemp("shards") / "small"
    done(shard(source, out, *JPG))
    return out


def test_shards_hold_the_files_of_the_source(files: Files, plain: Path) -> None:
    wanted = {Path(name).name: content for name, content in files}
    found = 0
    for path in plain.glob("*.tar"):
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                key, _, suffix = member.name.partition(".")
                name = f"{key}{'_flat' if suffix.startswith('mask') else ''}_0003.png"
                content = archive.extractfile(member)
                assert content is not None
                if suffix == "json":
                    assert wanted[f"{key}.json"].strip() in content.read()
                else:
                    assert content.read() == wanted[name]
                found += 1
    assert found == 3 * SCENES
    assert "24 samples, all as they were written" in done(nsi("verify", plain, "--workers", 1))


def test_shards_with_small_jpegs(plain: Path, small: Path) -> None:
    assert read_manifest(small).transform == "resized to 32x32 (bicubic), jpg quality 95"
    ours, theirs = open_split(small, "train"), open_split(plain, "train")
    for sample in range(len(ours)):
        with Image.open(io.BytesIO(theirs.read(sample, "image"))) as picture, io.BytesIO() as file:
            picture.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
            assert ours.read(sample, "image") == file.getvalue()
        for member in ("mask", "json"):
            assert ours.read(sample, member) == theirs.read(sample, member)
    done(nsi("verify", small, "--workers", 1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("settings", [(), JPG], ids=["kept", "jpg"])
def test_every_source_gives_the_same_bytes(
    files: Files, plain: Path, small: Path, tmp_path: Path, form: str, settings: tuple[str, ...]
) -> None:
    with in_form(form, files, tmp_path / "source") as sources:
        done(shard(*sources, tmp_path / "out", *settings))
    assert contents(tmp_path / "out") == contents(small if settings else plain)


def test_two_workers_give_the_same_bytes(source: Path, plain: Path, tmp_path: Path) -> None:
    done(shard(source, tmp_path / "out", "--workers", 2))
    assert contents(tmp_path / "out") == contents(plain)


@pytest.mark.slow
def test_two_runs_at_once(source: Path, plain: Path, tmp_path: Path) -> None:
    """Two real commands in one OUT, five times: one of them writes it, the other finds it done or says who is there."""
    for number in range(5):
        out = tmp_path / str(number)
        command = [sys.executable, "-m", "launch", "shard", str(source), str(out), "--shard_samples", "5"]
        runs = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in "12"]
        errors = [run.communicate()[1] for run in runs]
        assert 0 in (run.returncode for run in runs), errors
        for run, error in zip(runs, errors, strict=True):
            if run.returncode:
                assert error.startswith(f"nsi shard: {out}: another `nsi shard` is writing there; wait for its end")
                assert error.count("\n") == 1
        assert contents(out) == contents(plain)


def test_shards_by_megabytes(files: Files, source: Path, tmp_path: Path) -> None:
    """As full as may be, and not fuller."""
    with in_form("tar.gz", files, tmp_path / "source") as sources:
        done(shard(*sources, tmp_path / "packed", "--shard_mb", 0.05))
    done(shard(source, tmp_path / "out", "--shard_mb", 0.05))
    assert contents(tmp_path / "out") == contents(tmp_path / "packed")
    size_of = {Path(name).parent.name: 0 for name, _ in files}
    for name, content in files:
        if "_depth_" not in name and "_shadow_" not in name:
            size_of[Path(name).parent.name] += len(content)
    split = open_split(tmp_path / "out", "train")
    sizes: list[list[int]] = [[] for _ in split.table]
    for sample in split.locate(range(len(split))):
        sizes[int(sample.span.shard[6:12])].append(size_of[sample.key])
    assert len(sizes) > 3
    for shard_sizes, following in itertools.pairwise(sizes):
        assert sum(shard_sizes) <= 50_000 < sum(shard_sizes) + following[0]


def test_parts_and_a_merge(source: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in (3, 1):
        assert f"part {number}/3 is there" in done(shard(source, out, "--part", f"{number}/3"))
    before = contents(out)
    assert "2 of 6 shards are missing (part 2/3: train-000001.tar, val-000000.tar)" in refused(shard("--merge", out))
    assert contents(out) == before
    assert not (out / MANIFEST).exists()
    done(shard(source, out, "--part", "2/3"))
    for _ in range(2):  # the second time there is nothing left to do
        assert "6 shards; scenes: train 19, val 3, test 2; " in done(shard("--merge", out))
        assert contents(out) == contents(plain)


@pytest.mark.parametrize(
    ("rule", "counts"),
    [("official", {"train": 19, "val": 3, "test": 2}), ("reference", {"train": 18, "val": 1, "test": 5}),
     ("test", {"test": 24})],
)  # fmt: skip
def test_splits(source: Path, tmp_path: Path, rule: str, counts: dict[str, int]) -> None:
    done(shard(source, tmp_path / "out", "--splits", rule))
    manifest = read_manifest(tmp_path / "out")
    assert {split: manifest.samples(split) for split in manifest.splits} == counts
    done(nsi("verify", tmp_path / "out", "--workers", 1))


@pytest.mark.parametrize(
    ("variant", "splits"),
    [("outd", ["test"]), *((name, ["test", "train", "val"]) for name in ("camo", "pbg", "vbg", "grassbg"))],
)
def test_variants(files: Files, tmp_path: Path, variant: str, splits: list[str]) -> None:
    for number in range(SCENES):
        files = edited(files, number, lambda facts: facts.update(split=variant))
    if variant == "outd":
        files = edited(files, 3, lambda facts: facts["objects"][0].update(shape="teapot"))
    with in_form("tar.gz", files, tmp_path / "source") as sources:
        done(shard(*sources, tmp_path / "out"))
        manifest = read_manifest(tmp_path / "out")
        assert (manifest.variant, sorted(manifest.splits)) == (variant, splits)
        assert ("teapot" in manifest.vocabulary.shapes) == (variant == "outd")
        before = contents(tmp_path / "out")
        assert "is complete already" in done(shard(*sources, tmp_path / "out"))
        assert contents(tmp_path / "out") == before


def test_there_and_back_by_the_public_codes_files(plain: Path, tmp_path: Path) -> None:
    for spelling in ("--to-hdf5", "--to_hdf5"):
        assert "of 24 scenes" in done(nsi("shard", spelling, plain, tmp_path / spelling))
    assert contents(tmp_path / "--to-hdf5") == contents(tmp_path / "--to_hdf5")
    done(shard(tmp_path / "--to-hdf5", tmp_path / "back"))
    done(nsi("verify", tmp_path / "back", "--workers", 1))
    assert read_manifest(tmp_path / "back").vocabulary == read_manifest(plain).vocabulary
    for name in ("train", "val", "test"):
        ours, theirs = open_split(tmp_path / "back", name), open_split(plain, name)
        assert len(ours) == len(theirs)
        for sample in range(len(ours)):
            one, other = (decode_schema(split.read(sample, "json")) for split in (ours, theirs))
            assert one.primitives == other.primitives
            pixels = decode_image_frame(ours.read(sample, "image"))
            assert np.array_equal(pixels, decode_image(theirs.read(sample, "image"), 128))


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_a_download_that_was_killed_goes_on(files: Files, plain: Path, tmp_path: Path, kind: str) -> None:
    archive = archive_of(files)
    body = archive if kind == "tar" else gzip.compress(archive, 0)  # so that nothing moves far
    out, journal = tmp_path / "out", tmp_path / "out" / ".unfinished" / "spool" / "part-00.journal"
    with archive_server(body) as server:
        server.hold_at = archive.index(files[60][0].encode()) + 512 + 700  # in the midst of the thirteenth scene
        command = ["shard", server.url(f"clevrtex.{kind}"), str(out), "--workers", "1", "--shard_samples", "5"]
        child = subprocess.Popen([sys.executable, "-m", "launch", *command], cwd=ROOT)
        try:
            while not journal.exists() or journal.read_bytes().count(b"\n") < 30:
                assert child.poll() is None
                time.sleep(0.005)
        finally:
            child.kill()
            assert child.wait() == -signal.SIGKILL
        server.hold_at = None
        done(nsi(*command))
        assert server.asked[0] == 0
        assert (server.asked[1] > len(archive) // 3) == (kind == "tar")
    assert contents(out) == contents(plain)


def test_names_and_facts_of_v1(files: Files, plain: Path, tmp_path: Path) -> None:
    """v1's JSONs name no files; that they lack is all that differs in the shards."""
    names = ("image_filename", "mask_filename")
    for number in range(SCENES):
        files = edited(files, number, lambda facts: [facts.pop(name, None) for name in names])
    done(shard(write_files(in_v1(files), tmp_path / "source"), tmp_path / "out"))
    ours, theirs = open_split(tmp_path / "out", "train"), open_split(plain, "train")
    for sample in range(len(theirs)):
        assert all(ours.read(sample, member) == theirs.read(sample, member) for member in ("image", "mask"))
        one, other = (json.loads(split.read(sample, "json")) for split in (ours, theirs))
        assert one["scene"] == {name: value for name, value in other.pop("scene").items() if name not in names}
        one.pop("scene")
        assert one == other


def test_a_complete_folder_is_not_taken_for_another_archives(files: Files, tmp_path: Path) -> None:
    """Its first scene is enough to tell."""
    with in_form("tar.gz", files, tmp_path / "one") as sources:
        done(shard(*sources, tmp_path / "out"))
    others = files
    for number in range(SCENES):
        others = edited(others, number, lambda facts: facts["objects"][0].update(rotation=1.25))
    before = contents(tmp_path / "out")
    with in_form("tar.gz", others, tmp_path / "other") as sources:
        assert "holds the shards of other scenes or settings" in refused(shard(*sources, tmp_path / "out"))
    assert "nosuch.tar.gz: cannot be read" in refused(shard(tmp_path / "nosuch.tar.gz", tmp_path / "out"))
    assert contents(tmp_path / "out") == before


def test_a_scene_split_over_two_tars(files: Files, plain: Path, tmp_path: Path) -> None:
    for number, part in enumerate((files[::2], files[1::2])):
        (tmp_path / f"part{number}.tar").write_bytes(archive_of(part))
    done(shard(tmp_path / "part0.tar", tmp_path / "part1.tar", tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to-hdf5"], "give a SOURCE and an OUT"),
        (["--merge"], "give a SOURCE and an OUT"),
        (["SOURCE", "s3://bucket/shards"], "shards are written to a folder"),
        (["s3://bucket/scenes", "OUT"], "not read from there by this verb"),
        (["SOURCE", "OUT", "--merge"], "--merge wants OUT alone"),
        (["--to-hdf5", "http://host/shards", "OUT"], "not read from there by this verb"),
    ],
)
def test_places_that_are_not_written_to_or_read_from(arguments: list[str], message: str) -> None:
    assert message in refused(nsi("shard", *arguments), status=2)
    assert not Path("s3:").exists()
