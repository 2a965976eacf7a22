"""Goodput: where the wall time of a run went, over all its attempts, every second in exactly one bucket.

The buckets are those of cluster/records/clock.py and three that no clock can know:

    queue       nobody trained: before an attempt began and after the one before it was last alive
    replayed    spent on steps that a later attempt did anew
    hang        the last standstill of an attempt that the watchdog ended

Wall time runs from the first attempt's first moment to the last sign of life of the last. Rank 0's records tell it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.checkpoints.attempt import Attempt
from cluster.records.beat import beat_path, read_beat

BUCKETS: tuple[str, ...] = ("queue", "start", "restore", "data_wait", "step", "checkpoint", "eval", "replayed", "hang")
_ONCE = ("start", "restore", "hang")  # not to be replayed: they belong to their attempt, whatever became of its steps


@dataclass(frozen=True)
class Goodput:
    """Seconds in each bucket; they add up to `wall_s`."""

    wall_s: float
    seconds: dict[str, float]

    def share(self, bucket: str) -> float:
        """A bucket's share of the wall time."""
        return self.seconds[bucket] / self.wall_s if self.wall_s else 0.0


@dataclass(frozen=True)
class _Stretch:
    """A piece of an attempt: what its clock says of the time from `begin` to `end`."""

    begin: float
    end: float
    first_step: int  # done at its begin
    last_step: int  # done, or in the doing, at its end
    seconds: dict[str, float]


def goodput(events: Path, attempts: Sequence[Attempt]) -> Goodput:
    """Where the time went, from RUN/events and the run's attempts."""
    seconds: dict[str, float] = dict.fromkeys(BUCKETS, 0.0)
    lives = [_life(events, attempt) for attempt in attempts]
    begin = alive_until = min((attempt.started for attempt in attempts), default=0.0)
    for number, (attempt, stretches) in enumerate(zip(attempts, lives, strict=True)):
        later = attempts[number + 1 :]
        # An attempt that lived on beside its successor, on a node that was cut off, counts for nothing from there on.
        ends = min([each.started for each in later], default=float("inf"))
        replayed_from = min([each.restored_step for each in later], default=None)
        began = max(attempt.started, alive_until)
        seconds["queue"] += began - alive_until
        alive_until = began
        for stretch in stretches:
            first, last = max(stretch.begin, alive_until), min(stretch.end, ends)
            if last <= first:
                continue
            for bucket, spent in _divided(stretch, (last - first) / (stretch.end - stretch.begin), replayed_from):
                seconds[bucket] += spent
            alive_until = last
    return Goodput(alive_until - begin, seconds)


def _divided(stretch: _Stretch, part: float, replayed_from: int | None) -> Iterator[tuple[str, float]]:
    """The seconds of a part of a stretch by bucket, and what of them was done anew later."""
    steps = stretch.last_step - stretch.first_step
    if replayed_from is None or stretch.last_step <= replayed_from:
        void = 0.0
    else:
        void = (stretch.last_step - max(stretch.first_step, replayed_from)) / steps if steps else 1.0
    known = sum(stretch.seconds.values())
    scale = part * (stretch.end - stretch.begin) / known if known else 0.0  # rounding, and clocks that were read twice
    for bucket, spent in stretch.seconds.items():
        lost = 0.0 if bucket in _ONCE else void
        yield bucket, spent * scale * (1 - lost)
        yield "replayed", spent * scale * lost


def _life(events: Path, attempt: Attempt) -> list[_Stretch]:
    """An attempt from its first moment to its last sign of life, without gaps."""
    stretches: list[_Stretch] = []
    now, step, total, doing, ended = attempt.started, attempt.restored_step, 0.0, 1, False
    for event in _events(events / f"attempt-{attempt.number:04d}-rank-00000.jsonl"):
        spent = {bucket: float(each) for bucket, each in event["seconds"].items()}
        end = now + sum(spent.values())
        if event["kind"] == "ended":
            bucket = event["facts"]["bucket"]
            spent["hang"] = min(spent.get(bucket, 0.0), float(event["facts"]["idle_s"]))
            spent[bucket] = spent.get(bucket, 0.0) - spent["hang"]
        last = max(step, int(event["step"]))
        stretches.append(_Stretch(now, end, step, last, spent))
        now, step, total = end, last, total + end - now
        doing, ended = int(event["kind"] != "stop"), event["kind"] == "ended"
    beat = read_beat(beat_path(events, attempt.number))
    if beat and sum(beat["seconds"].values()) > total and not ended:
        spent = _rest(stretches, beat["seconds"])
        last = max(step, int(beat["step"])) + doing  # the step that was cut is lost
        stretches.append(_Stretch(now, now + sum(spent.values()), step, last, spent))
    return stretches


def _rest(stretches: Sequence[_Stretch], totals: dict[str, float]) -> dict[str, float]:
    """What a beat's totals have more than the stretches."""
    rest = {
        bucket: total - sum(each.seconds.get(bucket, 0.0) for each in stretches) for bucket, total in totals.items()
    }
    return {bucket: max(0.0, spent) for bucket, spent in rest.items()}


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of events; what a kill left torn is passed over."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("seconds"), dict):
            yield event
