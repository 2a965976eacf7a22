"""Where events go besides their own file: metrics.jsonl, validation.jsonl and TensorBoard."""

from __future__ import annotations

import io
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from cluster.records.appender import Appender
from cluster.records.events import Event, Sink, without_nan

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
BOARD_CLOSE_S = 2.0  # curves are worth no long wait at a run's end


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
    """TensorBoard's file of an attempt: scalars of logged steps and validations, and pictures.

    TensorBoard's own writer makes steps wait when its disk is slow and gives up for good when it is full once. So its
    records go through an appender; one of their own, since nothing else should wait for them.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary  # a second of imports, for rank 0 alone

        self._protocol: Any = event_pb2
        self._framed, self._summary = RecordWriter, summary
        self._path = folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._appender = Appender()
        self._write(file_version="brain.Event:2")

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        self._appender.close(BOARD_CLOSE_S)

    def show(self, event: Event) -> None:
        """The sink."""
        group = {"steps": "train", "validation": "validation"}.get(event.kind)
        if group is not None:
            for name, value in event.facts.items():
                if isinstance(value, (int, float)):
                    self._write(step=event.step, summary=self._summary.scalar(f"{group}/{name}", value))

    def picture(self, name: str, image_3HW: Any, step: int) -> None:
        """A picture of colours in [0, 1] or bytes."""
        self._write(step=step, summary=self._summary.image(name, image_3HW, dataformats="CHW"))

    def troubles(self) -> list[str]:
        """What could not be written since the last call."""
        return self._appender.troubles()

    def _write(self, **content: Any) -> None:
        record = io.BytesIO()
        event = self._protocol.Event(wall_time=time.time(), **content)
        self._framed(record).write(event.SerializeToString())
        self._appender.append(self._path, record.getvalue())
