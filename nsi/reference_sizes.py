"""The sizes of the public NSI code's model, as its weights tell them. Keys are those of nsi/reference_names.py."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping

from torch import Tensor

from nsi.errors import UserError
from nsi.schema import LABELS

# By our name, the tensors that have a size and the axis along which they do.
_PLACES = {
    "slot_dim": {
        "slot_encoder.slot_attn.slot_mu": 2,
        "slot_encoder.slot_attn.slot_log_sigma": 2,
        "slot_encoder.slot_attn.slot_attention.norm_slots.weight": 0,
    },
    "embed_dim": {
        "slot_encoder.norm_embed.weight": 0,
        "slot_encoder.embed_proj.bias": 0,
        "program_encoder.norm_embed.weight": 0,
    },
    "mlp_hidden_size": {
        "slot_encoder.slot_attn.slot_attention.mlp.0.bias": 0,
        "slot_encoder.slot_attn.slot_attention.mlp.0.weight": 0,
        "slot_encoder.slot_attn.slot_attention.mlp.2.weight": 1,
    },
    "decoder_hidden_dim": {
        "slot_encoder.decoder.mlp.0.bias": 0,
        "slot_encoder.decoder.mlp.0.weight": 0,
        "slot_encoder.decoder.mlp.2.bias": 0,
    },
    "d_model": {f"program_encoder.{label}_embedding.weight": 1 for label in LABELS},
}


def reference_sizes(theirs: Mapping[str, Tensor]) -> dict[str, int]:
    """Sizes by the names of `ModelConfig`. UserError where no tensor tells one.

    Each is what most of three tensors have: so a damaged one is blamed when all are compared, and not the sound ones.
    """
    blocks = [re.match(r"program_encoder\.encoder\.blocks\.(\d+)\.", key) for key in theirs]
    sizes = {"num_blocks": max((int(block[1]) + 1 for block in blocks if block), default=0)}
    for name, places in _PLACES.items():
        found = [theirs[key].shape[axis] for key, axis in places.items() if key in theirs and theirs[key].ndim > axis]
        if not found:
            raise UserError(f"lacks {', '.join(places)}, or they have too few axes")
        sizes[name] = statistics.mode(found)
    return sizes


def size_along(theirs: Mapping[str, Tensor], key: str, axis: int, prefix: str = "") -> int:
    """The size of one tensor along an axis. UserError, which puts `prefix` before the key, where there is none."""
    if key not in theirs:
        raise UserError(f"lacks {prefix}{key}")
    shape = tuple(theirs[key].shape)
    if len(shape) <= axis:
        raise UserError(f"{prefix}{key} has the shape {shape}, which has too few axes")
    if not shape[axis]:
        raise UserError(f"{prefix}{key} has the shape {shape}, which is empty")
    return shape[axis]
