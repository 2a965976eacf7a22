"""A run made ready in this process alone, as rank 0 of one."""

from __future__ import annotations

from launch.config import TrainConfig
from launch.training.choose import choose, load_chosen
from launch.training.prepare import Parts, prepare


def prepared(config: TrainConfig) -> Parts:
    """What stands before the first step, with the checkpoint that it goes on from."""
    return prepare(config, True, True, load_chosen(config.log_path, choose(config)))
