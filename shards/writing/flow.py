"""A tar on its way to the disk, through one buffer: members are read into it where they will lie, and leave it in
large pieces.

So a picture is moved twice, out of the page cache and into it, and no memory is asked for on its way. The buffer stays
in a core's cache while it is filled, hashed and written.
"""

from __future__ import annotations

import ctypes
import os

import xxhash

from shards import tar
from shards.index import MemberPlace

_BUFFER_BYTES = 1 << 20
_AHEAD_BYTES = 8 << 20
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux has it


class TarFlow:
    """The bytes of a tar, written to an open file: members one by one, each by `begin` and `end`, then `finish`."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._used = 0  # bytes of the buffer that are still to be written
        self._written = 0
        self._on_its_way = 0  # so much of the file the disk has been asked to take
        self._size = 0  # of the member that has begun
        self._digest = xxhash.xxh3_128()

    def begin(self, size: int) -> memoryview:
        """Where the bytes of the next member belong. Raises OSError where those before them cannot be written."""
        needed = tar.BLOCK + size + tar.padding(size)
        if self._used + needed > len(self._buffer):
            self._flush()
            if needed > len(self._buffer):
                self._buffer = memoryview(bytearray(needed))
        self._size = size
        at = self._used + tar.BLOCK
        return self._buffer[at : at + size]

    def end(self, name: str) -> MemberPlace:
        """Names the member whose bytes are in place now. Raises tar.Damage for a name that does not fit a tar."""
        size, at = self._size, self._used + tar.BLOCK
        end = at + size
        self._buffer[self._used : at] = tar.header(name, size)
        self._used = end + tar.padding(size)
        self._buffer[end : self._used] = bytes(self._used - end)
        return MemberPlace(self._written + at, size, xxhash.xxh3_64_intdigest(self._buffer[at:end]))

    def finish(self) -> tuple[int, str]:
        """Writes the rest and the end mark. Returns the tar's size and its xxh3-128 (hex)."""
        self._flush()
        self._buffer[: len(tar.END)] = tar.END
        self._used = len(tar.END)
        self._flush()
        return self._written, self._digest.hexdigest()

    def _flush(self) -> None:
        rest = self._buffer[: self._used]
        self._digest.update(rest)
        while rest:  # a disk that is nearly full takes a piece before it says so
            rest = rest[os.write(self._file, rest) :]
        self._written += self._used
        self._used = 0
        if _sync_file_range and self._written - self._on_its_way >= _AHEAD_BYTES:
            # The disk begins now, so that little is left when the file is synced. What fails here fails there again.
            count = ctypes.c_int64(self._written - self._on_its_way)
            _sync_file_range(self._file, ctypes.c_int64(self._on_its_way), count, _START_WRITING)
            self._on_its_way = self._written
