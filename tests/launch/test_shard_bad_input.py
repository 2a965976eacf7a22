"""`nsi shard` told wrongly or given damaged things: one clear line, and nothing lost or left behind."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from shards import tar
from tests.launch.outside import contents, done, edited, gzipped, in_form, nsi, refused, shard, write_files
from tests.shards.archives import Files, archive_of, archive_server, files_of, link

ROOT = Path(__file__).parents[2]
SCENES = 8


@pytest.fixture(scope="module")
def files(scenes: Path) -> Files:
    return files_of(scenes, SCENES)


@pytest.fixture(scope="module")
def source(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(files, tmp_path_factory.mktemp("source"))


# --- wrong usage ---


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "give a SOURCE and an OUT"),
        (["SOURCE"], "give a SOURCE and an OUT"),
        (["SOURCE", "OUT", "--part", "0/3"], "--part 0/3: give i/N with i from 1 to N"),
        (["SOURCE", "OUT", "--part", "4/3"], "--part 4/3: give i/N with i from 1 to N"),
        (["SOURCE", "OUT", "--part", "x"], "--part x: give i/N with i from 1 to N"),
        (["http://127.0.0.1:9/a.tar", "OUT", "--part", "1/3"], "--part: http://127.0.0.1:9/a.tar can only be read"),
        (["OUT", "--part", "1/3", "--merge"], "--part, --merge and --to_hdf5 are three different things"),
        (["OUT", "--to-hdf5"], "--to_hdf5 wants one folder of shards and one to write to"),
        (["SOURCE", "OUT", "--resize", "32"], "--resize needs an encoding"),
        (["SOURCE", "OUT", "--image", "png", "--resize", "wide"], "--resize wide: give a size in pixels"),
        (["SOURCE", "OUT", "--image", "png", "--resize", "0x8"], "--resize 0x8: no size for a picture"),
        (["SOURCE", "OUT", "--image", "jpg", "--quality", "0"], "--quality 0: must be from 1 to 100"),
        (["SOURCE", "OUT", "--workers", "0"], "--workers must be at least 1"),
        (["SOURCE", "OUT", "--shard_samples", "0"], "--shard_samples must be at least 1"),
        (["SOURCE", "OUT", "--shard_mb", "-1"], "--shard_mb -1.0: must be a size"),
        (["SOURCE", "OUT", "--shard_mb", "nan"], "--shard_mb nan: must be a size"),
    ],
)
def test_wrong_usage(source: Path, tmp_path: Path, arguments: list[str], line: str) -> None:
    places = {"SOURCE": str(source), "OUT": str(tmp_path / "out")}
    assert line in refused(nsi("shard", *(places.get(each, each) for each in arguments)), status=2)
    assert not list(tmp_path.iterdir())


# --- sources that no shards can be made of ---


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


HUGE = b"".join(
    [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)),
     chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")]
)  # fmt: skip


def with_huge_picture(files: Files, victim: str = "_000005_0003.png") -> Files:
    return [(name, HUGE if name.endswith(victim) else content) for name, content in files]


def with_a_copy(files: Files) -> Files:
    """One of the scenes is there again, in another folder."""
    return [*files, *((f"copy/{name}", content) for name, content in files if "_000005/" in name)]


BAD: dict[str, tuple[Callable[[Files], Files], str]] = {
    "NaN": (
        lambda files: edited(files, 5, lambda facts: facts["objects"][0].update({"3d_coords": [0.0, float("nan"), 0]})),
        "_000005.json: not a JSON file (it holds NaN or Infinity)",
    ),
    "two data sets": (
        lambda files: edited(files, 5, lambda facts: facts.update(split="camo")),
        "_000005.json: variant camo, but CLEVRTEXv2_full_000000 has full",
    ),
    "an index twice": (
        lambda files: edited(files, 5, lambda facts: facts.update(image_index=3)),
        "_000005.json: scene 3 is also in ",
    ),
    "a key twice": (with_a_copy, "_000005.json: scene CLEVRTEXv2_full_000005 is also in "),
    "100 megapixels": (with_huge_picture, ": it is 10000x10000, too large for a scene"),
}


def left_of(out: Path) -> set[str]:
    """What a refused run left; a stream's whole members may stay, for the next run to go on from."""
    return set(contents(out)) - {".unfinished", ".unfinished/spool"} if out.exists() else set()


