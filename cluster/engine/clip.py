"""Clips the gradient of some parameters alone, at any ZeRO stage: DeepSpeed itself clips all of them or none.

ZeRO 0 has whole gradients, ZeRO 1 and 2 fragments of a flat stretch, ZeRO 3 a padded piece of each parameter. DeepSpeed
has accessors that gather and set them, so a step costs one more all-reduce (ZeRO 3: all-gather) of these gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_NOTHING = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it


def clip_apart(parameters: Sequence[nn.Parameter], largest: float, stage: int, loss_scale: float, tools: Any) -> float:
    """Scales the reduced gradient of `parameters` so that its norm is at most `largest`.

    Called by all ranks between the last backward and the step. `tools` are `deepspeed.utils`; gradients are multiplied
    by `loss_scale`, norms are meant without it. Returns how much the squared norm has fallen; 0 where it is no finite
    number, which the step will see for itself.
    """
    full: list[Any] = [p.grad if stage == 0 else tools.safe_get_full_grad(p) for p in parameters]
    norm = float(torch.nn.utils.get_total_norm([gradient.float() for gradient in full])) / loss_scale
    factor = largest / (norm + _NOTHING)
    if not factor < 1:  # NaN too
        return 0.0
    for parameter, gradient in zip(parameters, full, strict=True):
        if stage == 0:
            gradient.mul_(factor)
        elif stage == 3:  # the setter of whole gradients forgets the padding, as in Engine._set
            tools.safe_set_local_grad(parameter, tools.safe_get_local_grad(parameter) * factor)
        else:
            tools.safe_set_full_grad(parameter, gradient * factor)
    return norm**2 * (1 - factor**2)
