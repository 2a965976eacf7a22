"""The one file that knows DeepSpeed: mixed precision, ZeRO, clipping and Adam around one module.

What comes in and goes out is free of DeepSpeed: losses, a learning rate, and a training state of whole float32
tensors that any world size, ZeRO stage and precision can load.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cluster.engine.clip import clip_apart
from cluster.engine.config import (
    EngineConfig,
    Precision,
    check_keys,
    engine_settings,
    first_trouble,
    read_deepspeed_config,
)
from cluster.engine.gathering import gather_state
from cluster.engine.loss_scale import GOOD_STEPS_TO_DOUBLE, LOWEST, LossScale, read_loss_scale, write_loss_scale
from cluster.engine.state import MOMENTS, TrainingState
from cluster.processes import use_gpus
from nsi.errors import UserError


class Stepped(NamedTuple):
    """What came of an optimizer step: the global gradient norm before clipping, and whether weights have changed.

    They have not where the norm is no finite number.
    """

    grad_norm: float
    applied: bool


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
        clip_only: tuple[str, ...] = (),
        undecayed: frozenset[str] = frozenset(),
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        """Takes the module from the CPU, on which it may be larger than a device is.

        `micro_rows` rows a forward, `micro_batches` forwards a step: DeepSpeed insists on their product.

        `clip_only`: how the names of the parameters begin that are clipped, by their own norm; empty for all.
        `undecayed`: the names of those that weight decay leaves alone. `lr_scales`: how names begin whose learning rate
        is so many times that of the others.
        """
        self._ds = _import_deepspeed(config.precision)
        self._stage = config.zero_stage
        self._micro_batches = micro_batches
        self._scale = float(world_size)
        settings = engine_settings(
            read_deepspeed_config(config.deepspeed_config or default_config),
            config,
            world_size,
            micro_rows,
            micro_batches,
            0.0 if clip_only else grad_clip,
        )
        optimizer = torch.optim.AdamW(parameter_groups(module, weight_decay, undecayed, lr_scales or {}), lr=0.0)
        if config.zero_stage == 3:
            _share_out(self._ds, module, config.precision, settings)
        self._engine, self._optimizer, _, _ = self._ds.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self._steps = 0
        # Now and not in the first step, after whose first group DeepSpeed links its views to the state of all groups.
        self._make_moments()
        self._clip_apart = [p for name, p in self._trained() if clip_only and name.startswith(clip_only)]
        self._grad_clip = grad_clip
        self._scaler = None
        if config.precision == "fp16":
            stage_0 = config.zero_stage == 0
            self._scaler = self._engine.torch_autocast_z0_gradscaler if stage_0 else self._optimizer.loss_scaler
            if stage_0:
                self._scaler.set_growth_interval(GOOD_STEPS_TO_DOUBLE)

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

    def step(self, lr: float) -> Stepped:
        """Clips, takes one Adam step, clears the gradients; does no more than the last where one is not finite.

        Raises UserError where fp16 gradients overflow at any loss scale.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        cut = 0.0
        if self._clip_apart and self._grad_clip:
            scale = self.loss_scale.scale if self.loss_scale else 1.0
            cut = clip_apart(self._clip_apart, self._grad_clip, self._stage, scale, self._ds.utils)
        if self._stage == 0:
            stepped = self._step_plainly()
        else:
            try:
                self._engine.step()
            except Exception as error:
                if "loss scale already at minimum" not in str(error):
                    raise
                raise _overflows_always() from None
            told = self._engine.get_global_grad_norm()  # a tensor, now and then
            norm = math.nan if told is None else float(told)
            finite = math.isfinite(norm) and norm >= 0  # -1 stands for one that is not
            stepped = Stepped(norm if finite else math.inf, finite)
        self._steps += stepped.applied
        return stepped._replace(grad_norm=math.hypot(stepped.grad_norm, math.sqrt(cut)))

    @property
    def loss_scale(self) -> LossScale | None:
        """The loss scale of fp16."""
        return read_loss_scale(self._scaler) if self._scaler is not None else None

    def state(self) -> TrainingState | None:
        """The whole training state, on rank 0; None on the others."""
        found = gather_state(self._optimizer, self._stage, dict(self._trained()))
        if found is None:
            return None
        return TrainingState(found.pop("parameters"), found, self._steps, self.loss_scale)

    def restore(self, state: TrainingState) -> None:
        """Sets the float32 parameters and Adam's state.

        The same parameters must have been loaded into the module before DeepSpeed took it: what is set here are the
        float32 masters, which DeepSpeed would otherwise round to the training precision.
        """
        self._steps = state.optimizer_steps
        for moments in self._adam.state.values():
            moments["step"].fill_(float(self._steps))
        if self._scaler is not None and state.loss_scale:
            write_loss_scale(self._scaler, state.loss_scale)
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

    @property
    def _adam(self) -> torch.optim.Optimizer:
        return self._optimizer if self._stage == 0 else self._optimizer.optimizer

    def _make_moments(self) -> None:
        """Gives Adam its state before its first step, and ZeRO 1 and 2 their views into it."""
        adam = self._adam
        # ZeRO 3 hands Adam one partition at a time and takes it away again.
        held = [tensor for group in adam.param_groups for tensor in group["params"]]
        for tensor in self._optimizer.fp32_partitioned_groups_flat if self._stage == 3 else held:
            adam.state[tensor] = {
                "step": torch.tensor(0.0),
                **{moment: torch.zeros_like(tensor, dtype=torch.float32) for moment in MOMENTS},
            }
        if self._stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self._engine.module.named_parameters() if p.requires_grad)

    def _step_plainly(self) -> Stepped:
        """ZeRO 0: DeepSpeed clips there without telling the norm, and steps whatever it is."""
        norm = torch.nn.utils.get_total_norm([p.grad for _, p in self._trained() if p.grad is not None]).item()
        if self.loss_scale:
            norm /= self.loss_scale.scale
            if self.loss_scale.scale < LOWEST:
                raise _overflows_always()
        if math.isfinite(norm) or self._scaler is not None:  # the scaler has to see what overflowed, and leaves it out
            self._engine.step()
        else:
            self._engine.zero_grad()
        return Stepped(norm, math.isfinite(norm))


