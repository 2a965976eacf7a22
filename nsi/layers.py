"""Small layers and how they start, which follows the public code: slot attention and the transformer with Xavier and
Kaiming weights and zero biases, everything else as torch's own nn.Linear. The smaller weights of the latter keep the
first scores near zero; with Xavier in the embedding heads too, the contrastive loss starts ten times too high.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

EXPANSION = 4  # the hidden layer of a head or of a transformer block over its width


def xavier_linear(
    in_dim: int, out_dim: int, bias: bool = True, then: Literal["nothing", "relu"] = "nothing"
) -> nn.Linear:
    """A linear layer with zero bias and Xavier-uniform weights, or Kaiming-uniform ones in front of a ReLU."""
    layer = nn.Linear(in_dim, out_dim, bias=bias)
    if then == "relu":
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    else:
        nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def xavier_mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Linear, ReLU, Linear, of `xavier_linear`."""
    return nn.Sequential(xavier_linear(in_dim, hidden_dim, then="relu"), nn.ReLU(), xavier_linear(hidden_dim, out_dim))


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Linear, ReLU, Linear, as torch initialises them."""
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim))
