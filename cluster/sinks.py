"""Where events go besides their own file: metrics.jsonl, validation.jsonl and TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.events import Event, Sink, without_nan

METRIC_KEYS = (
    "epoch",
    "loss",
    "contrastive",
    "reconstruction",
    "lr",
    "grad_norm",
    "images_per_second",
    "world_size",
    "zero_stage",
    "nonfinite_steps",
    "overflows",
    "loss_scale",
)


def metrics_sink(path: Path, attempt: int) -> Sink:
    """Appends a JSON line for each logged step."""
    file = path.open("a", buffering=1)

    def write(event: Event) -> None:
        if event.kind == "steps":
            line = {"step": event.step, **{key: event.facts[key] for key in METRIC_KEYS}, "attempt": attempt}
            file.write(json.dumps(without_nan(line)) + "\n")

    return write


def validation_sink(path: Path, attempt: int) -> Sink:
    """Appends a JSON line for each validation."""
    file = path.open("a", buffering=1)

    def write(event: Event) -> None:
        if event.kind == "validation":
            file.write(json.dumps({"step": event.step, **event.facts, "attempt": attempt}) + "\n")

    return write


def tensorboard_sink(writer) -> Sink:
    """Writes the numbers of logged steps and validations as scalars of a TensorBoard SummaryWriter."""

    def write(event: Event) -> None:
        group = {"steps": "train", "validation": "validation"}.get(event.kind)
        if group is None:
            return
        for name, value in event.facts.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(f"{group}/{name}", value, event.step)

    return write
