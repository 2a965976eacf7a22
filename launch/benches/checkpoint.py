"""How long the steps stand still for a checkpoint, and the forms that one would write down first.

Two ranks with the defaults of `nsi train` and a model of its default sizes, on made numbers: the comparisons are made
by rank 0 of a world of its own, which torchrun starts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.checkpoints.checkpoint import Checkpoint, write_checkpoint
from cluster.checkpoints.retention import Retention
from cluster.checkpoints.writer import CheckpointWriter
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.state import MOMENTS
from cluster.processes import join, leave, use_gpus
from cluster.world import find_world
from launch.benches.comparison import ROUNDS, Comparison, compared, note, stopwatch
from launch.benches.forms import FEATURES, IMAGES, PATCHES, timed
from launch.benches.step import VOCABULARY, run_of
from launch.config import OptimConfig, WatchConfig
from launch.training.prepare import DEEPSPEED_CONFIG
from nsi.errors import UserError
from nsi.model import ModelConfig, NeuralSlotInterpreter, undecayed

GOAL = 1.0  # per cent of the run's time, which checkpoints shall stay below


def comparisons(data: Path | None, scenes: int) -> Iterator[Comparison]:
    """The standstill, its share of the steps between two checkpoints, the gathering, and a step beside the writing."""
    ranks = min(2, torch.cuda.device_count()) if use_gpus() else 2
    note(f"{ranks} ranks, {ROUNDS + 1} rounds")
    where = torch.cuda.get_device_name() if use_gpus() else "a CPU, a thread each"
    on = f"{ranks} ranks on {where}"
    found = _measured(ranks)
    every, step_s = WatchConfig().checkpoint_every, statistics.median(found["step"])
    shares = [100 * seconds / (every * step_s) for seconds in found["standstill"]]
    goal = f"the goal; of {every:,} steps of {IMAGES} images a rank without the backbone, {step_s:.3g} s each, {on}"
    inline = f"the same, written and synced before the next step, {on}"
    yield compared("checkpoint/standstill", "s", inline, found["standstill"], found["inline"])
    yield compared("checkpoint/share", "%", goal, shares, [GOAL] * len(shares))
    yield compared("checkpoint/gather", "s", f"tensor by tensor on all ranks, {on}", found["flat"], found["by_tensor"])
    yield compared(
        "checkpoint/step-beside-writing", "s", f"a step with nothing written, {on}", found["beside"], found["step"]
    )


def _measured(ranks: int) -> dict[str, list[float]]:
    """Seconds of each kind, by a world of so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        threads = {} if use_gpus() else {"OMP_NUM_THREADS": "1"}
        found = subprocess.run(
            [*command, "-m", "launch.benches.checkpoint", str(out)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **threads},
            capture_output=True,
            text=True,
            check=False,
        )
        if found.returncode:
            raise UserError(f"bench checkpoint: a rank failed ({found.stderr.strip().splitlines()[-1]})")
        return json.loads(out.read_text())


def _measure(out: Path) -> None:
    """One rank of the world that measures; rank 0 writes the seconds."""
    world = find_world(os.environ)
    join(world)
    optim, model = OptimConfig(), NeuralSlotInterpreter(ModelConfig(), FEATURES, PATCHES, VOCABULARY)
    sizes = world.size, IMAGES, 1, optim.grad_clip, optim.weight_decay
    engine = Engine(model, EngineConfig(), *sizes, DEEPSPEED_CONFIG, undecayed=undecayed(model))
    step = run_of("ours")
    seconds: dict[str, list[float]] = {}

    def take(kind: str, run: Callable[[], object]) -> None:
        dist.barrier()
        with stopwatch() as passed:
            run()
            dist.barrier()
            seconds.setdefault(kind, []).append(passed())

    for _ in range(ROUNDS + 1):
        take("flat", engine.state)
        take("by_tensor", lambda: _by_tensor(engine))
        take("step", lambda: timed(step))
        writer = CheckpointWriter(out.parent / "ours", Retention(1))
        take("standstill", lambda writer=writer: _hand_over(engine, writer))
        take("beside", lambda: timed(step))
        writer.finish()
        take("inline", lambda: _write(engine, out.parent / "inline"))
    if world.rank == 0:
        out.write_text(json.dumps({kind: each[1:] for kind, each in seconds.items()}))  # the first starts threads
    leave()


def _hand_over(engine: Engine, writer: CheckpointWriter) -> None:
    if state := engine.state():
        writer.submit(Checkpoint(1, 1, state, {}), frozenset())


def _write(engine: Engine, folder: Path) -> None:
    if state := engine.state():
        write_checkpoint(folder, Checkpoint(1, 1, state, {}))


def _by_tensor(engine: Engine) -> list[torch.Tensor]:
    """Parameters and moments by DeepSpeed's accessors of ZeRO 1 and 2, as one would gather them."""
    parameters: list[Any] = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    return [parameter.get_full_hp_param(key).cpu() for parameter in parameters for key in (None, *MOMENTS)]


if __name__ == "__main__":
    _measure(Path(sys.argv[1]))
