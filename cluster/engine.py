"""The one file that knows DeepSpeed: mixed precision, ZeRO, clipping and Adam around one module.

What comes in and goes out is free of DeepSpeed: losses, a learning rate, and a training state of whole float32
tensors that any world size, ZeRO stage and precision can load.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cluster.processes import use_gpus
from nsi.errors import UserError

Precision = Literal["fp32", "bf16"]
ZeroStage = Literal[0, 1, 2, 3]

MOMENTS = ("exp_avg", "exp_avg_sq")
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
    """Arithmetic of the encoders. Scores and losses are float32 always."""
    deepspeed_config: Path | None = None
    """A DeepSpeed JSON to use in place of launch/deepspeed.json. Batch sizes, optimizer, clipping and precision belong
    to the flags."""


@dataclass(frozen=True)
class TrainingState:
    """All that training changes, by parameter name: whole float32 tensors on the CPU, and Adam's step count."""

    parameters: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]  # "exp_avg" and "exp_avg_sq"
    optimizer_steps: int


class Engine:
    """A module in training. Every method is called by all ranks together.

    `module` is what DeepSpeed wrapped; its weights were set before, so every precision and stage starts the same.
    """

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        world_size: int,
        micro_rows: int,
        micro_batches: int,
        grad_clip: float,
        weight_decay: float,
        default_config: Path,
    ) -> None:
        """`micro_rows` rows a forward, `micro_batches` forwards a step: DeepSpeed insists on their product."""
        self._ds = _import_deepspeed()
        self._stage = config.zero_stage
        self._micro_batches = micro_batches
        self._scale = float(world_size)
        settings = engine_settings(
            read_deepspeed_config(config.deepspeed_config or default_config),
            config,
            world_size,
            micro_rows,
            micro_batches,
            grad_clip,
        )
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=weight_decay)
        self._engine, self._optimizer, _, _ = self._ds.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self._steps = 0

    @property
    def module(self) -> nn.Module:
        """The module itself, for parameter names and for evaluation."""
        return self._engine.module

    def forward(self, *inputs: Any) -> Any:
        """The module's forward, with DeepSpeed's precision and parameter gathering around it."""
        return self._engine(*inputs)

    def eval(self) -> None:
        """Switches dropout off."""
        self._engine.eval()

    def train(self) -> None:
        """Switches dropout on."""
        self._engine.train()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the gradient of one micro-batch's share of the loss of the whole batch.

        Shares are plain sums: over micro-batches and ranks they add up to the loss. DeepSpeed takes means over both,
        hence the factors. `last` marks a step's last micro-batch, after which the ranks' gradients are reduced.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * (self._scale * self._micro_batches))

    def step(self, lr: float) -> float:
        """Clips, takes one Adam step, clears the gradients; returns the global gradient norm before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        # At stage 0 in float32 DeepSpeed clips without telling the norm.
        norm = self._plain_norm() if self._stage == 0 else None
        self._engine.step()
        self._steps += 1
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        return float(norm if norm is not None else torch.nan)

    def state(self) -> TrainingState:
        """The whole training state, gathered on every rank."""
        get = self._ds.utils
        parameters: dict[str, torch.Tensor] = {}
        moments: dict[str, dict[str, torch.Tensor]] = {moment: {} for moment in MOMENTS}
        if self._steps == 0:
            self._make_moments(0)
        for name, parameter in self._trained():
            if self._stage == 0:
                found = self._optimizer.state[parameter]
                parameters[name] = _whole(parameter)
                for moment in MOMENTS:
                    moments[moment][name] = _whole(found[moment])
                continue
            parameters[name] = _whole(get.safe_get_full_fp32_param(parameter))
            for moment in MOMENTS:
                moments[moment][name] = _whole(get.safe_get_full_optimizer_state(parameter, moment))
        return TrainingState(parameters, moments, self._steps)

    def restore(self, state: TrainingState) -> None:
        """Sets the float32 parameters and Adam's state.

        The same parameters must have been loaded into the module before DeepSpeed took it: what is set here are the
        float32 masters, which DeepSpeed would otherwise round to the training precision.
        """
        self._make_moments(state.optimizer_steps)
        self._steps = state.optimizer_steps
        for name, parameter in self._trained():
            if self._stage == 0:
                for moment in MOMENTS:
                    self._optimizer.state[parameter][moment].copy_(state.moments[moment][name])
                continue
            self._set(parameter, None, state.parameters[name])
            for moment in MOMENTS:
                self._set(parameter, moment, state.moments[moment][name])

    def _set(self, parameter: nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
        """Sets a float32 master (moment None) or one of its moments from the whole tensor."""
        tools = self._ds.utils
        value = value.to(parameter.device)
        if self._stage == 3:
            # DeepSpeed's setters of whole tensors forget that ZeRO 3 pads each parameter to a multiple of the world:
            # cut this rank's piece out of a padded copy instead.
            piece = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = value.new_zeros(piece * int(self._scale))
            padded[: value.numel()] = value.flatten()
            value = padded[self._engine.global_rank * piece :][:piece]
            set_parameter, set_moment = tools.safe_set_local_fp32_param, tools.safe_set_local_optimizer_state
        else:
            set_parameter, set_moment = tools.safe_set_full_fp32_param, tools.safe_set_full_optimizer_state
        if moment is None:
            set_parameter(parameter, value)
        else:
            set_moment(parameter, value, moment)

    def _make_moments(self, steps: int) -> None:
        """Gives Adam its state before its first step, and ZeRO 1 and 2 their views into it."""
        adam = self._optimizer if self._stage == 0 else self._optimizer.optimizer
        # ZeRO 3 hands Adam one partition at a time and takes it away again.
        held = [tensor for group in adam.param_groups for tensor in group["params"]]
        for tensor in self._optimizer.fp32_partitioned_groups_flat if self._stage == 3 else held:
            adam.state[tensor] = {
                "step": torch.tensor(float(steps)),
                **{moment: torch.zeros_like(tensor, dtype=torch.float32) for moment in MOMENTS},
            }
        if self._stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self._engine.module.named_parameters() if p.requires_grad)

    def _plain_norm(self) -> torch.Tensor:
        return torch.nn.utils.get_total_norm([p.grad for _, p in self._trained() if p.grad is not None])


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
    if config.precision == "bf16":
        # At stage 0 DeepSpeed's bf16 starts with a dummy Adam step that moves the weights (deepspeed pull 5104).
        if config.zero_stage == 0:
            settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        else:
            settings["bf16"] = {"enabled": True}
    return settings


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _import_deepspeed() -> Any:
    """Imports DeepSpeed quietly, and without the compilers that it starts on a CPU."""
    if not use_gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    import deepspeed

    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It would compile an operator that only inference uses, for up to a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, dist_init_required=None)
    return deepspeed
