"""Small layers, the precision that they compute in, and how they start.

Narrow layers (slots, primitives, embeddings: all but the decoder and the projections of patches) compute in float32
whatever the weights are kept in and autocast says. They take a hundredth of a step's arithmetic, and recurrent states,
norms, scores and temperatures suffer most from bfloat16's three digits.

Starts follow the public code: slot attention and the transformer with Xavier and Kaiming weights and zero biases,
everything else as torch's own nn.Linear. The smaller weights of the latter keep the first scores near zero; with Xavier
in the embedding heads too, the contrastive loss starts ten times too high.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

EXPANSION = 4  # the hidden layer of a head or of a transformer block over its width

Activation = Literal["relu", "silu"]


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is so."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_full_precision(x: Tensor) -> torch.autocast:
    """A context in which autocast leaves the dtypes of x's device alone."""
    return torch.autocast(x.device.type, enabled=False)


class Linear(nn.Linear):
    """nn.Linear for narrow tensors: computes in float32 at least."""

    def forward(self, input: Tensor) -> Tensor:
        x = wide(input)
        with in_full_precision(x):
            return functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm for narrow tensors: computes in float32 at least."""

    def forward(self, input: Tensor) -> Tensor:
        x = wide(input)
        return functional.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class GRUCell(nn.GRUCell):
    """nn.GRUCell with a state in float32 at least (Cho et al. 2014, with torch's two biases)."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input (M, D) and hx (M, D), the state -> the next state."""
        assert hx is not None
        x, state = wide(input), wide(hx)
        w_i, w_h, b_i, b_h = (p.to(x.dtype) for p in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh))
        with in_full_precision(x):
            reset_i, keep_i, new_i = functional.linear(x, w_i, b_i).chunk(3, dim=-1)
            reset_h, keep_h, new_h = functional.linear(state, w_h, b_h).chunk(3, dim=-1)
        reset, keep = (reset_i + reset_h).sigmoid(), (keep_i + keep_h).sigmoid()
        new = (new_i + reset * new_h).tanh()
        return new + keep * (state - new)


def activation_layer(name: Activation) -> nn.Module:
    """ReLU, or SiLU (Elfwing et al. 2018)."""
    return {"relu": nn.ReLU, "silu": nn.SiLU}[name]()


def xavier(layer: nn.Linear, then: Literal["nothing", "activation"] = "nothing") -> nn.Linear:
    """The layer with zero bias and Xavier-uniform weights, or Kaiming-uniform ones in front of an activation."""
    if then == "activation":
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    else:
        nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def xavier_mlp(in_dim: int, hidden_dim: int, out_dim: int, activation: Activation = "relu") -> nn.Sequential:
    """Linear, activation, Linear, started by `xavier`, for narrow tensors."""
    return nn.Sequential(
        xavier(Linear(in_dim, hidden_dim), then="activation"),
        activation_layer(activation),
        xavier(Linear(hidden_dim, out_dim)),
    )


def mlp(in_dim: int, hidden_dim: int, out_dim: int, activation: Activation = "relu") -> nn.Sequential:
    """Linear, activation, Linear, as torch initialises them, for narrow tensors."""
    return nn.Sequential(Linear(in_dim, hidden_dim), activation_layer(activation), Linear(hidden_dim, out_dim))
