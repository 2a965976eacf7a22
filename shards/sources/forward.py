"""A stream over pieces that come front to back: exact reads, a position, and gzip unpacked, in bounded memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import chain

from shards.reading.storage import PIECE_BYTES
from shards.tar import Damage

_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_FORMAT = 31  # zlib's number for gzip's header and checksum


class Forward:
    """What a walk over an archive needs of a file, over pieces of which the first begins at offset `at`."""

    def __init__(self, pieces: Iterator[bytes], at: int) -> None:
        self._pieces, self._at = pieces, at
        self._piece, self._used = b"", 0

    def tell(self) -> int:
        """The offset of the next byte."""
        return self._at

    def read(self, size: int, /) -> bytes:
        """The next bytes, fewer only at the end."""
        return b"".join(self.pieces(size))

    def skip(self, size: int) -> None:
        """Passes over bytes, or over all there are."""
        for _ in self.pieces(size):
            pass

    def pieces(self, size: int) -> Iterator[bytes]:
        """The next bytes as they come, in pieces of at most 1 MiB."""
        while size > 0:
            if self._used == len(self._piece):
                self._piece, self._used = next(self._pieces, b""), 0
                if not self._piece:
                    return
            piece = self._piece[self._used : self._used + size]
            self._used += len(piece)
            self._at += len(piece)
            size -= len(piece)
            yield piece


def unpack(pieces: Iterator[bytes]) -> tuple[Iterator[bytes], bool]:
    """The same pieces, or what they unpack to where they are a gzip, and which of the two."""
    first = b""
    while len(first) < len(_GZIP_MAGIC) and (piece := next(pieces, b"")):
        first += piece
    pieces = chain([first], pieces)
    return (_gunzip(pieces), True) if first.startswith(_GZIP_MAGIC) else (pieces, False)


def _gunzip(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """What a gzip of one or more members holds. Raises Damage where it is cut or a checksum does not fit."""
    unpacker = zlib.decompressobj(_GZIP_FORMAT)
    read = 0
    for rest in pieces:
        read += len(rest)
        while rest:  # what is left in the unpacker comes with the next piece, as a checksum is still to follow
            if unpacker.eof:
                rest = rest.lstrip(b"\0")  # what fills up a tape's last record
                if not rest:
                    break
                unpacker = zlib.decompressobj(_GZIP_FORMAT)
            try:
                data = unpacker.decompress(rest, PIECE_BYTES)
            except zlib.error as error:
                raise Damage(f"the gzip is damaged before its byte {read} ({error})") from None
            rest = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
            if data:
                yield data
    if not unpacker.eof:
        raise Damage(f"the gzip ends at byte {read} in the middle, so it was cut")
