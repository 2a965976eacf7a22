"""Where a rank's time goes: every second in exactly one bucket, and what the rank is doing right now.

    start        from the process's first moment to its first step, with imports and the compilation of the model
    restore      of it, choosing and checking a checkpoint, and giving its state to the engine
    data_wait    the step stood still for its batch
    step         forward, backward, optimizer, and all that goes with a step
    checkpoint   steps stood still while the state was copied
    eval         validation

A clock is read by other threads (the watchdog, the beat); only its rank's main thread moves it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

Bucket = Literal["start", "restore", "data_wait", "step", "checkpoint", "eval"]
_TICKS = os.sysconf("SC_CLK_TCK")


class Place(NamedTuple):
    """What a rank is doing: the steps that it has done, in which bucket, and how often it has moved so far."""

    step: int
    bucket: Bucket
    moves: int


class _State(NamedTuple):
    """All that changes, in one piece, so that another thread never sees half of a move."""

    place: Place
    since: float
    seconds: dict[str, float]  # of what is over


class Clock:
    """The time of one rank since `began`, in seconds since 1970; it goes on evenly if somebody sets the system's."""

    def __init__(self, began: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._zero = began + monotonic() - time.time()  # the process began a while ago
        self.began = began
        self._state = _State(Place(0, "start", 0), self._zero, {})

    @property
    def place(self) -> Place:
        """What the rank is doing."""
        return self._state.place

    def now(self) -> float:
        """Seconds since 1970."""
        return self.began + self._monotonic() - self._zero

    def enter(self, bucket: Bucket, step: int | None = None) -> None:
        """From now on time goes into this bucket; `step`: how many steps are done, if that has changed."""
        now, state = self._monotonic(), self._state
        place = Place(state.place.step if step is None else step, bucket, state.place.moves + 1)
        self._state = _State(place, now, _with_running(state, now))

    @contextlib.contextmanager
    def spending(self, bucket: Bucket) -> Iterator[None]:
        """`enter`, and back again afterwards."""
        before = self.place.bucket
        self.enter(bucket)
        try:
            yield
        finally:
            self.enter(before)

    def touch(self) -> None:
        """Says that something got done, within the same bucket."""
        self.enter(self.place.bucket)

    def idle_s(self) -> float:
        """Seconds since the last move."""
        return self._monotonic() - self._state.since

    def seconds(self) -> dict[str, float]:
        """Seconds in each bucket up to now; they add up to the time since `began`."""
        return _with_running(self._state, self._monotonic())


def _with_running(state: _State, now: float) -> dict[str, float]:
    bucket = state.place.bucket
    return {**state.seconds, bucket: state.seconds.get(bucket, 0.0) + now - state.since}


def spent_since(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    """Seconds in each bucket between two readings of a clock, those without any left out."""
    return {bucket: spent for bucket, total in now.items() if (spent := total - before.get(bucket, 0.0)) > 0}


def process_began() -> float:
    """When this process began, in seconds since 1970; now, where the system does not tell."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / _TICKS)
    except (OSError, ValueError, IndexError, AttributeError):
        return time.time()
