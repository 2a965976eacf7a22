"""The state of a training, free of DeepSpeed, of the world's size and of the ZeRO stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.engine.loss_scale import LossScale

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainingState:
    """All that training changes, by parameter name: whole float32 tensors on the CPU, and Adam's step count."""

    parameters: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]  # "exp_avg" and "exp_avg_sq"
    optimizer_steps: int
    loss_scale: LossScale | None = None  # of fp16
