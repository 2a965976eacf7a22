"""The members of one source, copied to a file as they come by, with a journal that says which of them are whole.

    part-00.spool     the bytes of the members, one after the other
    part-00.journal   a line for the source, one for each member after its bytes, one when all is there

A line is its own checksum and a JSON value. A run that was killed at any moment leaves whole lines whose bytes are
there, and perhaps half a line and bytes that no line speaks of: these are cut off when the spool is opened again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from nsi.errors import UserError
from shards.reading.storage import PIECE_BYTES

_SYNC_BYTES = 64 << 20  # the most that a failing machine, as opposed to a killed process, makes us fetch again
_COMPLETE = "complete"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Entry(NamedTuple):
    """A member that is in the spool: its bytes there, their xxh3-64, and where in the archive the next one begins."""

    name: str
    offset: int
    size: int
    xxh3: int
    next: int


@dataclass
class Spool:
    """One source's members, open for more of them; `open_spool` makes it."""

    path: Path
    head: Mapping[str, Any] | None  # what is known of the source; None until it was opened for the first time
    entries: list[Entry]
    is_complete: bool
    _data: int
    _journal: int
    _unsynced: int = 0

    @property
    def end(self) -> int:
        """Where the next member's bytes will lie."""
        return self.entries[-1].offset + self.entries[-1].size if self.entries else 0

    def begin(self, head: Mapping[str, Any]) -> None:
        """Notes what is known of the source."""
        self.head = head
        self._note(head)

    def append(self, name: str, pieces: Iterator[bytes], next_header: int) -> None:
        """Copies a member, and notes it when its bytes are there."""
        digest, size = xxhash.xxh3_64(), 0
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            with _writing(self.path.parent):
                _write(self._data, piece)
        entry = Entry(name, self.end, size, digest.intdigest(), next_header)
        self._note(entry)
        self.entries.append(entry)
        self._unsynced += size
        if self._unsynced >= _SYNC_BYTES:
            self._sync()

    def finish(self) -> None:
        """Notes that the source has been read to its end."""
        self._sync()
        self._note(_COMPLETE)
        self._sync()
        self.is_complete = True

    def _note(self, value: object) -> None:
        with _writing(self.path.parent):
            _write(self._journal, _line(value))

    def _sync(self) -> None:
        with _writing(self.path.parent):
            os.fsync(self._data)
            os.fsync(self._journal)
        self._unsynced = 0


@contextmanager
def open_spool(folder: Path, number: int) -> Iterator[Spool]:
    """The spool of source `number` in a folder: a new one, or what an earlier run has left, cut back to what is whole.

    Raises UserError where it cannot be written, now or later, or where another run is writing it.
    """
    path = folder / f"part-{number:02d}.spool"
    with ExitStack() as files:
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            journal = _open(path.with_suffix(".journal"), files)
            data = _open(path, files)
            _lock(journal, folder)
            spool, kept = _read(path, data, journal)
            os.ftruncate(journal, kept)
            os.ftruncate(data, spool.end)
            os.lseek(journal, kept, os.SEEK_SET)
            os.lseek(data, spool.end, os.SEEK_SET)
        try:
            yield spool
        except BaseException:
            if not spool.entries:  # nothing to go on from
                for each in (path, path.with_suffix(".journal")):
                    each.unlink(missing_ok=True)
                with suppress(OSError):  # other sources have members
                    folder.rmdir()
            raise


def _open(path: Path, files: ExitStack) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    files.callback(os.close, file)
    return file


def _lock(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another run is filling it; wait for its end or stop it") from None
    except OSError:
        pass  # some file systems of clusters have no locks: there two runs at once are the user's own affair


def _read(path: Path, data: int, journal: int) -> tuple[Spool, int]:
    """What is whole of a spool, and how many bytes of its journal say so."""
    spool, kept = Spool(path, None, [], False, data, journal), 0
    text, size = _read_whole(journal), os.fstat(data).st_size
    # When all was there it was synced; before that a machine that failed may have kept a line and not its bytes.
    is_synced = text.endswith(_line(_COMPLETE))
    for value, behind in _lines(text):
        if isinstance(value, dict):
            spool.head = value
        elif value == _COMPLETE:
            spool.is_complete = True
        else:
            entry = Entry(*value)
            if entry.offset + entry.size > size or not (is_synced or _digest(data, entry) == entry.xxh3):
                break
            spool.entries.append(entry)
        kept = behind
    return spool, kept


def _lines(journal: bytes) -> Iterator[tuple[Any, int]]:
    """The value of every line and the offset behind it, up to the first that is not whole."""
    at = 0
    while (end := journal.find(b"\n", at)) >= 0:
        digest, _, text = journal[at:end].partition(b" ")
        if digest != xxhash.xxh3_64_hexdigest(text).encode():
            return
        at = end + 1
        yield json.loads(text), at


def _line(value: object) -> bytes:
    text = json.dumps(value).encode()
    return b"%s %s\n" % (xxhash.xxh3_64_hexdigest(text).encode(), text)


def _read_whole(file: int) -> bytes:
    with open(os.dup(file), "rb") as whole:
        return whole.read()


def _digest(data: int, entry: Entry) -> int:
    digest = xxhash.xxh3_64()
    end = entry.offset + entry.size
    for at in range(entry.offset, end, PIECE_BYTES):
        digest.update(os.pread(data, min(PIECE_BYTES, end - at), at))
    return digest.intdigest()


def _write(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Says in one line why the disk takes no more."""
    try:
        yield
    except OSError as error:
        why = "the disk is full" if error.errno in _FULL else f"cannot be written ({error.strerror})"
        raise UserError(
            f"{folder}: {why}; mend that and run the same command again, it goes on where it stopped"
        ) from None