@pytest.mark.parametrize("settings", [(), ("--image", "jpg", "--resize", "32")], ids=["kept", "jpg"])
@pytest.mark.parametrize("form", ["v2", "tar", "tar.gz"])
@pytest.mark.parametrize("fault", BAD)
def test_scenes_that_are_of_no_use(
    files: Files, tmp_path: Path, fault: str, form: str, settings: tuple[str, ...]
) -> None:
    change, reason = BAD[fault]
    with in_form(form, change(files), tmp_path / "source") as sources:
        before = contents(tmp_path / "source")
        line = refused(shard(*sources, tmp_path / "out", *settings))
        assert reason in line
        assert "CLEVRTEXv2_full_000005" in line
        assert f"nsi shard: {sources[0]}" in line
        assert contents(tmp_path / "source") == before
    if form == "tar.gz":
        assert left_of(tmp_path / "out") == {f".unfinished/spool/part-00.{each}" for each in ("spool", "journal")}
    else:
        assert not (tmp_path / "out").exists()


def test_a_key_twice_in_two_archives(files: Files, tmp_path: Path) -> None:
    with in_form("tar", files, tmp_path / "one") as one, in_form("tar", files, tmp_path / "two") as two:
        line = refused(shard(*one, *two, tmp_path / "out"))
    assert one[0] in line
    assert two[0] in line
    assert not (tmp_path / "out").exists()


def test_workers_leave_nothing_behind_either(files: Files, tmp_path: Path) -> None:
    source = write_files(with_huge_picture(files, victim=".png"), tmp_path / "source")
    command = ["shard", str(source), str(tmp_path / "deep" / "out"), "--workers", "2"]
    found = subprocess.run([sys.executable, "-m", "launch", *command], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stderr.count("\n")) == (1, 1)
    assert "too large for a scene" in found.stderr
    assert not (tmp_path / "deep").exists()


def test_what_is_done_before_a_bad_scene_stays(files: Files, source: Path, tmp_path: Path) -> None:
    """The second shard cannot be written; when the scene is mended the run goes on with it."""
    bad = write_files(with_huge_picture(files), tmp_path / "source")
    settings = ("--shard_samples", "2", "--splits", "test")
    assert "too large for a scene" in refused(nsi("shard", bad, tmp_path / "out", *settings, "--workers", 1))
    first = tmp_path / "out" / "test-000000.tar"
    inode = first.stat().st_ino
    write_files(files, bad)
    done(nsi("shard", bad, tmp_path / "out", *settings, "--workers", 1))
    done(nsi("shard", source, tmp_path / "whole", *settings, "--workers", 1))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert first.stat().st_ino == inode


def test_a_json_of_a_gigabyte(files: Files, tmp_path: Path) -> None:
    """Refused by its size: nobody has the time or the memory to read it."""
    source = write_files(files, tmp_path / "source")
    victim = next(source.rglob("CLEVRTEX*_000005.json"))
    with victim.open("r+b") as file:
        file.truncate(1 << 30)
    line = refused(shard(source, tmp_path / "out"))
    assert f"{victim}: 1073741824 bytes, more than any scene's JSON" in line
    header = tar.header("a/CLEVRTEX_1.json", 1 << 30)
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + (1 << 30) + len(tar.END))
    gzipped(tmp_path / "a.tar.gz", header + bytes(1 << 20))
    for name in ("a.tar", "a.tar.gz"):
        line = refused(shard(tmp_path / name, tmp_path / "out"))
        assert f"{name}: a/CLEVRTEX_1.json at offset 0 has 1073741824 bytes, more than any scene's JSON" in line
    assert not (tmp_path / "out").exists()


# --- archives ---

ESCAPES = {
    "above": lambda files: archive_of([("../CLEVRTEX_1.json", b"{}"), *files]),
    "absolute": lambda files: archive_of([("/tmp/CLEVRTEX_1.json", b"{}"), *files]),
    "symbolic link": lambda files: archive_of([], more=[link("a/CLEVRTEX_1.json", "/etc/passwd")]),
    "hard link": lambda files: archive_of([], more=[link("a/CLEVRTEX_1.json", "../x", tarfile.LNKTYPE)]),
}


