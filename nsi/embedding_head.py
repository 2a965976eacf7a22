"""Linear layers as this model initialises them, and the head that both encoders end in.

Shapes: B rows, M members of a row (slots or primitives), D width of a member, E embedding.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from nsi.noise import KeyedNoise

EXPANSION = 4  # the hidden layer of a head or of a transformer block over its width


class EmbeddingHead(nn.Module):
    """Slots or primitives into the common space: y = linear(x); y + MLP(LayerNorm(y)) (arXiv 2403.07887).

    `stream` names this head's dropout noise, which falls on the MLP's output while training.
    """

    def __init__(self, in_dim: int, embed_dim: int, dropout: float, stream: str) -> None:
        super().__init__()
        self.dropout, self.stream = dropout, stream
        self.project = linear(in_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.mlp = mlp(embed_dim, EXPANSION * embed_dim, embed_dim)

    def forward(self, x_BMD: Tensor, noise: KeyedNoise) -> Tensor:
        """x_BMD -> embeddings_BME, in x's dtype. They aren't normalised: the score is a plain dot product."""
        y_BME = self.project(x_BMD)
        update_BME = self.mlp(self.norm(y_BME))
        if self.training:
            update_BME = noise.dropout(update_BME, self.dropout, self.stream)
        return y_BME + update_BME


def linear(in_dim: int, out_dim: int, bias: bool = True, then: Literal["nothing", "relu"] = "nothing") -> nn.Linear:
    """A linear layer with zero bias and Xavier-uniform weights, or Kaiming-uniform ones in front of a ReLU."""
    layer = nn.Linear(in_dim, out_dim, bias=bias)
    if then == "relu":
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    else:
        nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Linear, ReLU, Linear."""
    return nn.Sequential(linear(in_dim, hidden_dim, then="relu"), nn.ReLU(), linear(hidden_dim, out_dim))
