"""The files of a RUN folder, and how its JSON lines are read."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.json"
METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
CHECKPOINTS = "checkpoints"
ATTEMPTS = "attempts"
EVENTS = "events"
TENSORBOARD = "tensorboard"
REPORT = "report.html"
STOPPED = "stopped"  # there while a run was cut by a signal; a batch script requeues on it


def eval_path(run: Path, split: str) -> Path:
    """The figures of a split."""
    return run / f"eval-{split}.json"


def scenes_path(run: Path, split: str) -> Path:
    """A few scenes of a split with their slots, for pictures."""
    return run / f"eval-{split}-scenes.npz"
