"""`nsi train`: from shards to a trained model, alone or on all ranks of a launcher.

This file starts under every launcher: `python`, `deepspeed`, `torchrun`, `accelerate launch`, `srun`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.watch.stop import StopRequest

if TYPE_CHECKING:
    from launch.config import TrainConfig


def main(arguments: Sequence[str]) -> None:
    """Parses the flags and trains."""
    stop = StopRequest()  # a scheduler may say stop while the slow imports still run: listen before them
    from launch.training.run import train

    train(parse(arguments), stop)


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Flags to a configuration, on top of the recipe that they name."""
    import tyro

    from launch.config import TrainConfig
    from launch.recipes import describe, starting_point

    # DeepSpeed's launcher appends its own flag; LOCAL_RANK in the environment says the same.
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    base = starting_point(arguments)
    required = {"data_path", "log_path"}
    given = {argument.partition("=")[0].lstrip("-").replace("-", "_") for argument in arguments}
    default = base if required <= given else replace(base, data_path=tyro.MISSING, log_path=tyro.MISSING)
    text = f"{inspect.cleandoc(TrainConfig.__doc__ or '')}\n\n{describe(base.recipe)}"
    return tyro.cli(
        TrainConfig, args=arguments, default=default, prog="nsi train", description=text, use_underscores=True
    )


if __name__ == "__main__":
    from launch.cli import main as command_line

    command_line(["train", *sys.argv[1:]])
