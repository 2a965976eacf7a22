"""The files of a RUN folder, and how its JSON lines are read."""

from __future__ import annotations

CONFIG = "config.json"
METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
CHECKPOINTS = "checkpoints"
ATTEMPTS = "attempts"
EVENTS = "events"
TENSORBOARD = "tensorboard"
REPORT = "report.html"
STOPPED = "stopped"  # there while a run was cut by a signal; a batch script requeues on it
