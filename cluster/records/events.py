"""What happened, when: the one source that metrics, TensorBoard, Prometheus, the progress line and reports read.

An event covers the wall time [t0, t1] and carries plain facts. A log writes each event of its rank as a JSON line to
RUN/events/ and hands it to its sinks. On the way it adds where the rank's time went since the event before, so that
the seconds of an attempt's events add up to its wall time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cluster.records.appender import Appender
from cluster.records.clock import Clock, spent_since

# start: from process start to the first step, with what was restored; steps: all since the last event of this kind.
# bad_samples: damaged scenes that were passed over since the last event of this kind; storage: something that could not
# be written; straggler: a rank that is slower than others; ended: by the watchdog, and how long it had stood still.
Kind = Literal[
    "start", "steps", "bad_samples", "validation", "checkpoint", "saved", "storage", "straggler", "ended", "stop"
]


@dataclass(frozen=True)
class Event:
    """Something that took from t0 to t1 (seconds since 1970) and ended with `step` steps done."""

    kind: Kind
    step: int
    t0: float
    t1: float
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # by bucket (clock.py), since the event before


Sink = Callable[[Event], None]


def without_nan(content: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    return None if isinstance(content, float) and not math.isfinite(content) else content


class EventLog:
    """The events of one rank in one attempt."""

    def __init__(
        self, folder: Path, attempt: int, rank: int, sinks: Sequence[Sink], clock: Clock, appender: Appender
    ) -> None:
        self._path = folder / f"attempt-{attempt:04d}-rank-{rank:05d}.jsonl"
        self._sinks, self._clock, self._appender = tuple(sinks), clock, appender
        self._seconds: dict[str, float] = {}

    def emit(self, event: Event) -> None:
        """Writes an event and tells the sinks. For the main thread."""
        told = self.record(event)
        for sink in self._sinks:
            sink(told)

    def record(self, event: Event) -> Event:
        """Writes an event, with where the time went until now, and tells nobody. Returns what was written."""
        seconds = self._clock.seconds()
        event = replace(event, seconds=spent_since(self._seconds, seconds))
        self._seconds = seconds
        self._appender.append(self._path, json.dumps(without_nan(asdict(event))).encode() + b"\n")
        return event

    def troubles(self) -> list[str]:
        """What could not be written since the last call."""
        return self._appender.troubles()

    def instant(self, kind: Kind, facts: dict[str, Any] | None = None) -> Event:
        """An event of this moment."""
        now = self._clock.now()
        return Event(kind, self._clock.place.step, now, now, facts or {})
