"""Adds up what a logged interval of training took, and says it as an event."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from cluster.events import Event
from cluster.loss_scale import LossScale
from launch.config import TrainConfig
from launch.step import StepResult
from nsi.batch import Batch
from shards.order import Order


class Meter:
    """Adds up what a logged interval took: the waits for data, the steps, and nothing else."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._began: float | None = None
        self._steps = 0
        self._waited = 0.0
        self._stepped = 0.0
        self._broken = 0
        self._overflows = 0

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """The next batch."""
        t0 = time.time()
        if self._began is None:
            self._began = t0
        batch = next(batches)
        self._waited += time.time() - t0
        return batch

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Times one step."""
        t0 = time.time()
        yield
        self._stepped += time.time() - t0
        self._steps += 1

    def count(self, result: StepResult, broken: bool) -> None:
        """Counts a step that was left out: for want of finite numbers, or since fp16 gradients overflowed."""
        self._broken += broken
        self._overflows += not broken and not result.applied

    def event(
        self,
        step: int,
        lr: float,
        result: StepResult,
        config: TrainConfig,
        order: Order,
        world: int,
        loss_scale: LossScale | None = None,
    ) -> Event:
        """The interval as an event, and a fresh interval."""
        contrastive, reconstruction = float(result.contrastive), float(result.reconstruction)
        loss = contrastive + config.loss.beta * reconstruction
        images = self._steps * config.optim.batch_size
        facts = {
            "epoch": order.epoch(step),
            "loss": loss,
            "contrastive": contrastive,
            "reconstruction": reconstruction,
            "lr": lr,
            "grad_norm": float(result.grad_norm),
            "images_per_second": images / max(1e-9, self._waited + self._stepped),
            "world_size": world,
            "zero_stage": config.engine.zero_stage,
            "steps": self._steps,
            "images": images,
            "data_wait_seconds": self._waited,
            "step_seconds": self._stepped,
            "nonfinite_steps": self._broken,
            "overflows": self._overflows,
            "loss_scale": loss_scale.scale if loss_scale else 1.0,
        }
        began = self._began or time.time()
        self._reset()
        return Event("steps", step, began, time.time(), facts)