@pytest.mark.parametrize("packed", [False, True], ids=["tar", "tar.gz"])
@pytest.mark.parametrize("escape", ESCAPES)
def test_members_that_lead_out(files: Files, tmp_path: Path, escape: str, packed: bool) -> None:
    path = tmp_path / ("evil.tar.gz" if packed else "evil.tar")
    data = ESCAPES[escape](files)
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    line = refused(shard(path, tmp_path / "out"))
    assert f"{path}: " in line
    assert "is a link" in line or "leads out of the archive's folder" in line
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_truncated_archive(files: Files, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    data = archive_of(files)
    path.write_bytes(data[: len(data) // 2])
    assert f"{path}: it ends at offset {len(data) // 2} in the middle of " in refused(shard(path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_truncated_gzip_and_the_whole_one(files: Files, source: Path, tmp_path: Path) -> None:
    """What was whole of it is kept, but never taken for the data set, nor for another file's."""
    path = gzipped(tmp_path / "clevrtex.tar.gz", archive_of(files))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{path}: the gzip ends at byte {len(whole) // 2} in the middle, so it was cut" in refused(
        shard(path, tmp_path / "out")
    )
    assert left_of(tmp_path / "out") == {f".unfinished/spool/part-00.{each}" for each in ("spool", "journal")}
    path.write_bytes(whole)
    line = refused(shard(path, tmp_path / "out"))
    spool = tmp_path / "out" / ".unfinished" / "spool"
    assert f"so it is not what {spool} was begun with; remove that folder to start anew" in line
    shutil.rmtree(spool)
    done(shard(path, tmp_path / "out"))
    done(shard(source, tmp_path / "plain"))
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("no_folder", "no.tar", "no.tar.gz"):
        assert str(tmp_path / name) in refused(shard(tmp_path / name, tmp_path / "out"))
    with archive_server(b"") as server:
        server.refusals = [404]
        assert f"{server.url()}: HTTP 404" in refused(shard(server.url(), tmp_path / "out"))
        server.body = b"<html>Not what you wanted</html>"
        assert f"{server.url()}: it ends at offset 32 without an end mark" in refused(
            shard(server.url(), tmp_path / "out")
        )
    assert not list(tmp_path.iterdir())


# --- what is in the way ---


@pytest.mark.parametrize("form", ["v2", "tar.gz"])
def test_out_holds_something_else(files: Files, tmp_path: Path, form: str) -> None:
    out = tmp_path / "out"
    with in_form(form, files, tmp_path / "source") as sources:
        out.write_text("precious")
        assert f"{out}: is a file; choose a folder" in refused(shard(*sources, out))
        assert out.read_text() == "precious"
        out.unlink()
        out.mkdir()
        (out / "thesis.txt").write_text("precious")
        assert f"{out}: is not empty and holds no shards" in refused(shard(*sources, out))
        (out / "thesis.txt").rename(out / "manifest.json")  # a name that other programs use too
        (out / "manifest.json").write_text(json.dumps({"name": "a web page"}))
        before = contents(out)
        assert f"{out / 'manifest.json'}: not a manifest of this program" in refused(shard(*sources, out))
        assert contents(out) == before


@pytest.mark.parametrize("form", ["v2", "tar", "tar.gz"])
def test_out_is_complete_with_other_settings(files: Files, tmp_path: Path, form: str) -> None:
    out = tmp_path / "out"
    with in_form(form, files, tmp_path / "source") as sources:
        done(shard(*sources, out))
        before = contents(out)
        for settings in (["--image", "jpg"], ["--shard_samples", "4"], ["--splits", "reference"]):
            line = refused(shard(*sources, out, *settings))
            assert f"{out}: holds the shards of other scenes or settings; choose another folder" in line
            assert contents(out) == before
        done(shard(*sources, out))
    assert contents(out) == before


def test_hdf5_files_in_the_way(source: Path, tmp_path: Path) -> None:
    done(shard(source, tmp_path / "shards"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    line = refused(nsi("shard", "--to_hdf5", tmp_path / "shards", tmp_path / "out"))
    assert f"{tmp_path / 'out'}: is not empty" in line
    assert "manifest.json: missing" in refused(nsi("shard", "--to_hdf5", source, tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    assert contents(tmp_path / "out") == {"thesis.txt": b"precious"}


def test_a_name_in_another_encoding(files: Files, tmp_path: Path) -> None:
    source = write_files(files, tmp_path / "source")
    scene = next(source.rglob("CLEVRTEX*.json"))
    shutil.copy(bytes(scene), bytes(scene.parent) + b"/CLEVRTEX\xe9.json")
    assert "its name is no UTF-8; rename the scene" in refused(shard(source, tmp_path / "out"))


def test_a_feature_store_that_is_on_its_way(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".unfinished").mkdir(parents=True)
    (out / ".unfinished" / "plan.json").write_text('{"backbone": "dct"}')
    assert "holds no parts" in refused(shard(out, "--merge"))
    assert "was begun with other scenes or settings" in refused(shard(source, out))
