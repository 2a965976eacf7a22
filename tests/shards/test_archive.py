"""Scenes in an archive on this disk: the same scenes as in a folder, read in place, and one line for each fault."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsi.errors import UserError
from shards.sources.archive import is_archive, list_archives
from shards.sources.folder import list_folder
from shards.sources.listing import Folder
from shards.sources.scene import JSON_LIMIT, PICTURE_LIMIT
from tests.shards.archives import ROOT, Files, archive_of, bytes_in, files_of, link, scenes_in

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.fixture(scope="session")
def files(scenes: Path) -> Files:
    """Eight scenes."""
    return files_of(scenes, 8)


def listed(tmp_path: Path, data: bytes) -> list[Folder]:
    path = tmp_path / "clevrtex.tar"
    path.write_bytes(data)
    return list_archives([path])


def refused(tmp_path: Path, data: bytes) -> str:
    """The line that an archive is refused with."""
    with pytest.raises(UserError) as caught:
        listed(tmp_path, data)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(tmp_path / "clevrtex.tar: "))
    return line


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_an_archive_has_the_scenes_of_its_folder(scenes: Path, tmp_path: Path, format: int) -> None:
    archive = tmp_path / "clevrtex.tar"
    with tarfile.open(archive, "w", format=format) as file:
        file.add(scenes / ROOT, ROOT)
    found = list_archives([archive])
    assert [folder.name for folder in found] == [
        folder.name.replace(str(scenes), str(archive)) for folder in list_folder(scenes)
    ]
    assert scenes_in(found) == scenes_in(list_folder(scenes))
    assert len(scenes_in(found)) == 60


@settings(derandomize=True, deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_order_of_members_is_of_no_matter(files: Files, tmp_path: Path, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(files))
    assert bytes_in(listed(tmp_path, archive_of(shuffled))) == bytes_in(listed(tmp_path, archive_of(files)))


def test_names_with_a_dot_and_very_long_ones(files: Files, tmp_path: Path) -> None:
    folders = listed(tmp_path, archive_of(files))
    plain = scenes_in(folders)
    assert listed(tmp_path, archive_of([(f"./{name}", content) for name, content in files])) == folders
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        deep = [("very_long_name/" * 20 + name, content) for name, content in files]
        assert scenes_in(listed(tmp_path, archive_of(deep, format))) == plain


def test_passes_are_not_listed_and_folders_without_scenes_neither(files: Files, tmp_path: Path) -> None:
    found = listed(tmp_path, archive_of([*files, ("readme/figure.png", b"x"), ("readme/CLEVRTEX.txt", b"x")]))
    assert len(found) == 8
    assert all(len(folder.members) == 3 for folder in found)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts what a process reads")
def test_the_bytes_of_members_are_not_read(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "clevrtex.tar"
    path.write_bytes(archive_of([*files, ("depth.exr", bytes(64 << 20))]))

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    list_archives([path])
    assert bytes_read() - before < 1 << 20


def test_a_v1_folder_holds_many_scenes(files: Files, tmp_path: Path) -> None:
    flat = [
        (f"clevrtex_full/0/{name.rpartition('/')[2].replace('_0003.png', '.png')}", content) for name, content in files
    ]
    (folder,) = listed(tmp_path, archive_of(flat))
    assert folder.name.endswith("clevrtex.tar/clevrtex_full/0")
    assert len(scenes_in([folder])) == 8


@pytest.mark.parametrize("part", ["header", "data", "padding", "edge", "end mark"])
def test_cut(files: Files, tmp_path: Path, part: str) -> None:
    data = archive_of(files, tarfile.USTAR_FORMAT)
    path = tmp_path / "whole.tar"
    path.write_bytes(data)
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
        end = archive.offset
    cut = {
        "header": last.offset + 100,
        "data": last.offset_data + 100,
        "padding": last.offset_data + last.size + 100,
        "edge": last.offset,
        "end mark": end,
    }[part]
    line = refused(tmp_path, data[:cut])
    assert f"it ends at offset {cut} " in line
    assert f"in the middle of {last.name}, so" in line if part == "data" else "without an end mark" in line


def test_damaged_header(files: Files, tmp_path: Path) -> None:
    data = bytearray(archive_of(files, tarfile.USTAR_FORMAT))
    offset = listed(tmp_path, bytes(data))[3].members[f"{files[16][0].split('/')[2]}.json"].offset - 512
    data[offset + 3] ^= 1
    assert f"the header at offset {offset} is damaged (bad checksum)" in refused(tmp_path, bytes(data))


@pytest.mark.parametrize(
    "name",
    ["/etc/CLEVRTEX.json", "../a.png", "a/../../b", "a\\b.png", "a/..", "a\nb.txt", ".."],
)
def test_names_that_lead_out(files: Files, tmp_path: Path, name: str) -> None:
    line = refused(tmp_path, archive_of([(name, b"x"), *files]))
    assert f"the name {name!r} at offset 0 leads out of the archive's folder" in line


def test_a_name_with_a_zero_byte(files: Files, tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.pax_headers = {"path": "a\0b.png"}
    line = refused(tmp_path, info.tobuf(tarfile.PAX_FORMAT) + archive_of(files))
    assert "the name 'a\\x00b.png' at offset 1024 leads out" in line


@pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE], ids=["symbolic", "hard"])
@pytest.mark.parametrize("name", ["CLEVRTEX_x.json", "a/deep/readme"])
def test_links(files: Files, tmp_path: Path, name: str, type: bytes) -> None:
    data = archive_of(files, more=[link(name, files[0][0], type)])
    assert f"{name} at offset " in (line := refused(tmp_path, data))
    assert " is a link" in line


@pytest.mark.parametrize("twin", ["", "./", ".//"])
def test_a_member_twice(files: Files, tmp_path: Path, twin: str) -> None:
    first = archive_of(files, tarfile.USTAR_FORMAT)
    offset = listed(tmp_path, first)[0].members[files[0][0].rpartition("/")[2]].offset - 512
    data = archive_of([*files, (twin + files[0][0], b"again")], tarfile.USTAR_FORMAT)
    second = max(place for place in range(0, len(data), 512) if data[place:].startswith((twin + files[0][0]).encode()))
    line = refused(tmp_path, data)
    assert f"{files[0][0]} at offset {second} is the same member as at offset {offset};" in line


def test_what_is_no_plain_file(files: Files, tmp_path: Path) -> None:
    info = tarfile.TarInfo("CLEVRTEX_pipe.json")
    info.type = tarfile.FIFOTYPE
    assert "CLEVRTEX_pipe.json at offset 0 is no plain file" in refused(tmp_path, info.tobuf() + archive_of(files))


@pytest.mark.parametrize(("name", "limit"), [("CLEVRTEX_x.json", JSON_LIMIT), ("a/x.png", PICTURE_LIMIT)])
def test_too_large(tmp_path: Path, name: str, limit: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = limit + 1
    path = tmp_path / "clevrtex.tar"
    path.write_bytes(info.tobuf())
    with path.open("r+b") as file:
        file.truncate(512 + limit + 512 + 1024)
    with pytest.raises(UserError, match=rf"{name} at offset 0 has {limit + 1} bytes, more than any"):
        list_archives([path])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(archive_of([("a.png", b"x")])), "holds no CLEVRTEX"),
        (lambda path: path.write_bytes(b"PK\3\4".ljust(4096, b"z")), "it is no tar, or its first header is damaged"),
        (lambda path: path.write_bytes(b""), "it ends at offset 0 without an end mark, so it was cut"),
        (lambda path: path.mkdir(), r"cannot be read \(Is a directory\)"),
        (lambda path: None, r"cannot be read \(No such file or directory\)"),
    ],
    ids=["no scene", "no tar", "empty", "folder", "missing"],
)
def test_other_sources(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "clevrtex.tar"
    make(path)
    with pytest.raises(UserError, match=f"clevrtex.tar: {message}"):
        list_archives([path])


def test_is_archive() -> None:
    assert is_archive(Path("x/clevrtexv2_full.tar"))
    assert not is_archive(Path("x/clevrtexv2_full.tar.gz"))
    assert not is_archive(Path("x/clevrtexv2_full"))
