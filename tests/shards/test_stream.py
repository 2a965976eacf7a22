"""Scenes in compressed archives and on a web server: read once, kept in a spool, and taken up again after any break."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsi.errors import UserError
from shards.reading.storage import Retries
from shards.sources.archive import list_archives
from shards.sources.listing import Folder
from shards.sources.scene import JSON_LIMIT, PICTURE_LIMIT
from shards.sources.stream import Progress, is_stream, list_stream
from tests.shards.archives import ArchiveServer, Files, archive_of, archive_server, bytes_in, files_of, link, scenes_in

QUICK = Retries(limit=3, first_wait_s=0.001, timeout_s=20.0)
ROOT = Path(__file__).parents[2]
SCENES = 6


@pytest.fixture(scope="session")
def files(scenes: Path) -> Files:
    return files_of(scenes, SCENES)


@pytest.fixture(scope="session")
def archive(files: Files) -> bytes:
    return archive_of(files)


@pytest.fixture(scope="session")
def wanted(files: Files) -> Mapping[str, bytes]:
    """The members that scenes are made of, by name."""
    return {name: content for name, content in files if "_depth_" not in name and "_shadow_" not in name}


@pytest.fixture
def server(archive: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[ArchiveServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with archive_server(archive) as server:
        yield server


def stream(spool: Path, *sources: object, report: Progress = lambda source, done, total: None) -> list[Folder]:
    return list_stream([str(source) for source in sources], spool, report, QUICK)


def members_in(folders: Sequence[Folder]) -> dict[str, bytes]:
    """The bytes of every member by its name in the archive."""
    found = {}
    for folder, members in bytes_in(folders).items():
        inside = folder[folder.index("clevrtexv2_full/") :]
        found |= {f"{inside}/{name}": content for name, content in members.items()}
    return found


def refused(spool: Path, *sources: object) -> str:
    with pytest.raises(UserError) as caught:
        stream(spool, *sources)
    line = str(caught.value)
    assert "\n" not in line
    return line


def gzipped(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data, 1, mtime=0))
    return path


def journal_of(spool: Path) -> Path:
    return spool / "part-00.journal"


# --- what is read ---


def test_is_stream() -> None:
    assert all(map(is_stream, ("a.tar.gz", "b/a.tgz", "http://host/a.tar", "https://host/a?b=c")))
    assert not any(map(is_stream, ("a.tar", "folder", "s3://bucket/a.tar")))


@pytest.mark.parametrize("kind", ["gzip", "tar over http", "gzip over http", "no length", "chunks", "no ranges"])
def test_a_stream_has_the_scenes_of_its_archive(
    server: ArchiveServer, archive: bytes, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "clevrtex.tar").write_bytes(archive)
    packed = gzipped(tmp_path / "clevrtex.tar.gz", archive)
    server.says_length = kind != "no length"
    server.serves_ranges = kind != "no ranges"
    server.is_chunked = kind == "chunks"
    if kind == "gzip over http":
        server.body = packed.read_bytes()
    source = packed if kind == "gzip" else server.url()
    seen: list[tuple[int, int]] = []
    found = stream(tmp_path / "spool", source, report=lambda source, done, total: seen.append((done, total)))
    expected = list_archives([tmp_path / "clevrtex.tar"])
    assert scenes_in(found) == scenes_in(expected)
    assert [folder.name.partition(".tar")[2].removeprefix(".gz") for folder in found] == [
        folder.name.partition(".tar")[2] for folder in expected
    ]
    size = packed.stat().st_size if kind.startswith("gzip") else len(server.body)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (size, 0 if kind in ("no length", "chunks") else size)
    assert server.asked == ([] if kind == "gzip" else [0])
    assert sorted(path.name for path in (tmp_path / "spool").iterdir()) == ["part-00.journal", "part-00.spool"]


@settings(derandomize=True, deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_order_of_members_in_any_number_of_parts(
    files: Files, wanted: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A scene's JSON may be the last thing in the last part, its image the first in the first."""
    folder = tmp_path_factory.mktemp("parts")
    shuffled = data.draw(st.permutations(files))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(files)), max_size=3)))
    parts = [shuffled[start:end] for start, end in zip([0, *cuts], [*cuts, len(files)], strict=True)]
    sources = [gzipped(folder / f"part{number}.tar.gz", archive_of(part)) for number, part in enumerate(parts)]
    found = stream(folder / "spool", *sources)
    assert members_in(found) == wanted
    assert [folder.name.partition(".tar.gz")[2] for folder in found] == sorted(
        {f"/{name.rpartition('/')[0]}" for name in wanted}
    )


