"""POSIX tars, a block at a time: headers of our own making, and a walk over anybody's that notices every damage.

Reading is strict where `tarfile` ends early and in silence: a damaged header, a cut member, a missing end mark.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

BLOCK = 512
END = bytes(2 * BLOCK)  # two empty blocks end an archive
_NAME_BYTES = 100
_SIZE_LIMIT = 8**11  # what eleven octal digits hold: 8 GiB
_TEXT_LIMIT = 1 << 20  # no path is longer: what says so is damage
_TAIL_LIMIT = 16 << 20  # writers fill up an archive's last record with zeros, 10 KB as a rule
_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
_DECIMAL = re.compile(rb"[0-9]{1,19}")
_TEMPLATE = tarfile.TarInfo("")
_TEMPLATE.mode, _TEMPLATE.uname, _TEMPLATE.gname = 0o444, "nsi", "nsi"


class Damage(ValueError):
    """An archive is not what it should be; the text says where."""


class Member(NamedTuple):
    """One entry: its name, where its bytes begin, how many they are, and whether it is a file, a link or neither."""

    name: str
    offset: int
    size: int
    kind: str


class Stream(Protocol):
    """What a walk needs of a file."""

    def read(self, size: int, /) -> bytes: ...

    def tell(self) -> int: ...


def header(name: str, size: int) -> bytes:
    """The block before a file's bytes. Time, owner and mode are fixed, so the same files give the same archive.

    Raises Damage for a name or a size that the plain format cannot hold.
    """
    encoded = name.encode()
    if len(encoded) > _NAME_BYTES or size >= _SIZE_LIMIT:
        raise Damage(f"{name} ({size} bytes) does not fit a tar: names end at {_NAME_BYTES} bytes, files at 8 GiB")
    # Only name, size and checksum differ from header to header, which is ten times as fast as making each anew.
    digits = b"%011o\0" % size
    checksum = b"%06o\0 " % (_FIXED_SUM + sum(encoded) + sum(digits))
    return b"".join((encoded.ljust(_NAME_BYTES, b"\0"), _BEFORE_SIZE, digits, _TIME, checksum, _AFTER_CHECKSUM))


_BLANK = _TEMPLATE.tobuf(tarfile.USTAR_FORMAT)
_BEFORE_SIZE, _TIME, _AFTER_CHECKSUM = _BLANK[100:124], _BLANK[136:148], _BLANK[156:]
_FIXED_SUM = sum(_BEFORE_SIZE + _TIME + _AFTER_CHECKSUM) + 8 * ord(" ")  # the sum counts its own field as spaces


def padding(size: int) -> int:
    """How many empty bytes follow a file of `size` bytes."""
    return -size % BLOCK


def walk(stream: Stream, skip: Callable[[int], None]) -> Iterator[Member]:
    """Every member of an archive, in its order, from the stream's position on.

    Between two members the caller may read of the member's bytes what it likes; the rest is passed over by `skip`.
    Raises Damage, with the offset, where the archive is cut, a header is broken, or more follows the end mark.
    """
    said: dict[str, str] = {}  # what extended headers said of the member after them
    while True:
        at = stream.tell()
        block = stream.read(BLOCK)
        if block == bytes(BLOCK):
            _check_tail(stream, at)
            return
        if len(block) < BLOCK:
            raise Damage(f"it ends at offset {at + len(block)} without an end mark, so it was cut")
        info = _parse(block, at)
        if info.type in _EXTENDED:
            said.update(_extended(stream, info, at))
            continue
        member = _member(info, at + BLOCK, said)
        yield member
        end = member.offset + member.size + padding(member.size)
        skip(end - stream.tell())
        said = {}


def read_exactly(stream: Stream, size: int, member: str) -> bytes:
    """The next bytes of a member. Raises Damage where the archive ends before them."""
    data = stream.read(size)
    if len(data) != size:
        raise Damage(f"it ends at offset {stream.tell()} in the middle of {member}, so it was cut")
    return data


def _parse(block: bytes, at: int) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        what = f"the header at offset {at} is damaged" if at else "it is no tar, or its first header is damaged"
        raise Damage(f"{what} ({error})") from None
    if info.size < 0:
        raise Damage(f"the header at offset {at} is damaged (a size of {info.size})")
    return info


def _member(info: tarfile.TarInfo, offset: int, said: dict[str, str]) -> Member:
    # Folders and devices have no bytes, whatever the field says: there it is room to reserve.
    has_bytes = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
    size = int(said.get("size", info.size)) if has_bytes else 0
    # A sparse file's bytes here are not those of the file.
    is_sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in said)
    kind = "link" if info.issym() or info.islnk() else "file" if info.isreg() and not is_sparse else "other"
    return Member(said.get("path", info.name), offset, size, kind)


def _check_tail(stream: Stream, at: int) -> None:
    """Zeros alone may follow an archive's first empty block; else it is a hole, and members would be lost."""
    for _ in range(_TAIL_LIMIT // len(END)):
        tail = stream.read(len(END))
        if not tail:
            return
        if tail.strip(b"\0"):
            raise Damage(f"the header at offset {at} is empty, but more follows, so it is damaged or several in one")
    raise Damage(f"it holds nothing but zeros from offset {at} on, so it was not written or fetched to its end")


def _extended(stream: Stream, info: tarfile.TarInfo, at: int) -> dict[str, str]:
    """What a header says of the member after it: its path, its size."""
    if info.size > _TEXT_LIMIT:
        raise Damage(f"the header at offset {at} is damaged (a name of {info.size} bytes)")
    text = read_exactly(stream, info.size, "a long name")
    read_exactly(stream, padding(info.size), "a long name")
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": text.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    return _pax(text, at) if info.type == tarfile.XHDTYPE else {}


def _pax(text: bytes, at: int) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of an extended header."""
    records = {}
    while text.strip(b"\0"):
        digits, _, _ = text.partition(b" ")
        length = int(digits) if _DECIMAL.fullmatch(digits) else 0
        record, text, whole = text[len(digits) + 1 : length], text[length:], length <= len(text)
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if not (whole and record.endswith(b"\n") and equals) or (key == b"size" and not _DECIMAL.fullmatch(value)):
            raise Damage(f"the extended header at offset {at} is damaged")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return records
