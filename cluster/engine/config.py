"""What DeepSpeed is told: flags and a JSON file, and what each of the two may say."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from cluster.engine.loss_scale import GOOD_STEPS_TO_DOUBLE, LOWEST, START
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
    "bfloat16": "--precision",
    "fp16": "--precision",
    "amp": "--precision",
    "torch_autocast": "--precision",
    "compile": "--compile",
    "activation_checkpointing": "--recompute",
    "zero_optimization.stage": "--zero_stage",
    "data_types.param_dtype": "--precision",
    "data_types.buffer_dtype": "--precision",
}
# What may have one value alone, and why: with others, losses or checkpoints were seen to be wrong, or nothing ran.
_ONLY: dict[str, tuple[Any, str]] = {
    "communication_data_type": ("fp32", "gradients are added up in fp32 or, without it, as --precision says"),
    "data_types.grad_accum_dtype": ("fp32", "gradients are added up in fp32 or, without it, as --precision says"),
    "gradient_allreduce_op": ("mean", "losses are scaled for the mean over the ranks"),
    "gradient_predivide_factor": (1.0, "the norm of the gradient comes out wrong under ZeRO 3"),
    "prescale_gradients": (False, "the norm of the gradient comes out wrong under ZeRO 3"),
    "managed_gradient_accumulation": (True, "DeepSpeed must be told where a step ends"),
    "zero_force_ds_cpu_optimizer": (False, "Adam is torch's, on any device"),
    "zero_optimization.compute_grad_norm": (True, "steps that are not finite are known by the norm"),
    "zero_optimization.legacy_stage1": (False, "DeepSpeed has dropped it"),
    "zero_optimization.module_granularity_threshold": (0, "ZeRO 3 then leaves parameters ungathered"),
    "zero_optimization.stage3_module_granularity_threshold": (0, "ZeRO 3 then leaves parameters ungathered"),
    "zero_optimization.offload_optimizer.super_offload": (False, "its Adam is none that checkpoints know"),
    "zero_optimization.round_robin_gradients": (False, "what a checkpoint restores would be in the wrong places"),
    "zero_optimization.zenflow": (None, "it puts off a part of the gradient, and losses are others"),
    "zero_optimization.zero_quantized_gradients": (False, "it rounds to 8 bits, and losses are others"),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, "it rounds to 8 bits, and losses are others"),
    "zero_optimization.zero_quantized_weights": (False, "it rounds to 8 bits, and losses are others"),
}
# What DeepSpeed knows and this program has no use for: it would be silently without effect, or stop the start.
_DATA, _SHARED = "the order of the data and its batches are the flags' alone", "every rank trains the whole model"
_USELESS = {
    **dict.fromkeys(("data_efficiency", "dataloader_drop_last", "vocabulary_size"), _DATA),
    **dict.fromkeys(("pipeline", "tensor_parallel", "expert_parallel", "sequence_parallel_size"), _SHARED),
    **dict.fromkeys(("use_data_before_expert_parallelism", "seq_parallel_communication_data_type"), _SHARED),
    **dict.fromkeys(("checkpoint", "datastates_ckpt"), "checkpoints have a format of their own"),
    **dict.fromkeys(("hybrid_engine", "weight_quantization"), "it is meant for inference"),
    "autotuning": "only DeepSpeed's launcher reads it",
    "zero_optimization.offload_optimizer.nvme_path": "checkpoints do not find what lies on NVMe; offload to the CPU",
    "zero_optimization.offload_param.nvme_path": "checkpoints do not find what lies on NVMe; offload to the CPU",
    **dict.fromkeys(
        ("compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula"),
        "DeepSpeed has dropped it",
    ),
    **dict.fromkeys(
        ("progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
        "DeepSpeed has dropped it",
    ),
}
# What is left of all that DeepSpeed 0.19 reads: it passes over other keys without a word.
_FREE = frozenset(
    {
        *("aio", "comet", "comms_logger", "csv_monitor", "data_types", "disable_allgather", "disable_python_gc"),
        *("dump_state", "flops_profiler", "log_level", "memory_breakdown", "steps_per_print", "tensorboard"),
        *("timers", "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer", "zero_optimization"),
    }
)
KNOWN_KEYS = _FREE | {key for key in (*_FLAG_KEYS, *_ONLY, *_USELESS) if "." not in key}


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
    about a fifth more time. The blocks of a trained backbone likewise. Changes no result."""
    compile: bool = False
    """torch.compile for slot attention, equal to rounding: meant for GPUs, a CPU gains nothing. Off under ZeRO 3 and,
    with one line of warning, where it fails."""
    deepspeed_config: Path | None = None
    """A DeepSpeed JSON to use in place of launch/deepspeed.json. Batch sizes, optimizer, clipping and precision belong
    to the flags."""


