"""The head that both encoders end in: slots and primitives into the space where they meet.

Shapes: B rows, M members of a row (slots or primitives), D width of a member, E embedding.
"""

from __future__ import annotations

from torch import Tensor, nn

from nsi.layers import EXPANSION, Activation, LayerNorm, Linear, mlp
from nsi.noise import KeyedNoise


class EmbeddingHead(nn.Module):
    """Slots or primitives into the common space: y = linear(x); y + MLP(LayerNorm(y)) (arXiv 2403.07887).

    `stream` names this head's dropout noise, which falls on the MLP's output while training.
    """

    def __init__(
        self, in_dim: int, embed_dim: int, dropout: float, stream: str, activation: Activation = "relu"
    ) -> None:
        super().__init__()
        self.dropout, self.stream = dropout, stream
        self.project = Linear(in_dim, embed_dim)
        self.norm = LayerNorm(embed_dim)
        self.mlp = mlp(embed_dim, EXPANSION * embed_dim, embed_dim, activation)

    def forward(self, x_BMD: Tensor, noise: KeyedNoise) -> Tensor:
        """x_BMD -> embeddings_BME, in float32 at least. They aren't normalised: the score is a plain dot product."""
        y_BME = self.project(x_BMD)
        update_BME = self.mlp(self.norm(y_BME))
        if self.training:
            update_BME = noise.dropout(update_BME, self.dropout, self.stream)
        return y_BME + update_BME
