"""The index beside a tar: where each member of each sample lies, and its checksum.

One .npy file of fixed-size records, sorted as the samples lie in the tar, so that it can be memory-mapped and
a sample found without reading anything else. Checksums are xxh3-64 of the member's bytes.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import xxhash

from nsi.errors import UserError

MEMBERS = ("image", "mask", "json")  # the members of a sample, as the index names them
MASK_SUFFIX = "mask.png"
JSON_SUFFIX = "json"
IMAGE_SUFFIXES = ("png", "jpg", "webp")

_MEMBER = np.dtype([("offset", "<u8"), ("size", "<u8"), ("xxh3", "<u8")])


def index_path(tar: Path) -> Path:
    """`x.tar` has its index in `x.index.npy`."""
    return tar.with_suffix(".index.npy")


def build_index(tar: Path) -> np.ndarray:
    """Reads a finished tar front to back and returns its index.

    Raises UserError where the tar is damaged or a sample is not complete.
    """
    samples: dict[str, dict[str, tuple[int, int, int]]] = {}
    try:
        with tarfile.open(tar, "r:") as archive, tar.open("rb") as raw:
            for info in archive:
                key, _, suffix = info.name.partition(".")
                raw.seek(info.offset_data)
                checksum = xxhash.xxh3_64_intdigest(raw.read(info.size))
                samples.setdefault(key, {})[member_of(suffix)] = (info.offset_data, info.size, checksum)
    except tarfile.TarError as error:
        raise UserError(f"{tar}: damaged tar ({error}); write it again with `nsi shard`") from None
    width = max((len(key.encode()) for key in samples), default=1)
    records = np.zeros(len(samples), [("key", f"S{width}"), *((member, _MEMBER) for member in MEMBERS)])
    for record, (key, members) in zip(records, samples.items(), strict=True):
        if set(members) != set(MEMBERS):
            raise UserError(f"{tar}: sample {key} has {sorted(members)}, not {list(MEMBERS)}; write the shard again")
        record["key"] = key.encode()
        for member, place in members.items():
            record[member] = place
    return records


def member_of(suffix: str) -> str:
    """The member's name for what follows the key in a tar's file name ("mask.png" is the mask, "jpg" the image)."""
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return {MASK_SUFFIX: "mask", JSON_SUFFIX: "json"}.get(suffix, suffix)


def write_index(path: Path, records: np.ndarray) -> None:
    """Writes an index to a temporary name, syncs it and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.save(file, records)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def read_index(path: Path) -> np.ndarray:
    """A memory-mapped index. Raises UserError where it is missing or no index."""
    try:
        records = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; restore it, or write the shards again with `nsi shard`") from None
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not an index ({error}); write the shards again with `nsi shard`") from None
    if records.dtype.names != ("key", *MEMBERS):
        raise UserError(f"{path}: not an index of this program; write the shards again with `nsi shard`")
    return records
