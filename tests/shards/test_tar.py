"""Tars a block at a time: read as `tarfile` reads them, and no damage loses a member in silence."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shards import tar
from tests.shards.archives import archive_of, link

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
SHORT = [("a/one.json", b"{}"), ("a/two.png", bytes(range(256)) * 5), ("b/empty.png", b"")]
LONG = [
    ("./c/three.png", b"x" * 512),
    ("p" * 60 + "/" + "q" * 90 + ".png", b"y" * 513),  # more than 100 bytes: ustar splits it at the slash
]
LONGER = [("d/" * 100 + "n" * 200 + ".json", b"z"), ("größe/Ü" + "é" * 120 + ".png", b"w" * 1024), ("last", b"end")]


def listing(data: bytes) -> list[tar.Member]:
    stream = io.BytesIO(data)

    def skip(count: int) -> None:
        stream.seek(count, io.SEEK_CUR)

    return list(tar.walk(stream, skip))


def as_tarfile_reads(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [(info.name, info.offset_data, info.size) for info in archive]


def headers_of(data: bytes) -> list[int]:
    """Where the headers lie that have a checksum, and the two empty blocks."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        headers = [info.offset for info in archive]
        return [*headers, archive.offset, archive.offset + tar.BLOCK]


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=25).filter(
    lambda name: not name.endswith("/")  # that is how very old archives name a folder
)


@settings(derandomize=True, deadline=None)
@given(name=names, size=st.integers(0, 8**11 - 1))
@example(name="x" * 100, size=0)
@example(name="KEY.mask.png", size=8**11 - 1)
def test_headers_are_what_tarfile_reads_back(name: str, size: int) -> None:
    info = tarfile.TarInfo.frombuf(tar.header(name, size), "utf-8", "strict")
    assert (info.name, info.size, info.type, info.mtime, info.mode) == (name, size, tarfile.REGTYPE, 0, 0o444)


def test_archives_of_our_headers_are_read_by_tarfile_and_by_the_walk() -> None:
    data = b"".join(tar.header(name, len(c)) + c + bytes(tar.padding(len(c))) for name, c in SHORT) + tar.END
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert [(info.name, archive.extractfile(info).read()) for info in archive] == SHORT  # type: ignore[union-attr]
    assert [member[:3] for member in listing(data)] == as_tarfile_reads(data)


@pytest.mark.parametrize(("name", "size"), [("x" * 101, 0), ("é" * 51, 0), ("x", 8**11)])
def test_what_does_not_fit_a_header_is_refused(name: str, size: int) -> None:
    with pytest.raises(tar.Damage, match="does not fit"):
        tar.header(name, size)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_walk_reads_what_tarfile_writes(format: int) -> None:
    files = [*SHORT, *LONG, *(() if format == tarfile.USTAR_FORMAT else LONGER)]
    data = archive_of(files, format)
    found = listing(data)
    assert [member[:3] for member in found] == as_tarfile_reads(data)
    assert [(member.name, data[member.offset : member.offset + member.size]) for member in found] == files
    assert {member.kind for member in found} == {"file"}


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_kinds_and_members_that_have_no_bytes(format: int) -> None:
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    device = tarfile.TarInfo("device")
    device.type = tarfile.CHRTYPE
    more = [folder, device, link("soft", "/etc/passwd"), link("hard", "a/one.json", tarfile.LNKTYPE)]
    found = listing(archive_of(SHORT, format, more))
    assert [member.kind for member in found] == ["file"] * 3 + ["other", "other", "link", "link"]


def patched(data: bytes, at: int, field: bytes) -> bytes:
    """A header with another field, and the checksum to go with it."""
    block = bytearray(data[: tar.BLOCK])
    block[at : at + len(field)] = field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data[tar.BLOCK :]


def test_a_folder_has_no_bytes_even_where_its_header_reserves_some() -> None:
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    data = patched(folder.tobuf(tarfile.USTAR_FORMAT), 124, b"%011o\0" % 4096) + archive_of(SHORT)
    assert [member.name for member in listing(data)] == ["folder", *(name for name, _ in SHORT)]


