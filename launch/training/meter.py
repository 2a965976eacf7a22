"""Adds up what a logged interval of training took, and says it as an event."""

from __future__ import annotations

from cluster.engine.loss_scale import LossScale
from cluster.records.clock import Clock, spent_since
from cluster.records.events import Event
from launch.config import TrainConfig
from launch.training.step import StepResult
from shards.order import Order


class Meter:
    """Adds up what a logged interval of steps took, by a clock that others move too."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._reset()

    def _reset(self) -> None:
        self._began = self._clock.now()
        self._seconds = self._clock.seconds()
        self._steps = 0
        self._broken = 0
        self._overflows = 0

    def count(self, result: StepResult, broken: bool) -> None:
        """Counts a step, and whether it was left out: for want of finite numbers, or as fp16 gradients overflowed."""
        self._steps += 1
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
        loss_scale: LossScale | None,
        slowness: float,
    ) -> Event:
        """The interval as an event, and a fresh interval; `slowness` is this rank's, as the watchdog has it."""
        contrastive, reconstruction = float(result.contrastive), float(result.reconstruction)
        loss = contrastive + config.loss.beta * reconstruction
        images = self._steps * config.optim.batch_size
        spent = spent_since(self._seconds, self._clock.seconds())
        waited, stepped = spent.get("data_wait", 0.0), spent.get("step", 0.0)
        facts = {
            "epoch": order.epoch(step),
            "loss": loss,
            "contrastive": contrastive,
            "reconstruction": reconstruction,
            "lr": lr,
            "grad_norm": float(result.grad_norm),
            "images_per_second": images / max(1e-9, waited + stepped),
            "world_size": world,
            "zero_stage": config.engine.zero_stage,
            "steps": self._steps,
            "images": images,
            "data_wait_seconds": waited,
            "step_seconds": stepped,
            "nonfinite_steps": self._broken,
            "overflows": self._overflows,
            "loss_scale": loss_scale.scale if loss_scale else 1.0,
            "slowness": slowness,
        }
        began = self._began
        self._reset()
        return Event("steps", step, began, self._began, facts)