def check_deepspeed_config(path: Path, config: EngineConfig) -> None:
    """Raises UserError, before anything is trained, where DeepSpeed would refuse a JSON, or pass over a key of it."""
    settings = read_deepspeed_config(path)
    deepspeed = _load_deepspeed()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    known = {
        **{name: field.annotation for name, field in DeepSpeedMonitorConfig.model_fields.items()},
        "zero_optimization": DeepSpeedZeroConfig,
        "comms_logger": CommsLoggerConfig,
        "timers": {"throughput": DeepSpeedThroughputTimerConfig},
        "flops_profiler": vars(DeepSpeedFlopsProfilerConfig({})),
        "aio": AIO_DEFAULT_DICT,
        "data_types": {"grad_accum_dtype": None, "keep_in_fp32_modules": None},
    }
    for section, content in settings.items():
        if section in known:
            check_keys(path, section, content, known[section])
    size = deepspeed.comm.get_world_size() if deepspeed.comm.is_initialized() else 1
    try:
        DeepSpeedConfig(engine_settings(settings, config, size, 1, 1, 1.0))
    except Exception as error:  # pydantic's, assertions, and whatever a value of the wrong kind leads to
        raise UserError(f"{path}: DeepSpeed does not take it ({first_trouble(error)}); correct the file") from None


def parameter_groups(
    module: nn.Module, weight_decay: float, undecayed: frozenset[str], lr_scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    """AdamW's groups: what is decayed, and what is not, by learning rate, as far as there is anything in them."""
    spared = undecayed if weight_decay else frozenset()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            scale = next((scale for start, scale in lr_scales.items() if name.startswith(start)), 1.0)
            groups.setdefault((scale, 0.0 if name in spared else weight_decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), parameters in groups.items()
    ]


def _share_out(deepspeed: Any, module: nn.Module, precision: Precision, settings: dict[str, Any]) -> None:
    """Gives every rank its pieces of a module under ZeRO 3, parameter by parameter.

    DeepSpeed would bring the whole module to each device first, and then cut it.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)  # DeepSpeed takes pieces as they are
    deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=dtype)
    module.to(deepspeed.get_accelerator().current_device_name())  # the buffers, which stay whole


def _overflows_always() -> UserError:
    return UserError("the gradients overflow in fp16 at any loss scale; go on with --precision bf16 or fp32")


def _load_deepspeed() -> Any:
    """Imports DeepSpeed, quietly."""
    if not use_gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    import deepspeed

    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return deepspeed


def _import_deepspeed(precision: Precision) -> Any:
    """Imports DeepSpeed and lets it join the process group, without the compilers that it starts on a CPU."""
    deepspeed = _load_deepspeed()
    # It would compile an operator that only inference uses, for up to a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
    if precision == "fp16" and not use_gpus():
        # torch has fp16 on a CPU since 2.5: slow, but enough to try a command on a laptop.
        accelerator: Any = deepspeed.get_accelerator()
        accelerator.is_fp16_supported = lambda: True
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, dist_init_required=None)
    return deepspeed
