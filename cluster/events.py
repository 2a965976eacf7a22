"""What happened, when: the one source that metrics, TensorBoard, Prometheus, the progress line and reports read.

An event covers the wall time [t0, t1] and carries plain facts. A log writes each event of its rank as a JSON line to
RUN/events/ and hands it to its sinks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

# start: from process start to the first step, with what was restored; steps: all since the last event of this kind.
# bad_samples: damaged scenes that were passed over since the last event of this kind.
Kind = Literal["start", "steps", "bad_samples", "validation", "checkpoint", "stop"]


@dataclass(frozen=True)
class Event:
    """Something that took from t0 to t1 (seconds since 1970) and ended with `step` steps done."""

    kind: Kind
    step: int
    t0: float
    t1: float
    facts: dict[str, Any] = field(default_factory=dict)


Sink = Callable[[Event], None]


def without_nan(content: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    return None if isinstance(content, float) and not math.isfinite(content) else content


class EventLog:
    """The events of one rank in one attempt."""

    def __init__(self, folder: Path, attempt: int, rank: int, sinks: Sequence[Sink]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"attempt-{attempt:04d}-rank-{rank:05d}.jsonl").open("a", buffering=1)
        self._sinks = tuple(sinks)

    def emit(self, event: Event) -> None:
        """Writes an event and tells the sinks."""
        self._file.write(json.dumps(without_nan(asdict(event))) + "\n")
        for sink in self._sinks:
            sink(event)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
