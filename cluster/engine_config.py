"""What DeepSpeed is told: flags and a JSON file, and what each of the two may say."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.loss_scale import GOOD_STEPS_TO_DOUBLE, LOWEST, START
from nsi.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]
ZeroStage = Literal[0, 1, 2, 3]

# What flags decide; a file that decides them too would be a second truth.
_FLAG_KEYS = {
    "train_batch_size": "--batch_size",
    "train_micro_batch_size_per_gpu": "--micro_batch_size",
    "gradient_accumulation_steps": "--micro_batch_size",
    "gradient_clipping": "--grad_clip",
    "optimizer": "--lr",
    "scheduler": "--schedule",
    "bf16": "--precision",
    "fp16": "--precision",
    "torch_autocast": "--precision",
}


@dataclass(frozen=True)
class EngineConfig:
    """How the module is trained on the machine; none of it changes the mathematics but for the precision."""

    zero_stage: ZeroStage = 1
    """DeepSpeed ZeRO: 0 keeps everything everywhere, 1 shares out Adam's state, 2 the gradients too, 3 the parameters
    too. The losses are the same."""
    precision: Precision = "fp32"
    """Arithmetic of what is wide: the decoder, and the projections of patches. Slots, norms, softmaxes, scores and
    losses are float32 always. fp16 scales its loss as it goes, and leaves a step out where its gradients overflow."""
    recompute: bool = False
    """Compute the decoder's hidden layers again for the backward in place of keeping them: a third of the memory, and
    about a fifth more time. Changes no result."""
    compile: bool = False
    """torch.compile for slot attention, equal to rounding: meant for GPUs, a CPU gains nothing. Off under ZeRO 3 and,
    with one line of warning, where it fails."""
    deepspeed_config: Path | None = None
    """A DeepSpeed JSON to use in place of launch/deepspeed.json. Batch sizes, optimizer, clipping and precision belong
    to the flags."""


def read_deepspeed_config(path: Path) -> dict:
    """A DeepSpeed JSON. Raises UserError where it is no JSON or sets what belongs to a flag."""
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give --deepspeed_config a JSON file") from None
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds no JSON object; launch/deepspeed.json shows what it looks like")
    for key, flag in _FLAG_KEYS.items():
        if key in settings:
            raise UserError(f"{path}: sets {key}, which belongs to {flag}; remove it from the file")
    if "stage" in settings.get("zero_optimization", {}):
        raise UserError(f"{path}: sets zero_optimization.stage, which belongs to --zero_stage; remove it from the file")
    return settings


def engine_settings(
    base: dict, config: EngineConfig, world_size: int, micro_rows: int, micro_batches: int, grad_clip: float
) -> dict:
    """The complete DeepSpeed configuration: the file's settings and those that flags decide."""
    settings = dict(base)
    settings["zero_optimization"] = {**base.get("zero_optimization", {}), "stage": config.zero_stage}
    settings["train_micro_batch_size_per_gpu"] = micro_rows
    settings["gradient_accumulation_steps"] = micro_batches
    settings["train_batch_size"] = micro_rows * micro_batches * world_size
    settings["gradient_clipping"] = grad_clip
    if config.precision == "fp32":
        return settings
    if config.zero_stage == 0:
        # At stage 0 DeepSpeed's own starts with a dummy Adam step that moves the weights (deepspeed pull 5104).
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[config.precision]
        settings["torch_autocast"] = {"enabled": True, "dtype": dtype}
    elif config.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    else:
        settings["fp16"] = {
            "enabled": True,
            "loss_scale": 0,  # a dynamic one
            "initial_scale_power": int(math.log2(START)),
            "loss_scale_window": GOOD_STEPS_TO_DOUBLE,
            "hysteresis": 1,  # every overflow halves the scale, as torch's scaler does
            "min_loss_scale": LOWEST,
        }
    return settings
