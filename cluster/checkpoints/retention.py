"""Which checkpoints are kept: the last few, the best, and one of every so many hours for good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """How many of the newest are kept, at least 1, and of which stretches of hours the first; 0 for none."""

    last: int = 2
    every_hours: float = 0.0


def kept_steps(saved: Sequence[tuple[int, float]], also: frozenset[int], retention: Retention) -> frozenset[int]:
    """Of the checkpoints at hand, (step, seconds since 1970), the steps of those to keep; of `also` those at hand.

    Stretches of hours are counted from 1970 and not from the first checkpoint, so that what is kept of one hangs on
    that stretch alone, and is kept whenever this is asked again.
    """
    steps = sorted(step for step, _ in saved)
    kept = set(steps[-retention.last :]) | (also & set(steps))
    if retention.every_hours:
        first: dict[int, int] = {}
        for step, at in sorted(saved):
            first.setdefault(int(at // (retention.every_hours * 3600)), step)
        kept |= set(first.values())
    return frozenset(kept)
