"""Patch features in fewer bytes, for a store that is written once and read every epoch: bfloat16, or 8 bits each.

8 bits: symmetric, with one scale a patch, its largest feature divided by 127; a feature is off by half a scale at most.

Shapes: B images, P patches, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

INT8_LARGEST = 127


def pack(features_BPF: Tensor, storage: str) -> tuple[Tensor, Tensor | None]:
    """Features as they are stored: bfloat16 and None for "bf16", int8 and scales_BP (float32) for "int8"."""
    if storage == "bf16":
        return features_BPF.bfloat16(), None
    scales_BP = features_BPF.float().abs().amax(dim=-1) / INT8_LARGEST
    # Where all features are 0 any scale would do, but for the division.
    steps_BPF = features_BPF.float() / scales_BP.masked_fill(scales_BP == 0, 1.0)[..., None]
    return steps_BPF.round().clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8), scales_BP


def unpack(stored_BPF: Tensor, scales_BP: Tensor | None) -> Tensor:
    """features_BPF, float32, of what `pack` gave."""
    return stored_BPF.float() if scales_BP is None else stored_BPF.float() * scales_BP[..., None]
