"""Whole shards kept on a node's own disk, shared by all its processes, never more than a number of bytes.

    FOLDER/room.lock                            held while room is made and while a finished copy takes its name
    FOLDER/0123456789abcdef/                    one data set: the first 16 digits of its manifest's fingerprint
        train-000000.tar                        a verified copy; its mtime says when it was last used
        train-000000.tar.lock                   held by the one process that downloads the shard
        train-000000.tar.1048576.part           a download under way, and the bytes it has reserved

Locks are flock's, which the kernel frees when a process dies. Lock files are empty and stay for ever, one a shard:
one that is unlinked while another process waits for it would let two processes hold "the" lock.
The folder must be on a disk of the node; its files may be deleted by hand while nothing runs.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

from nsi.errors import UserError
from shards.reading.storage import Storage

ROOM_LOCK = "room.lock"
POLL_S = 0.1  # between looks for room, while other processes' downloads fill the cache

_NAME = re.compile(r"\w[\w.-]*")  # nothing that leads out of the folder
_DATA_SET = re.compile(r"[0-9a-f]{16}")
_PART = re.compile(r"(?P<shard>.+)\.(?P<reserved>\d+)\.part")


@dataclass(frozen=True)
class ShardCache:
    """A folder of verified copies, of at most `limit_bytes` together, downloads under way included.

    Copies that were evicted while a process has them mapped go on taking disk until it lets go of them, when it reads
    again.
    """

    folder: Path
    limit_bytes: int

    def check_holds(self, name: str, size: int) -> None:
        """Raises UserError where a shard is larger than the whole cache."""
        if size > self.limit_bytes:
            raise UserError(
                f"{self.folder}: a cache of {self.limit_bytes} bytes cannot hold {name}, of {size}; raise its limit"
            )

    def get(self, storage: Storage, fingerprint: str, name: str, size: int, xxh3_128: str) -> Path:
        """A copy of a shard, downloaded where there is none; waits where another process is downloading it.

        Another process may evict the copy before it is opened: whoever finds it gone asks again.
        Raises UserError where the shard cannot be had, is not what the manifest says, or has no room.
        """
        while True:
            path = self._get(storage, fingerprint, name, size, xxh3_128, wait=True)
            if path is not None:
                return path
            time.sleep(POLL_S)

    def get_if_free(self, storage: Storage, fingerprint: str, name: str, size: int, xxh3_128: str) -> Path | None:
        """The same for a download ahead of need: None at once where another process holds the shard or the room."""
        return self._get(storage, fingerprint, name, size, xxh3_128, wait=False)

    def _get(
        self, storage: Storage, fingerprint: str, name: str, size: int, xxh3_128: str, *, wait: bool
    ) -> Path | None:
        """The copy; None where its lock is not free (unless `wait`) or downloads under way leave it no room."""
        if not _NAME.fullmatch(name) or not _DATA_SET.fullmatch(fingerprint[:16]):
            raise UserError(f"{storage.where(name)}: not a name that a cache can keep; write the shards again")
        self.check_holds(name, size)
        path = self.folder / fingerprint[:16] / name
        try:
            if _use(path, size):
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(_lock_of(path), wait) as held:
                if not held:
                    return None
                if _use(path, size):
                    return path  # another process downloaded it while this one waited
                return self._download(storage, path, size, xxh3_128)
        except OSError as error:
            raise UserError(f"{self.folder}: the cache cannot be used ({error}); use another folder") from None

    def _download(self, storage: Storage, path: Path, size: int, xxh3_128: str) -> Path | None:
        """Downloads a shard whose lock is held. None where there is no room for now."""
        part = path.with_name(f"{path.name}.{size}.part")
        part.unlink(missing_ok=True)  # of a process that died
        with _locked(self.folder / ROOM_LOCK):
            if not self._make_room(size):
                return None
            part.touch()  # reserves `size`, by its name
        try:
            _fetch_verified(storage, path.name, part, xxh3_128)
            with _locked(self.folder / ROOM_LOCK):  # else one who counts might see neither name
                part.rename(path)
                _use(path, size)
        finally:
            part.unlink(missing_ok=True)
        return path

    def _make_room(self, size: int) -> bool:
        """Evicts the copies used longest ago until `size` bytes fit. False where downloads under way leave too few."""
        reserved, copies = self._survey()
        if reserved + size > self.limit_bytes:
            return False
        used = reserved + sum(copy.bytes for copy in copies)
        for copy in sorted(copies, key=lambda copy: copy.used_ns):
            if used + size <= self.limit_bytes:
                break
            # Safe where others have it mapped: on POSIX a file without a name lives until its last map is gone.
            copy.path.unlink(missing_ok=True)
            used -= copy.bytes
        return True

    def _survey(self) -> tuple[int, list[_Copy]]:
        """Bytes reserved by downloads under way, and all copies. Removes what dead downloads have left."""
        reserved, copies = 0, []
        for folder in self.folder.iterdir():
            if not _DATA_SET.fullmatch(folder.name):
                continue
            # Only what has a lock beside it was made here: other files are not the cache's to count, nor to delete.
            names = set(os.listdir(folder))
            for shard in (name.removesuffix(".lock") for name in names if name.endswith(".lock")):
                if shard in names:
                    with suppress(FileNotFoundError):  # damaged, and removed by who found that since the listing
                        found = (folder / shard).stat()
                        copies.append(_Copy(folder / shard, found.st_size, found.st_mtime_ns))
            for part in filter(None, map(_PART.fullmatch, names)):
                if f"{part['shard']}.lock" in names and _is_under_way(folder / part["shard"], folder / part[0]):
                    reserved += int(part["reserved"])
        return reserved, copies


class _Copy(NamedTuple):
    path: Path
    bytes: int
    used_ns: int


def mark_used(path: Path) -> None:
    """Says that a copy is in use now, so that others are evicted first."""
    now = time.time_ns()  # the kernel's own "now" stands still for some milliseconds
    os.utime(path, ns=(now, now))


def _use(path: Path, size: int) -> bool:
    """Whether there is a whole copy, which then counts as the one used last. It was verified when it came."""
    try:
        if path.stat().st_size != size:
            return False
        mark_used(path)
    except FileNotFoundError:
        return False
    return True


def _fetch_verified(storage: Storage, name: str, part: Path, xxh3_128: str) -> None:
    for tried in count(1):
        found = storage.fetch(name, part)
        if found == xxh3_128:
            return
        if tried >= storage.retries.limit:
            raise UserError(
                f"{storage.where(name)}: downloaded {tried} times, its xxh3-128 is {found[:12]}..., "
                f"the manifest says {xxh3_128[:12]}...; copy the shard there again"
            )
        time.sleep(storage.retries.wait_s(tried))


def _is_under_way(shard: Path, part: Path) -> bool:
    """Whether somebody is downloading a shard; where nobody is, removes what was left of it."""
    with _locked(_lock_of(shard), wait=False) as free:
        if free:
            part.unlink(missing_ok=True)
        return not free


def _lock_of(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.lock")


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a lock file against all other processes and threads. Gives False where it is held and `wait` is not set."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        try:
            yield held
        finally:
            if held:  # closing alone would not free it where a child was forked meanwhile
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)
