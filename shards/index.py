"""The index beside a tar: where each member of each sample lies, and its checksum.

One .npy file of fixed-size records, sorted as the samples lie in the tar, so that it can be memory-mapped and
a sample found without reading anything else. Checksums are xxh3-64 of the member's bytes. A sample without a mask
has a size of 0 there. In a feature store the features made of an image have its place.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from nsi.errors import UserError
from shards import tar
from shards.tokens import TOKENS_SUFFIX

MEMBERS = ("image", "mask", "json")  # the members of a sample, as the index names them
MASK_SUFFIX = "mask.png"
JSON_SUFFIX = "json"
INDEX_SUFFIX = ".index.npy"
IMAGE_SUFFIXES = ("png", "jpg", "webp")

_MEMBER = np.dtype([("offset", "<u8"), ("size", "<u8"), ("xxh3", "<u8")])


class MemberPlace(NamedTuple):
    """Where a member's bytes lie in their tar, and their checksum."""

    offset: int
    size: int
    xxh3: int


_NOWHERE = MemberPlace(0, 0, 0)


def index_path(tar_path: Path) -> Path:
    """`x.tar` has its index in `x.index.npy`."""
    return tar_path.with_suffix(INDEX_SUFFIX)


def make_index(samples: Mapping[str, Mapping[str, MemberPlace]]) -> np.ndarray:
    """The records of a tar's samples: key to member to place, in the tar's order."""
    width = max((len(key.encode()) for key in samples), default=1)
    records = np.zeros(len(samples), [("key", f"S{width}"), *((member, _MEMBER) for member in MEMBERS)])
    records["key"] = [key.encode() for key in samples]
    for member in MEMBERS:
        records[member] = [members.get(member, _NOWHERE) for members in samples.values()]
    return records


def build_index(where: str, data: memoryview) -> np.ndarray:
    """The index of a finished tar, from its bytes; `where` is for messages.

    Raises UserError where the tar is damaged or a sample is not complete.
    """
    samples: dict[str, dict[str, MemberPlace]] = {}
    stream = _Bytes(data)
    try:
        for member in tar.walk(stream, stream.skip):
            key, _, suffix = member.name.partition(".")
            content = data[member.offset : member.offset + member.size]
            if len(content) != member.size:
                raise tar.Damage(f"it ends in the middle of {member.name}, so it was cut")
            place = MemberPlace(member.offset, member.size, xxhash.xxh3_64_intdigest(content))
            if samples.setdefault(key, {}).setdefault(member_of(suffix), place) != place:
                raise tar.Damage(f"{member.name} at offset {member.offset} is there twice")
    except tar.Damage as error:
        raise UserError(f"{where}: damaged tar: {error}; write it again with `nsi shard`") from None
    for key, members in samples.items():
        if set(members) - {"mask"} != set(MEMBERS) - {"mask"}:
            raise UserError(f"{where}: sample {key} has {sorted(members)}, not {list(MEMBERS)}; write the shard again")
    return make_index(samples)


def member_of(suffix: str) -> str:
    """The member's name for what follows the key in a tar's file name ("mask.png" is the mask, "jpg" the image)."""
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return {MASK_SUFFIX: "mask", JSON_SUFFIX: "json", TOKENS_SUFFIX: "image"}.get(suffix, suffix)


def index_bytes(records: np.ndarray) -> bytes:
    """What the index file of some records holds."""
    file = io.BytesIO()
    np.save(file, records)
    return file.getvalue()


def parse_index(data: bytes, path: str) -> np.ndarray:
    """The records of an index file's bytes; `path` is for messages. Raises UserError where they are no index."""
    try:
        records = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not an index ({error}); write the shards again with `nsi shard`") from None
    if records.dtype.names != ("key", *MEMBERS):
        raise UserError(f"{path}: not an index of this program; write the shards again with `nsi shard`")
    return records


class _Bytes:
    """A buffer as the stream of a walk, with nothing copied but the headers."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def read(self, size: int, /) -> bytes:
        data = bytes(self._data[self._at : self._at + size])
        self._at += len(data)
        return data

    def tell(self) -> int:
        return self._at

    def skip(self, size: int) -> None:
        self._at += size
