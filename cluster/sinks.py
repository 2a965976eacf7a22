"""Where events go besides their own file: metrics.jsonl, validation.jsonl and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.appender import Appender
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


def metrics_sink(path: Path, attempt: int, appender: Appender) -> Sink:
    """Appends a JSON line for each logged step."""

    def write(event: Event) -> None:
        if event.kind == "steps":
            line = {"step": event.step, **{key: event.facts[key] for key in METRIC_KEYS}, "attempt": attempt}
            appender.append(path, json.dumps(without_nan(line)).encode() + b"\n")

    return write


def validation_sink(path: Path, attempt: int, appender: Appender) -> Sink:
    """Appends a JSON line for each validation."""

    def write(event: Event) -> None:
        if event.kind == "validation":
            line = {"step": event.step, **event.facts, "attempt": attempt}
            appender.append(path, json.dumps(without_nan(line)).encode() + b"\n")

    return write


class Board:
    """TensorBoard's files of a run: scalars of logged steps and validations, and pictures.

    TensorBoard gives up for good when its disk is full once; then this does too, and says so.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second of imports, for rank 0 alone

        self._folder = folder
        self._writer: Any = SummaryWriter(str(folder))
        self._troubles: list[str] = []

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        self._try(lambda writer: writer.close())

    def show(self, event: Event) -> None:
        """The sink."""
        group = {"steps": "train", "validation": "validation"}.get(event.kind)
        if group is not None:
            for name, value in event.facts.items():
                if isinstance(value, (int, float)):
                    self._try(lambda writer, n=name, v=value: writer.add_scalar(f"{group}/{n}", v, event.step))

    def picture(self, name: str, image_3HW: Any, step: int) -> None:
        """A picture of colours in [0, 1] or bytes."""
        self._try(lambda writer: writer.add_image(name, image_3HW, step))

    def troubles(self) -> list[str]:
        """What could not be written since the last call."""
        troubles, self._troubles = self._troubles, []
        return troubles

    def _try(self, write: Callable[[Any], None]) -> None:
        if self._writer is None:
            return
        try:
            write(self._writer)
        except Exception as error:  # its thread hands on whatever stopped it
            self._writer = None
            self._troubles.append(
                f"{self._folder}: cannot be written ({error}); TensorBoard gets no more of this attempt"
            )
