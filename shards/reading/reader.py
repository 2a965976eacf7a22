"""Bytes of samples out of shards, wherever these are: mapped where they lie on a disk, asked for by range where not."""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from nsi.errors import UserError
from shards.reading.cache import ShardCache, mark_used
from shards.reading.storage import Storage


class Span(NamedTuple):
    """One sample's bytes, which lie together in a tar, and the tar as the manifest knows it."""

    shard: str
    shard_bytes: int
    xxh3_128: str
    offset: int
    size: int


class SpanReader:
    """Reads the spans of one data set. For one thread; a process that reads with several has a reader for each.

    Shards on a disk are memory-mapped, the `open_shards` used last at most, and spans of them are views without a
    copy: a view stays good when its shard's map has left that number. A remote storage's shards come through the
    cache where there is one; else each span is a request of its own, many at a time.
    """

    def __init__(self, storage: Storage, cache: ShardCache | None, fingerprint: str, open_shards: int = 64) -> None:
        self._storage = storage
        self._cache = cache
        self._fingerprint = fingerprint
        self._open_shards = open_shards
        self._maps: OrderedDict[str, _Map] = OrderedDict()  # by shard, the one used last at the end

    def read(self, spans: Sequence[Span]) -> list[memoryview | bytes]:
        """The bytes of each span, in order. They are not checked against the index's checksums here.

        Raises UserError where a shard is missing or not as long as the manifest says, or cannot be had.
        """
        if self._cache is None and self._storage.is_local:
            return self._slices(spans)
        if self._cache is None:
            return [*self._storage.read_ranges([(span.shard, span.offset, span.size) for span in spans])]
        slices = self._slices(spans)
        for shard, mapped in list(self._maps.items()):
            if not mapped.has_its_name():  # evicted, and it would take its room on the disk until it is let go of
                del self._maps[shard]
        for shard in {span.shard for span in spans} & self._maps.keys():
            with suppress(FileNotFoundError):
                mark_used(self._maps[shard].path)
        return slices

    def read_anew(self, span: Span, damaged: memoryview | bytes) -> memoryview | bytes:
        """A span once more where its bytes were damaged: from another copy of its shard than theirs."""
        mapped = self._maps.get(span.shard)
        # Else another span of the same damaged copy was first, and there is a fresh one already.
        if self._cache and mapped and isinstance(damaged, memoryview) and damaged.obj is mapped.view.obj:
            del self._maps[span.shard]
            with suppress(FileNotFoundError):
                if mapped.has_its_name():  # else another process was first
                    mapped.path.unlink()
        return self.read([span])[0]

    def _slices(self, spans: Sequence[Span]) -> list[memoryview | bytes]:
        maps, slices = self._maps, []
        for span in spans:
            shard, _, _, offset, size = span
            mapped = maps.get(shard)
            if mapped is None:
                mapped = self._open(span)
            else:
                maps.move_to_end(shard)
            data = mapped.view[offset : offset + size]
            if len(data) != size:
                raise UserError(
                    f"{mapped.path}: ends before offset {offset + size}, where its index has a sample end; "
                    "restore shard and index"
                )
            slices.append(data)
        return slices

    def _open(self, span: Span) -> _Map:
        while len(self._maps) >= self._open_shards:
            self._maps.popitem(last=False)  # not closed, since views may be out; the last of them closes it
        mapped = self._map_local(span) if self._cache is None else self._map_cached(span)
        self._maps[span.shard] = mapped
        return mapped

    def _map_local(self, span: Span) -> _Map:
        path = self._storage.path(span.shard)
        try:
            return _map(path, span.shard_bytes)
        except FileNotFoundError:
            raise UserError(f"{path}: missing; restore the shard") from None

    def _map_cached(self, span: Span) -> _Map:
        assert self._cache is not None
        for _ in range(self._storage.retries.limit):
            path = self._cache.get(self._storage, self._fingerprint, span.shard, span.shard_bytes, span.xxh3_128)
            with suppress(FileNotFoundError):  # evicted since
                return _map(path, span.shard_bytes)
        raise UserError(
            f"{self._cache.folder}: a cache of {self._cache.limit_bytes} bytes is too small for the processes that "
            "share it, which evict one another's shards; raise its limit"
        )


class _Map(NamedTuple):
    path: Path
    view: memoryview
    inode: int

    def has_its_name(self) -> bool:
        """Whether what is mapped is still what others find by its path."""
        try:
            return self.path.stat().st_ino == self.inode
        except FileNotFoundError:
            return False


def _map(path: Path, size: int) -> _Map:
    """Maps a file. Raises FileNotFoundError where there is none, and UserError where it is not `size` bytes long."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            inode = os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise UserError(f"{path}: cannot be read ({error}); restore the shard") from None
    if len(mapped) != size:
        raise UserError(f"{path}: has {len(mapped)} bytes, the manifest says {size}; restore the shard")
    return _Map(path, memoryview(mapped), inode)
