"""A run's past as its report shows it: the attempts, and where their time went."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cluster.checkpoints.attempt import Attempt, is_superseded
from cluster.records.goodput import goodput
from launch import runfolder
from launch.runfolder import read_lines

UNKNOWN = "–"
_MEANING = {
    "step": "forward, backward and optimizer",
    "data_wait": "steps stood still for their batch",
    "eval": "validation on the way",
    "checkpoint": "steps stood still while the state was copied",
    "start": "imports and preparations",
    "restore": "finding, checking and loading the checkpoint",
    "queue": "nobody trained: between attempts",
    "replayed": "steps that were lost, and done anew",
    "hang": "the last standstill of attempts that the watchdog ended",
}


def attempt_rows(folder: Path, attempts: list[Attempt]) -> list[dict[str, Any]]:
    """Each start of the run: where it went on, how far it came, and how much of it a later one made void."""
    lines = read_lines(folder, runfolder.METRICS)
    rows = []
    for attempt in attempts:
        steps = [line["step"] for line in lines if line.get("attempt") == attempt.number and "step" in line]
        stages = {line.get("zero_stage") for line in lines if line.get("attempt") == attempt.number}
        rows.append(
            {
                **vars(attempt),
                "when": when(attempt.started),
                "reached": max(steps, default=None),
                "void": sum(is_superseded(step, attempt.number, attempts) for step in steps),
                "zero_stage": ", ".join(str(stage) for stage in stages if stage is not None) or UNKNOWN,
            }
        )
    return rows


def time_rows(folder: Path, attempts: list[Attempt]) -> list[dict[str, Any]]:
    """The buckets of the wall time that hold anything, in their order."""
    found = goodput(folder / runfolder.EVENTS, attempts)
    return [
        {
            "bucket": bucket,
            "share": found.share(bucket),
            "time": _duration(seconds),
            "what": _MEANING[bucket],
        }
        for bucket, seconds in found.seconds.items()
        if found.share(bucket) >= 0.0005
    ]


def _duration(seconds: float) -> str:
    """1:02:03 as a person writes it; below a minute in seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02} min"


def when(seconds: float) -> str:
    """A moment in seconds since 1970, to the minute."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
