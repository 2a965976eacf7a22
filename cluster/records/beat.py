"""The beat of an attempt: how far its rank 0 had come when it was last alive, in a file that is written over.

A killed attempt leaves no event of its end. Its beat says until when it lived and what it did since its last event.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from cluster.records.clock import Clock

_SIZE = 512  # the file keeps its length, so that one write replaces all of it


def beat_path(events: Path, attempt: int) -> Path:
    """Where the beat of an attempt lies."""
    return events / f"attempt-{attempt:04d}.beat"


def write_beat(path: Path, clock: Clock) -> None:
    """Writes where the clock stands; a disk that cannot take it is told of by others."""
    content = {"time": clock.now(), "step": clock.place.step, "seconds": clock.seconds()}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.pwrite(file, json.dumps(content).encode().ljust(_SIZE), 0)
        finally:
            os.close(file)


def read_beat(path: Path) -> dict | None:
    """What `write_beat` wrote last; None where there is nothing whole."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and {"time", "step", "seconds"} <= content.keys() else None
