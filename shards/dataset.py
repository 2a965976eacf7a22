"""One split of a folder of shards, read by place: sample i is a slice of a memory-mapped tar.

Nothing is read before it is asked for, and every member's checksum is verified when it is.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from nsi.errors import UserError
from shards.index import index_path, read_index
from shards.manifest import Manifest, read_manifest

Decoded = TypeVar("Decoded")


@dataclass(frozen=True)
class Split:
    """The tars of one split, mapped, with their indexes. Sample ids run over the shards in the manifest's order."""

    folder: Path
    name: str
    manifest: Manifest
    tars: tuple[mmap.mmap, ...]
    indexes: tuple[np.ndarray, ...]
    begins: np.ndarray  # (S + 1,) sample id at which each shard begins

    def __len__(self) -> int:
        return int(self.begins[-1])

    @property
    def shard_samples(self) -> tuple[int, ...]:
        """Samples of each shard, as the order wants them."""
        return tuple(shard.samples for shard in self.manifest.splits[self.name])

    def key(self, sample: int) -> str:
        """The key of a sample, from the index."""
        shard, place = self._find(sample)
        return self.indexes[shard][place]["key"].decode()

    def read(self, sample: int, member: str) -> bytes:
        """The bytes of a sample's "image", "mask" or "json".

        Raises UserError with shard, key and offset where they are not the bytes that were written.
        """
        shard, place = self._find(sample)
        record = self.indexes[shard][place]
        offset, size, checksum = (int(value) for value in record[member])
        data = self.tars[shard][offset : offset + size]
        if len(data) != size or xxhash.xxh3_64_intdigest(data) != checksum:
            tar = self.folder / self.manifest.splits[self.name][shard].name
            raise UserError(
                f"{tar}: {member} of {record['key'].decode()} at offset {offset} does not have its checksum; "
                f"run `nsi verify {self.folder}` and restore the shard"
            )
        return data

    def decode(self, sample: int, member: str, decoder: Callable[[bytes], Decoded]) -> Decoded:
        """A member's bytes, decoded. Raises UserError with shard and key where they cannot be."""
        data = self.read(sample, member)
        try:
            return decoder(data)
        except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:  # what Pillow and json raise
            shard, _ = self._find(sample)
            tar = self.folder / self.manifest.splits[self.name][shard].name
            raise UserError(
                f"{tar}: {member} of {self.key(sample)} cannot be decoded ({error}); it was so in the source: "
                "remove that scene there and shard again"
            ) from None

    def _find(self, sample: int) -> tuple[int, int]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        shard = int(np.searchsorted(self.begins, sample, side="right")) - 1
        return shard, sample - int(self.begins[shard])


def open_split(folder: Path, name: str) -> Split:
    """Opens a split: maps its tars and indexes and checks their sizes and counts against the manifest.

    Raises UserError where a file is missing, cut, or does not fit the manifest.
    """
    manifest = read_manifest(folder)
    if name not in manifest.splits:
        raise UserError(f"{folder}: has no split {name!r}; there are {', '.join(sorted(manifest.splits))}")
    tars, indexes, begins = [], [], [0]
    for shard in manifest.splits[name]:
        tar = folder / shard.name
        tars.append(_map(tar, shard.bytes))
        index = read_index(index_path(tar))
        if len(index) != shard.samples:
            raise UserError(
                f"{index_path(tar)}: lists {len(index)} samples, the manifest {shard.samples}; "
                f"run `nsi verify {folder}` and restore the file"
            )
        indexes.append(index)
        begins.append(begins[-1] + shard.samples)
    return Split(folder, name, manifest, tuple(tars), tuple(indexes), np.asarray(begins))


def _map(tar: Path, size: int) -> mmap.mmap:
    try:
        found = tar.stat().st_size
        if found != size:
            raise UserError(f"{tar}: has {found} bytes, the manifest says {size}; restore the shard")
        with tar.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{tar}: cannot be read ({error.strerror}); restore the shard") from None
