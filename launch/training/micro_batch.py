"""`--micro_batch_size auto`: the most rows that a rank can take through the model at once, found by trying.

Each rank tries by itself, on made-up rows, with a copy of the model that stands alone and room set aside for what
DeepSpeed will need: no rank waits for another whose memory was too small, and nothing of it stays. Then all take what
fits them all. Micro-batches change no result, so neither does what is found.

A CPU mostly lends more memory than it has and says nothing before it kills: there all rows are found to fit, unless
the system refuses to give memory (a limit by `ulimit -v`, say).
"""

from __future__ import annotations

import copy
import gc
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cluster.collectives import collect, together
from cluster.engine.config import EngineConfig, read_deepspeed_config
from cluster.world import World
from launch.config import TrainConfig
from launch.training.prepare import DEEPSPEED_CONFIG, Parts
from launch.training.step import Features, StepSettings, losses_and_gradient
from nsi.batch import Batch
from nsi.errors import UserError
from shards.loading.rows import SceneShape
from shards.order import rows_per_rank

AUTO = "auto"
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
GPU_MARGIN = 0.05  # of its memory: for NCCL, the libraries' workspaces, and pieces too small to use
BUCKET = 500_000_000  # elements of DeepSpeed's buffer for gradients on their way, by its default


def micro_rows(config: TrainConfig, world: World, device: torch.device, parts: Parts) -> int:
    """Rows of a micro-batch, by all ranks together: what the flag says, at most a rank's rows.

    Raises UserError where `auto` finds no number.
    """
    rows = rows_per_rank(config.optim.batch_size, world.size)
    wanted = config.optim.micro_batch_size
    if wanted != AUTO:
        return min(wanted or rows, rows)

    def find() -> int:
        batch = made_up_batch(rows, parts.shape, device)
        settings = StepSettings(
            config.loss,
            config.optim.seed,
            0,
            config.optim.batch_size,
            rows,
            parts.backbone.feature_dim,
            lambda own_R: torch.cat([own_R] * world.size),
        )
        reserve = reserved_bytes(parts.model, config.engine, world.size, device)
        return fitting_rows(parts.model, parts.backbone.to(device), batch, config.engine, settings, reserve)

    fitting = min(collect(together(find)))
    found = math.ceil(rows / math.ceil(rows / fitting))  # as many micro-batches, evenly
    if world.rank == 0:
        print(f"nsi train: --micro_batch_size auto: {found} of a rank's {rows} rows at once", file=sys.stderr)
    return found


def fitting_rows(
    model: nn.Module, backbone: Features, batch: Batch, engine: EngineConfig, settings: StepSettings, reserve: int
) -> int:
    """The largest micro-batch with which a step over `batch` fits into the memory of its device, by this rank alone.

    Each try is a forward and a backward of a copy of the model, with `reserve` bytes set aside. `settings.gather` must
    not wait for other ranks. Raises UserError where not even one row fits.
    """
    from accelerate.utils.memory import find_executable_batch_size, should_reduce_batch_size

    def attempt(micro: int) -> int:
        _empty_caches(batch.rows_B.device)  # of the try before, whose error held its tensors
        try:
            _try_step(model, backbone, batch, engine, settings, micro, reserve)
        except MemoryError:
            raise RuntimeError("CPU out of memory.") from None  # in the words that accelerate knows
        return micro

    try:
        return find_executable_batch_size(attempt, starting_batch_size=len(batch))()
    except RuntimeError as error:
        if not (should_reduce_batch_size(error) or "No executable batch size" in str(error)):
            raise
    finally:
        _empty_caches(batch.rows_B.device)
    if engine.zero_stage == 3:
        raise UserError(
            "--micro_batch_size auto: the whole model and one row do not fit into a rank's memory, where it is tried "
            "out before ZeRO 3 shares it out; give --micro_batch_size a number"
        )
    raise UserError(
        "--micro_batch_size auto: not even one row fits into a rank's memory; give --recompute, a higher --zero_stage "
        "or more GPUs"
    )


def reserved_bytes(model: nn.Module, engine: EngineConfig, world_size: int, device: torch.device) -> int:
    """What training holds on each rank besides weights, their gradients and activations, roughly and not too little:
    Adam's moments, float32 masters, a second copy of the gradients, DeepSpeed's buckets, and a margin on a GPU."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    shared = world_size if engine.zero_stage else 1
    width = 4 if engine.precision == "fp32" or not engine.zero_stage else 2
    needed = (8 + 4 * bool(engine.zero_stage)) * math.ceil(trained / shared) + width * trained
    if device.type == "cuda":
        zero = read_deepspeed_config(engine.deepspeed_config or DEEPSPEED_CONFIG).get("zero_optimization", {})
        if engine.zero_stage:
            needed += width * int(zero.get("reduce_bucket_size", BUCKET)) * (2 if zero.get("overlap_comm") else 1)
        needed += int(GPU_MARGIN * torch.cuda.get_device_properties(device).total_memory)
    return needed


def made_up_batch(rows: int, shape: SceneShape, device: torch.device) -> Batch:
    """Rows as training has them, each with as many objects as there may be, and noise to see."""
    random = torch.Generator().manual_seed(0)  # of its own: whatever else is drawn stays as it is
    images_BCHW = torch.randint(256, (rows, 3, shape.image_size, shape.image_size), generator=random, dtype=torch.uint8)
    features_BPF = scales_BP = None
    if shape.tokens:
        bits_BPF = torch.randint(-127, 128, (rows, shape.tokens.patches, shape.tokens.features), generator=random)
        features_BPF = bits_BPF.to(torch.int8 if shape.tokens.storage == "int8" else torch.bfloat16)
        scales_BP = torch.full(features_BPF.shape[:2], 1 / 127) if shape.tokens.storage == "int8" else None
    return Batch(
        torch.arange(rows),
        torch.ones(rows, dtype=torch.bool),
        images_BCHW,
        torch.zeros(rows, shape.max_objects, 3, dtype=torch.int64),
        torch.rand(rows, shape.max_objects, 3, generator=random),
        torch.ones(rows, shape.max_objects, dtype=torch.bool),
        tuple(map(str, range(rows))),
        features_BPF=features_BPF,
        feature_scales_BP=scales_BP,
    ).to(device)


def _try_step(
    model: nn.Module,
    backbone: Features,
    batch: Batch,
    engine: EngineConfig,
    settings: StepSettings,
    micro: int,
    reserve: int,
) -> None:
    """All of a step but the optimizer's part, with a copy of the model, which is thrown away."""
    device = batch.rows_B.device
    alone = copy.deepcopy(model)
    for module in alone.modules():
        if not inspect.ismethod(vars(module).get("forward")):  # methods were copied with their module
            vars(module).pop("forward", None)  # a compiled one would be that of the model itself
    half = HALF.get(engine.precision)
    alone.to(device, half if half and engine.zero_stage else None)
    set_aside = torch.empty(reserve, dtype=torch.uint8, device=device)
    autocast = torch.autocast(device.type, half, enabled=bool(half and not engine.zero_stage))
    losses_and_gradient(_Alone(alone, autocast), backbone, batch, 0, replace(settings, micro_rows=micro))
    del set_aside


class _Alone:
    """A module as a step sees an engine, without other ranks."""

    def __init__(self, module: Callable[..., Any], autocast: torch.autocast) -> None:
        self._module, self._autocast = module, autocast

    def forward(self, *inputs: Any) -> Any:
        with self._autocast:
            return self._module(*inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()


def _empty_caches(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