def test_all_jsons_last(files: Files, wanted: dict[str, bytes], tmp_path: Path) -> None:
    ordered = sorted(files, key=lambda file: file[0].endswith(".json"))
    assert members_in(stream(tmp_path / "spool", gzipped(tmp_path / "a.tgz", archive_of(ordered)))) == wanted


def test_gzip_of_several_members_and_zeros_behind_it(archive: bytes, wanted: dict[str, bytes], tmp_path: Path) -> None:
    pieces = [archive[start : start + 10_000] for start in range(0, len(archive), 10_000)]
    path = tmp_path / "a.tar.gz"
    path.write_bytes(b"".join(gzip.compress(piece, 1) for piece in pieces) + bytes(1000))
    assert members_in(stream(tmp_path / "spool", path)) == wanted


def test_memory_is_bounded(files: Files, wanted: dict[str, bytes], tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(1 << 20)
    large = [("clevrtexv2_full/large.png", noise * 24), ("depth.exr", noise * 24), ("zeros.exr", bytes(24 << 20))]
    source = gzipped(tmp_path / "a.tar.gz", archive_of([*large, *files]))
    tracemalloc.start()
    try:
        found = stream(tmp_path / "spool", source)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    assert members_in(found) == wanted
    assert (tmp_path / "spool" / "part-00.spool").stat().st_size == (24 << 20) + sum(map(len, wanted.values()))


# --- taking it up again ---


def test_a_complete_spool_needs_no_source(archive: bytes, tmp_path: Path) -> None:
    source = gzipped(tmp_path / "a.tar.gz", archive)
    first = stream(tmp_path / "spool", source)
    source.unlink()
    assert stream(tmp_path / "spool", source, report=lambda source, done, total: pytest.fail("it was read")) == first


@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_spools_are_completed(
    archive: bytes, wanted: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever a kill or a failing machine leaves of the two files, the next run makes them whole."""
    folder = tmp_path_factory.mktemp("cut")
    source = gzipped(folder / "a.tar.gz", archive)
    spool = folder / "spool"
    stream(spool, source)
    whole = {path: path.read_bytes() for path in spool.iterdir()}
    for path, content in whole.items():
        if data.draw(st.booleans()):
            kept = data.draw(st.integers(0, len(content)) | st.just(len(content)))
            path.write_bytes(content[:kept] + data.draw(st.binary(max_size=200)))
    assert members_in(stream(spool, source)) == wanted
    assert {path: path.read_bytes() for path in spool.iterdir()} == whole


@settings(derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_journal_with_another_byte_is_believed_up_to_there(
    archive: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    source = gzipped(folder / "a.tar.gz", archive)
    stream(folder / "spool", source)
    whole = journal_of(folder / "spool").read_bytes()
    flipped = bytearray(whole)
    flipped[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    journal_of(folder / "spool").write_bytes(flipped)
    stream(folder / "spool", source)
    assert journal_of(folder / "spool").read_bytes() == whole


def test_bytes_that_never_reached_the_disk_are_fetched_again(archive: bytes, tmp_path: Path) -> None:
    """A machine that fails may keep a journal's line and lose the bytes that it speaks of."""
    source, spool = gzipped(tmp_path / "a.tar.gz", archive), tmp_path / "spool"
    stream(spool, source)
    whole = (spool / "part-00.spool").read_bytes()
    journal = journal_of(spool).read_bytes()
    journal_of(spool).write_bytes(journal[: journal.rindex(b"\n", 0, -1) + 1])  # all but "complete"
    (spool / "part-00.spool").write_bytes(whole[:5000] + bytes(1000) + whole[6000:])
    stream(spool, source)
    assert (spool / "part-00.spool").read_bytes() == whole
    assert journal_of(spool).read_bytes() == journal


CHILD = """
import sys
from pathlib import Path
from shards.sources.stream import list_stream
list_stream([sys.argv[1]], Path(sys.argv[2]), lambda source, done, total: None)
"""


def kill_when_noted(server: ArchiveServer, spool: Path, members: int) -> list[list]:
    """Kills a run whose server holds, once its journal has some members. Returns all that it has then."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, server.url(), str(spool)], cwd=ROOT)
    try:
        while not journal_of(spool).exists() or journal_of(spool).read_bytes().count(b"\n") < 1 + members:
            assert child.poll() is None
            time.sleep(0.005)
    finally:
        child.kill()
        assert child.wait() == -signal.SIGKILL
    server.hold_at = None
    return [json.loads(line.split(b" ", 1)[1]) for line in journal_of(spool).read_bytes().splitlines()[1:]]


@pytest.mark.parametrize("kind", ["ranges", "no ranges", "gzip"])
@pytest.mark.parametrize("place", ["in a member", "in a header"])
def test_killed_and_continued(
    server: ArchiveServer, files: Files, archive: bytes, wanted: dict[str, bytes], tmp_path: Path, kind: str, place: str
) -> None:
    """The server holds within the eleventh member, or in the header before it."""
    header = archive.index(list(wanted)[10].encode())
    server.hold_at = header + {"in a member": 512 + 700, "in a header": 100}[place]
    server.serves_ranges = kind != "no ranges"
    if kind == "gzip":
        server.body = gzip.compress(archive, 0)  # so that nothing moves far
    noted = kill_when_noted(server, tmp_path / "spool", 9)
    assert [entry[0] for entry in noted] in (list(wanted)[:9], list(wanted)[:10])
    inode = (tmp_path / "spool" / "part-00.spool").stat().st_ino
    assert members_in(stream(tmp_path / "spool", server.url())) == wanted
    assert (tmp_path / "spool" / "part-00.spool").stat().st_ino == inode
    assert server.asked == [0, 0 if kind == "gzip" else noted[-1][-1]]


def test_two_runs_at_once(server: ArchiveServer, tmp_path: Path) -> None:
    server.hold_at = len(server.body) // 2
    child = subprocess.Popen([sys.executable, "-c", CHILD, server.url(), str(tmp_path / "spool")], cwd=ROOT)
    try:
        while not journal_of(tmp_path / "spool").exists() or not journal_of(tmp_path / "spool").stat().st_size:
            assert child.poll() is None
            time.sleep(0.005)
        assert "another run is filling it" in refused(tmp_path / "spool", server.url())
    finally:
        child.kill()
        child.wait()


# --- the source changed ---


def half_done(server: ArchiveServer, spool: Path) -> None:
    """Reads half of the server's body into a spool."""
    server.cuts = [len(server.body) // 2] * QUICK.limit
    assert "tried 3 times (the last: the connection was cut)" in refused(spool, server.url())
    assert journal_of(spool).read_bytes().count(b"\n") > 3


@pytest.mark.parametrize("what", ["ETag", "size", "shorter"])
def test_a_url_that_changed(server: ArchiveServer, tmp_path: Path, what: str) -> None:
    half_done(server, tmp_path / "spool")
    if what == "ETag":
        server.etag = '"two"'
    server.body = {"ETag": server.body, "size": server.body + bytes(512), "shorter": server.body[:2048]}[what]
    line = refused(tmp_path / "spool", server.url())
    assert f"so it is not what {tmp_path / 'spool'} was begun with; remove that folder" in line
    assert {"ETag": "its ETag was", "size": "its size was", "shorter": "it has no byte"}[what] in line


@pytest.mark.parametrize("what", ["time", "size", "name"])
def test_a_file_that_changed(files: Files, archive: bytes, tmp_path: Path, what: str) -> None:
    spool = tmp_path / "spool"
    source = gzipped(tmp_path / "a.tar.gz", archive)
    os.truncate(source, source.stat().st_size // 2)
    assert "so it was cut" in refused(spool, source)
    if what == "time":
        os.utime(source, ns=(1, 1))
    elif what == "size":
        gzipped(source, archive)
    else:
        source = source.rename(tmp_path / "b.tar.gz")
    line = refused(spool, source)
    assert f"its {what}" in line
    assert "remove that folder" in line


def test_a_url_that_changes_while_it_is_read(server: ArchiveServer, tmp_path: Path) -> None:
    server.cuts = [len(server.body) // 2]

    def change(source: str, done: int, total: int) -> None:
        server.etag = '"two"'

    with pytest.raises(UserError, match='its ETag was "one" and is "two" now'):
        stream(tmp_path / "spool", server.url(), report=change)


@pytest.mark.parametrize("what", ["bytes", "name", "end"])
def test_a_file_that_changed_and_hides_it(files: Files, tmp_path: Path, what: str) -> None:
    """Same name, size and time, and other members than those in the spool: a mix would go unnoticed."""
    spool, source = tmp_path / "spool", tmp_path / "a.tar.gz"
    name, content = files[0]

    def write(files: Files) -> None:
        source.write_bytes(gzip.compress(archive_of(files), 0, mtime=0))
        os.utime(source, ns=(1, 1))

    write(files)
    stream(spool, source)
    journal = journal_of(spool).read_bytes()
    journal_of(spool).write_bytes(journal[: journal.rindex(b"\n", 0, -1) + 1])  # all but "complete"
    unread = [(each.replace(".png", ".pnx"), data) for each, data in files[-3:]]
    changed, message = {
        "bytes": ([(name, content[::-1]), *files[1:]], f"it has {name} where it had {name}, or other bytes in it"),
        "name": ([("x" + name[1:], content), *files[1:]], f"it has x{name[1:]} where it had {name}, or"),
        "end": ([*files[:-3], *unread], "it has fewer members than it had"),
    }[what]
    write(changed)
    assert message in refused(spool, source)


def test_another_url_is_not_taken_for_a_complete_one(server: ArchiveServer, tmp_path: Path) -> None:
    stream(tmp_path / "spool", server.url("download?id=1"))
    assert "remove that folder" in refused(tmp_path / "spool", server.url("download?id=2"))


# --- the network ---


@pytest.mark.parametrize("kind", ["ranges", "no ranges", "chunks"])
def test_cut_connections_are_taken_up(
    server: ArchiveServer, wanted: dict[str, bytes], tmp_path: Path, kind: str
) -> None:
    server.serves_ranges, server.is_chunked = kind != "no ranges", kind == "chunks"
    cuts = [len(server.body) * part // 10 for part in range(1, 10)]
    server.cuts = list(cuts)
    assert members_in(stream(tmp_path / "spool", server.url())) == wanted
    assert server.asked == [0, *cuts]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_is_cut_at_the_same_byte_again_and_again(
    server: ArchiveServer, tmp_path: Path, ranges: bool
) -> None:
    server.serves_ranges = ranges
    server.cuts = [5000] * 3
    line = refused(tmp_path / "spool", server.url())
    assert "cannot be read at byte 5000, tried 3 times (the last: the connection was cut)" in line
    assert "it goes on where it stopped" in line


def test_a_server_that_never_hangs_up_is_not_waited_for(
    server: ArchiveServer, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    server.hold_at = len(server.body)
    assert members_in(stream(tmp_path / "spool", server.url())) == wanted
    assert server.asked == [0]


def test_a_busy_server(server: ArchiveServer, wanted: dict[str, bytes], tmp_path: Path) -> None:
    server.refusals = [503, 503]
    assert members_in(stream(tmp_path / "spool", server.url())) == wanted
    server.refusals = [503, 429, 500]
    line = refused(tmp_path / "other", server.url())
    assert "tried 3 times (the last: HTTP 500 Internal Server Error)" in line


@pytest.mark.parametrize("status", [404, 403])
def test_refusals_that_will_not_pass(server: ArchiveServer, tmp_path: Path, status: int) -> None:
    server.refusals = [status]
    line = refused(tmp_path / "spool", server.url("a.tar?token=secret"))
    assert line.startswith(f"{server.url('a.tar')}: HTTP {status}")
    assert "secret" not in line
    assert server.asked == [0]


def test_a_silent_server(server: ArchiveServer, tmp_path: Path) -> None:
    server.hold_at = 5000
    with pytest.raises(UserError, match=r"at byte 5000, tried 2 times \(the last: timed out\)"):
        list_stream(
            [server.url()], tmp_path / "spool", lambda source, done, total: None, Retries(2, 0.001, timeout_s=0.1)
        )


def test_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with archive_server(b"") as gone:
        url = gone.url()
    assert "Connection refused" in refused(tmp_path / "spool", url)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:port/a.tar", "http://127.0.0.1/a b.tar", "http://[/a.tar", "http://me:pass@host/a"]
)  # fmt: skip
def test_no_address(tmp_path: Path, url: str) -> None:
    line = refused(tmp_path / "spool", url)
    assert f"{url.replace('me:pass@', '')}: no address that can be opened" in line
    assert "pass" not in line


# --- faults of archives, and of the disk ---


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda files: archive_of([("../a.png", b"x"), *files]), "'../a.png' at offset 0 leads out"),
        (lambda files: archive_of([("/a.png", b"x"), *files]), "'/a.png' at offset 0 leads out"),
        (lambda files: archive_of(files, more=[link("x", "/etc/passwd")]), "is a link"),
        (lambda files: archive_of([*files, files[0]]), "is the same member as at offset 0;"),
        (lambda files: archive_of(files)[:20_000], "ends at offset 20000"),
        (lambda files: archive_of([("readme", b"x")]), "no CLEVRTEX*.json inside"),
        (lambda files: b"<html>please log in</html>".ljust(600), "it is no tar"),
        (lambda files: b"", "it ends at offset 0"),
    ],
    ids=["up", "absolute", "link", "twice", "cut", "no scene", "page", "empty"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["gzip", "http"])
def test_faults_of_archives(
    server: ArchiveServer, files: Files, tmp_path: Path, spoil: Callable[[Files], bytes], message: str, kind: str
) -> None:
    server.body = spoil(files)
    source = gzipped(tmp_path / "a.tar.gz", server.body) if kind == "gzip" else server.url()
    line = refused(tmp_path / "spool", source)
    assert line.startswith(f"{source}: ")
    assert message in line
    assert refused(tmp_path / "spool", source) == line


def test_a_member_in_two_parts(files: Files, archive: bytes, tmp_path: Path) -> None:
    first = gzipped(tmp_path / "a.tar.gz", archive)
    second = gzipped(tmp_path / "b.tar.gz", archive_of([("readme", b"x"), files[0]]))
    line = refused(tmp_path / "spool", first, second)
    assert f"{second}: {files[0][0]} at offset 1024 is the same member as at offset 0 of {first};" in line


@pytest.mark.parametrize(("name", "limit"), [("CLEVRTEX_x.json", JSON_LIMIT), ("a/x.png", PICTURE_LIMIT)])
def test_too_large_is_refused_unread(server: ArchiveServer, tmp_path: Path, name: str, limit: int) -> None:
    header = archive_of([(name, b"")])[:512]
    field = bytearray(header)
    field[124:136] = b"%011o\0" % (limit + 1)
    field[148:156] = b"        "
    field[148:156] = b"%06o\0 " % sum(field)
    server.body = bytes(field)  # nothing behind it: who read on would call it cut
    assert f"{name} at offset 0 has {limit + 1} bytes, more than any" in refused(tmp_path / "spool", server.url())
    assert not (tmp_path / "spool").exists()


@pytest.mark.parametrize("fault", ["cut", "flipped", "checksum", "rubbish behind it"])
def test_damaged_gzip(archive: bytes, tmp_path: Path, fault: str) -> None:
    data = bytearray(gzip.compress(archive, 6))
    if fault == "cut":
        del data[-1:]
    elif fault == "flipped":
        data[len(data) // 2] ^= 0xFF
    elif fault == "checksum":
        data[-6] ^= 1
    else:
        data += b"rubbish"
    source = tmp_path / "a.tar.gz"
    source.write_bytes(data)
    line = refused(tmp_path / "spool", source)
    assert "the gzip ends at byte" in line if fault == "cut" else "damaged" in line
    assert refused(tmp_path / "spool", source) == line  # it is never taken for complete


def test_missing_file(tmp_path: Path) -> None:
    assert "a.tar.gz: cannot be read (No such file or directory)" in refused(tmp_path / "spool", tmp_path / "a.tar.gz")


def test_a_spool_that_cannot_be_written(archive: bytes, tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file")
    line = refused(tmp_path / "spool", gzipped(tmp_path / "a.tar.gz", archive))
    assert f"{tmp_path / 'spool'}: cannot be written (File exists)" in line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield path
    subprocess.run(["umount", path], check=True)


def test_full_disk(
    server: ArchiveServer, files: Files, wanted: dict[str, bytes], tmp_path: Path, small_disk: Path
) -> None:
    large = [(f"clevrtexv2_full/large{number}.png", bytes(200_000)) for number in range(8)]
    server.body = archive_of([*files, *large])
    spool = small_disk / "spool"
    line = refused(spool, server.url())
    assert line.startswith(f"{spool}: the disk is full; mend that and run the same command again")
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert members_in(stream(spool, server.url())) == wanted
    assert server.asked[1] > len(archive_of(files)) // 2


def test_a_file_that_is_replaced_after_its_spool_was_complete(archive: bytes, tmp_path: Path) -> None:
    source = gzipped(tmp_path / "a.tar.gz", archive)
    stream(tmp_path / "spool", source)
    gzipped(tmp_path / "a.tar.gz", archive + bytes(10240))
    assert "remove that folder to start anew" in refused(tmp_path / "spool", source)
