"""How files come to the disk: synced under a temporary name, renamed whole; and who may write in a folder meanwhile."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nsi.errors import UserError
from shards.index import index_path
from shards.manifest import Shard
from shards.temporary import temporary_mark
from shards.writing.pack import Packed


@contextmanager
def held(out: Path, shared: bool) -> Iterator[None]:
    """Holds a folder for this run: parts share it with parts, any other run has it alone.

    The kernel lets go of it with the process, however that ends. Raises UserError where it is held already, and OSError
    where there is no such folder. A file system that knows no such locks (NFS) lets everybody pass.
    """
    handle = os.open(out, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{out}: another `nsi shard` is writing there; wait for its end, or choose another folder"
                ) from None
        yield
    finally:
        os.close(handle)


def place(out: Path, packed: Packed) -> None:
    """Syncs a packed shard and its index and gives them their names. Raises OSError where they cannot be written."""
    path = out / packed.shard.name
    sync(Path(packed.temporary))
    write_file(index_path(path), packed.index, synced=True)
    os.rename(packed.temporary, path)


def is_whole(out: Path, shard: Shard) -> bool:
    """Whether a shard is there as long as it was written, and its index as it was. `nsi verify` looks into both."""
    path = out / shard.name
    try:
        index = hashlib.sha256(index_path(path).read_bytes()).hexdigest()
        return path.stat().st_size == shard.bytes and index == shard.index_sha256
    except OSError:
        return False


def write_file(path: Path, data: bytes, synced: bool) -> None:
    """Writes a file under a temporary name and renames it."""
    temporary = path.with_name(f"{path.name}.{temporary_mark()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if synced:
                file.flush()
                os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Returns when a file's bytes, or the names in a folder, lie on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def cannot_write(out: Path, error: OSError) -> UserError:
    """What to say of an error of the disk."""
    return UserError(
        f"{error.filename or out}: cannot be written ({error.strerror or error}); mend that and run the same command "
        "again, it continues where it stopped"
    )
