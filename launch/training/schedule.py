"""The learning rate: a pure function of the step, and of the validations where --schedule plateau asks for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from launch.config import OptimConfig


@dataclass(frozen=True)
class Plateau:
    """How validation went so far: what `--schedule plateau` has to remember, and checkpoints keep."""

    factor: float = 1.0
    best_loss: float | None = None
    stale: int = 0


def learning_rate(config: OptimConfig, step: int, total_steps: int, plateau: Plateau) -> float:
    """The learning rate of the step that follows `step` finished ones."""
    if step < config.lr_warmup_steps:
        return config.lr * (step + 1) / config.lr_warmup_steps * plateau.factor
    if config.schedule == "plateau":
        return config.lr * plateau.factor
    if config.schedule == "constant":
        return config.lr
    done = (step - config.lr_warmup_steps) / max(1, total_steps - config.lr_warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def after_validation(plateau: Plateau, config: OptimConfig, step: int, loss: float) -> Plateau:
    """Halves the rate after `patience` validations without a better loss.

    The warm-up does not count, unless --schedule plateau is told that it does.
    """
    if plateau.best_loss is None or loss < plateau.best_loss:
        return replace(plateau, best_loss=loss, stale=0)
    counts_now = config.schedule == "plateau" and config.plateau_in_warmup
    if step < config.lr_warmup_steps and not counts_now:
        return plateau
    if plateau.stale + 1 < config.patience:
        return replace(plateau, stale=plateau.stale + 1)
    return replace(plateau, factor=plateau.factor / 2, stale=0)
