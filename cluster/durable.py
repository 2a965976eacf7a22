"""What makes a file or a name outlive a machine that loses its power."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Returns when a file's bytes, or the names in a folder, lie on disk. Raises OSError where they cannot."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
