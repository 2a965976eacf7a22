"""What makes a file or a name outlive a machine that loses its power, and what tells that bytes have changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_PIECE = 1 << 23  # bytes hashed at once: a thread that hashes asks for Python's lock once a piece


def sync(path: Path) -> None:
    """Returns when a file's bytes, or the names in a folder, lie on disk. Raises OSError where they cannot."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
