"""Two programs measured in turn, and the ratio of their medians."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

ROUNDS = 5  # of each side, in turn, so that a machine's moods meet both


@dataclass(frozen=True)
class Comparison:
    """One figure of ours beside the other's, as medians; a ratio above 1 means that ours is better."""

    name: str
    ours: float
    other: float
    unit: str
    ratio: float
    against: str  # what the other is


def compare(
    name: str, unit: str, against: str, ours: Callable[[], float], other: Callable[[], float], rounds: int = ROUNDS
) -> Comparison:
    """Measures both sides in turn. Each gives a rate, where more is better, or seconds or MiB, where less is."""
    mine, theirs = zip(*((ours(), other()) for _ in range(rounds)), strict=True)
    return compared(name, unit, against, mine, theirs)


def compared(name: str, unit: str, against: str, ours: Sequence[float], other: Sequence[float]) -> Comparison:
    """The comparison of what has been measured; less is better of seconds, MiB and per cent."""
    mine, theirs = statistics.median(ours), statistics.median(other)
    return Comparison(name, mine, theirs, unit, theirs / mine if unit in ("s", "MiB", "%") else mine / theirs, against)


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Yields a function that says how many seconds have passed."""
    began = time.perf_counter()
    yield lambda: time.perf_counter() - began


def note(text: str) -> None:
    """Says on stderr what takes so long."""
    print(text, file=sys.stderr, flush=True)