def read_deepspeed_config(path: Path) -> dict:
    """A DeepSpeed JSON. Raises UserError where it is none, has an unknown key, or sets what is not the file's to set.

    Keys inside a section are known to DeepSpeed alone: `cluster.engine` asks it.
    """
    try:
        settings = json.loads(path.read_text(), object_pairs_hook=_each_once)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give --deepspeed_config a JSON file") from None
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds no JSON object; launch/deepspeed.json shows what it looks like")
    for key in settings:
        if key not in KNOWN_KEYS:
            _refuse_unknown(path, key, KNOWN_KEYS - set(_FLAG_KEYS) - set(_USELESS))
    for section in ("zero_optimization", "data_types"):
        if not isinstance(settings.get(section, {}), dict):
            raise UserError(f"{path}: {section} must be an object with settings of its own, as launch/deepspeed.json's")
    for key, value in _flat(settings):
        if key in _FLAG_KEYS:
            raise UserError(f"{path}: sets {key}, which belongs to {_FLAG_KEYS[key]}; remove it from the file")
        if key in _USELESS:
            raise UserError(f"{path}: sets {key}, but {_USELESS[key]}; remove it from the file")
        if key in _ONLY and value != _ONLY[key][0]:
            only, reason = _ONLY[key]
            raise UserError(f"{path}: {key} can be {json.dumps(only)} alone: {reason}; remove it from the file")
    return settings


def check_keys(path: Path, place: str, content: Any, known: Any) -> None:
    """Raises UserError for a key that is not among `known`: a dictionary or a pydantic model, perhaps with more in it.

    `place` is the name of the section, dotted.
    """
    if not isinstance(content, dict):
        return
    fields = getattr(known, "model_fields", None)
    inner = dict(known) if fields is None else {name: field.annotation for name, field in fields.items()}
    for name, field in (fields or {}).items():
        inner[field.alias or name] = field.annotation
    for key, value in content.items():
        if key not in inner:
            _refuse_unknown(path, f"{place}.{key}", inner)
        models = [each for each in (inner[key], *get_args(inner[key])) if hasattr(each, "model_fields")]
        if models or isinstance(inner[key], dict):
            check_keys(path, f"{place}.{key}", value, models[0] if models else inner[key])


def first_trouble(error: Exception) -> str:
    """An error in one line; of pydantic's many, the first."""
    if not hasattr(error, "errors"):
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    first = error.errors()[0]  # type: ignore[attr-defined]
    return f"{'.'.join(map(str, first['loc'])) or type(error).__name__}: {first['msg']}"


def precision_note(config: EngineConfig) -> str | None:
    """What is to be said of how the precision comes about, where that is not as everywhere."""
    if config.precision == "fp32" or config.zero_stage:
        return None
    return f"precision {config.precision} at ZeRO stage 0: through torch.autocast, weights and Adam in float32"


def _refuse_unknown(path: Path, key: str, known: Iterable[str]) -> NoReturn:
    """`key` is dotted where it stands in a section, `known` are the names that may stand there."""
    section, _, name = key.rpartition(".")
    near = difflib.get_close_matches(name, sorted(known), 1, 0.5)
    advice = f"did you mean {'.'.join([*section.split('.'), near[0]]).lstrip('.')}?" if near else "remove it"
    raise UserError(f"{path}: DeepSpeed knows no {key}; {advice}")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in names if names.count(key) > 1)} is there twice")
    return content


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Each key, dotted where it stands in a section, with its value; a section comes before what it holds."""
    for name, value in settings.items():
        yield prefix + name, value
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")


def engine_settings(
    base: dict, config: EngineConfig, world_size: int, micro_rows: int, micro_batches: int, grad_clip: float
) -> dict:
    """The complete DeepSpeed configuration: the file's settings and those that flags decide."""
    settings = {"zero_force_ds_cpu_optimizer": False, **base}  # else offloading insists on an Adam that it compiles
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