def test_sparse_files_are_no_plain_files() -> None:
    """Their bytes in an archive are not those of the file."""
    info = tarfile.TarInfo("a.png")
    info.type = tarfile.GNUTYPE_SPARSE
    assert listing(info.tobuf(tarfile.GNU_FORMAT) + tar.END)[0].kind == "other"
    info = tarfile.TarInfo("a.png")
    info.pax_headers = {"GNU.sparse.major": "1"}
    assert listing(info.tobuf(tarfile.PAX_FORMAT) + tar.END)[0].kind == "other"


def test_a_size_below_zero_does_not_walk_in_circles() -> None:
    data = patched(archive_of(SHORT, tarfile.USTAR_FORMAT), 124, b"\xff" * 12)
    with pytest.raises(tar.Damage, match=r"offset 0 is damaged \(a size of -1\)"):
        listing(data)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_every_cut_is_noticed(format: int) -> None:
    data = archive_of([*SHORT, LONG[1]], format)
    whole, end = listing(data), headers_of(data)[-2]
    for cut in range(len(data)):
        if cut < end + tar.BLOCK:  # the first empty block says that there are no more members
            with pytest.raises(tar.Damage, match="it ends at offset"):
                listing(data[:cut])
        else:
            assert listing(data[:cut]) == whole


def same_or_damage(data: bytes, whole: list[tar.Member]) -> bool:
    """Whether a damaged archive reads as before; False where the damage is noticed."""
    try:
        assert listing(data) == whole
    except tar.Damage:
        return False
    return True


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_every_flipped_byte_of_a_header_is_noticed_or_of_no_matter(format: int) -> None:
    data = archive_of(SHORT, format)
    whole = listing(data)
    headers = headers_of(data)
    assert len(headers) == len(SHORT) + 2

    @settings(derandomize=True, deadline=None, max_examples=400)
    @given(header=st.sampled_from(headers), place=st.integers(0, tar.BLOCK - 1), change=st.integers(1, 255))
    def check(header: int, place: int, change: int) -> None:
        mutated = bytearray(data)
        mutated[header + place] ^= change
        is_same = same_or_damage(bytes(mutated), whole)
        assert not is_same or 148 <= place < 156  # the checksum can be written in several ways

    check()


@settings(derandomize=True, deadline=None, max_examples=400)
@given(data=st.data())
def test_any_damage_of_an_extended_header_is_damage_or_another_name(data: st.DataObject) -> None:
    """Names of more than 100 bytes have no checksum: sizes, places and the number of members must still hold."""
    archive = archive_of(LONGER, tarfile.PAX_FORMAT)
    at = data.draw(st.integers(0, 3 * tar.BLOCK - 1))
    change = data.draw(st.binary(min_size=1, max_size=3))
    try:
        found = listing(archive[:at] + change + archive[at + len(change) :])
    except tar.Damage:
        return
    assert [member[1:] for member in found] == [member[1:] for member in listing(archive)]


@pytest.mark.parametrize(
    "text", [b"11 path=ab", b"8 path=a\n", b"x path=a\n", b"12 size=-12\n", b"9" * 5000, b"7 path\n"]
)
def test_damaged_extended_headers(text: bytes) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(text)
    data = info.tobuf(tarfile.USTAR_FORMAT) + text + bytes(tar.padding(len(text))) + archive_of(SHORT)
    with pytest.raises(tar.Damage, match="the extended header at offset 0 is damaged"):
        listing(data)


def erase_header(data: bytes) -> bytes:
    at = headers_of(data)[1]
    return data[:at] + bytes(tar.BLOCK) + data[at + tar.BLOCK :]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (erase_header, "the header at offset 1024 is empty, but more follows"),
        (lambda data: data + data, "is empty, but more follows"),
        (lambda data: data[:1024] + bytes(32 << 20), "nothing but zeros from offset 1024 on"),
        (lambda data: b"<html>".ljust(2048), "it is no tar, or its first header is damaged"),
        (lambda data: b"", "it ends at offset 0 without an end mark"),
    ],
    ids=["erased", "joined", "preallocated", "page", "empty"],
)
def test_other_damage(spoil: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(tar.Damage, match=message):
        listing(spoil(archive_of(SHORT, tarfile.USTAR_FORMAT)))


def test_a_lone_empty_block_at_the_end_is_enough() -> None:
    data = archive_of(SHORT, tarfile.USTAR_FORMAT)
    assert listing(data[: headers_of(data)[-1]]) == listing(data)
