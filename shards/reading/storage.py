"""A folder of shards, wherever it is: a local path, s3://bucket/prefix or http(s)://host/path, with one interface.

A local folder is read here; what speaks to a server is `remote.py` beside it, imported only where one is asked for.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import xxhash

from nsi.errors import UserError

PIECE_BYTES = 1 << 20  # what is held in memory of a file on its way to the disk
LONGEST_WAIT_S = 30.0

Request: TypeAlias = "tuple[str, int, int]"  # a file's name, the offset of its first byte wanted, how many


@dataclass(frozen=True)
class Retries:
    """How patient a storage is with a server: tries in all, and the wait after the first, which then doubles."""

    limit: int = 5
    first_wait_s: float = 0.5
    timeout_s: float = 30.0  # a server that sends nothing for so long has failed

    def wait_s(self, tried: int) -> float:
        """Seconds to wait after `tried` tries that failed."""
        return min(self.first_wait_s * 2 ** (tried - 1), LONGEST_WAIT_S)


@dataclass(frozen=True)
class Storage(ABC):
    """Where the files of one data set lie. Cheap to pickle, and good in any process.

    All methods raise UserError in one line where a file is missing, may not be read, or stays out of reach.
    """

    location: str  # as in messages: a path or a URL, without a slash at its end
    retries: Retries = Retries()

    @property
    @abstractmethod
    def is_local(self) -> bool:
        """Whether files can be memory-mapped where they lie."""

    @abstractmethod
    def path(self, name: str) -> Path:
        """Where a file lies. Only a local storage has paths."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole small file."""

    @abstractmethod
    def read_ranges(self, requests: Sequence[Request]) -> list[bytes]:
        """The bytes of each request, in order, each exactly as long as asked for."""

    @abstractmethod
    def fetch(self, name: str, target: Path) -> str:
        """Copies a file of any size to `target`, synced, and returns the xxh3-128 (hex) of the bytes that came."""

    @abstractmethod
    def sizes(self) -> dict[str, int] | None:
        """Bytes of each file by name, by one listing; None where the store cannot list."""

    def where(self, name: str) -> str:
        """A file's full name, for messages."""
        return f"{self.location}/{name}"


def open_storage(location: str | Path, retries: Retries | None = None) -> Storage:
    """The storage at a path or URL; nothing is read yet. Raises UserError for a URL of another kind."""
    retries = retries or Retries()
    scheme, separator, rest = str(location).partition("://")
    if isinstance(location, Path) or not separator:
        return LocalStorage(str(location), retries)
    if scheme not in ("s3", "http", "https") or not rest.strip("/"):
        raise UserError(f"{location}: not a place for shards; give a folder, s3://bucket/prefix or http(s)://host/path")
    from shards.reading.remote import RemoteStorage  # here, since a local path must not pay for what this imports

    return RemoteStorage(str(location).rstrip("/"), retries)


@dataclass(frozen=True)
class LocalStorage(Storage):
    """A folder on a file system."""

    @property
    def is_local(self) -> bool:
        return True

    def path(self, name: str) -> Path:
        return Path(self.location) / name

    def read(self, name: str) -> bytes:
        try:
            return self.path(name).read_bytes()
        except OSError as error:
            raise _unreadable(self.path(name), error) from None

    def read_ranges(self, requests: Sequence[Request]) -> list[bytes]:
        return [self._read_range(*request) for request in requests]

    def fetch(self, name: str, target: Path) -> str:
        try:
            source = self.path(name).open("rb")
        except OSError as error:
            raise _unreadable(self.path(name), error) from None
        with source, HashedFile(target) as file:
            while piece := source.read(PIECE_BYTES):
                file.write(piece)
            return file.finish()

    def sizes(self) -> dict[str, int]:
        try:
            with os.scandir(self.location) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except OSError as error:
            raise _unreadable(Path(self.location), error) from None

    def _read_range(self, name: str, offset: int, size: int) -> bytes:
        try:
            with self.path(name).open("rb") as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise _unreadable(self.path(name), error) from None
        if len(data) != size:
            raise UserError(f"{self.path(name)}: ends before offset {offset + size}; restore the file")
        return data


class HashedFile:
    """A file that is hashed while it is written.

    What goes wrong with it is a UserError, so that nobody takes a full disk for a failing network and tries again.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._digest = xxhash.xxh3_128()
        try:
            self._file = target.open("wb", buffering=0)  # pieces are large, and a full disk shows at once
        except OSError as error:
            raise self._unwritable(error) from None

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, piece: bytes) -> None:
        self._digest.update(piece)
        rest = memoryview(piece)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise self._unwritable(error) from None

    def finish(self) -> str:
        """Syncs the file. Returns the xxh3-128 (hex) of all that was written."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None
        return self._digest.hexdigest()

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self._target}: cannot be written ({error.strerror}); make room there or use another disk")


def _unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: missing; restore it, or check the location")
    return UserError(f"{path}: cannot be read ({error.strerror}); restore it, or check its permissions")
