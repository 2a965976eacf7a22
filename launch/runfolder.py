"""The files of a RUN folder, and how its JSON lines are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.checkpoints.attempt import is_superseded, read_attempts

CONFIG = "config.json"
METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
CHECKPOINTS = "checkpoints"
ATTEMPTS = "attempts"
EVENTS = "events"
LEDGER = "ledger"
TENSORBOARD = "tensorboard"
BACKBONE = "backbone.safetensors"  # the frozen ViT of an imported model
REPORT = "report.html"
STACKS = "stacks"  # where every rank was when the watchdog ended an attempt
NONFINITE = "nonfinite"  # reports of a step whose numbers were none, -STEP.json
DOCTOR = "doctor"  # what `nsi doctor` found on the nodes before a job, in JOB-RESTART/
STOP = "stop"  # made by a person, it ends the run within a second or two, saved; with "requeue" in it, as a signal does
RUNNING = "running"  # while an attempt trains, or has died: its number and Slurm job; a batch script requeues on it
STOPPED = "stopped"  # there while a run was cut by a signal; a batch script requeues on it


def eval_path(run: Path, split: str) -> Path:
    """The figures of a split."""
    return run / f"eval-{split}.json"


def scenes_path(run: Path, split: str) -> Path:
    """A few scenes of a split with their slots, for pictures."""
    return run / f"eval-{split}-scenes.npz"


def read_lines(run: Path, name: str) -> list[dict[str, Any]]:
    """All lines of one of a run's JSON-lines files, in the file's order; none where there is no such file.

    A line that a killed process left torn is passed over, be it the last or glued to its successor's first.
    """
    path = run / name
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def standing_lines(run: Path, name: str) -> list[dict[str, Any]]:
    """The lines of `read_lines` that no later attempt made void by going on from before them, in order of step."""
    attempts = read_attempts(run / ATTEMPTS)
    standing = [
        line
        for line in read_lines(run, name)
        if isinstance(line.get("step"), int) and not is_superseded(line["step"], line.get("attempt", 0), attempts)
    ]
    return sorted(standing, key=lambda line: line["step"])
