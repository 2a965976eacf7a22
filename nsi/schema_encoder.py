"""The schema encoder: from the labels and positions of a scene's objects to one embedding for each.

The "program encoder" of arXiv 2403.07887: tables for size, shape and material, a layer for the position, then a
transformer without position encoding, since a schema is a set.

Shapes: B scenes, T objects (padded), D model width, E embedding, H heads, K = D / H.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsi.embedding_head import EmbeddingHead
from nsi.errors import UsageError
from nsi.layers import (
    EXPANSION,
    Activation,
    LayerNorm,
    Linear,
    activation_layer,
    in_full_precision,
    mlp,
    wide,
    xavier,
    xavier_mlp,
)
from nsi.noise import KeyedNoise
from nsi.schema import POSITION_RANGE


class SchemaEncoder(nn.Module):
    """Primitives into embeddings that know of the other primitives of their scene.

    `attend_padding` False: padding is masked, and real primitives' embeddings hang on real primitives alone. True:
    padding rows are attended to like objects, as the public code does: objects of the ids `padding_labels` at 0, 0, 0.
    """

    def __init__(
        self,
        vocabulary_counts: tuple[int, int, int],
        d_model: int,
        embed_dim: int,
        num_blocks: int,
        num_heads: int,
        dropout: float = 0.0,
        head_dropout: float = 0.0,
        attend_padding: bool = False,
        position_dims: int = 3,
        activation: Activation = "relu",
        padding_labels: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        super().__init__()
        self.attend_padding, self.position_dims = attend_padding, position_dims
        self.padding_labels = padding_labels
        known = all(0 <= label < count for label, count in zip(padding_labels, vocabulary_counts, strict=True))
        if attend_padding and not known:
            raise UsageError(f"--padding_labels {padding_labels}: the vocabulary has {vocabulary_counts} names")
        self.tables = nn.ModuleList(nn.Embedding(count, d_model) for count in vocabulary_counts)
        self.position = Linear(position_dims, d_model)
        self.activation = activation_layer(activation)
        self.fuse = mlp((len(vocabulary_counts) + 1) * d_model, d_model, d_model, activation)
        self.blocks = nn.ModuleList(
            Block(d_model, num_heads, dropout, f"schema_block_{index}", index == 0, activation)
            for index in range(num_blocks)
        )
        self.norm = LayerNorm(d_model)
        self.head = EmbeddingHead(d_model, embed_dim, head_dropout, "primitive_embedding", activation)

    def forward(
        self, labels_BT3: Tensor, positions_BT3: Tensor, objects_BT: Tensor, noise: KeyedNoise
    ) -> tuple[Tensor, Tensor]:
        """Returns embeddings_BTE and hidden_BTD, what the head is given. Both are finite in every row, those of
        padding and of scenes without an object too, but mean nothing there.

        labels_BT3 are ids (valid ones in padding as well), positions_BT3 metres, objects_BT True for real objects.
        """
        seen_BT = objects_BT
        if self.attend_padding:
            seen_BT = torch.ones_like(objects_BT)
            labels_BT3 = torch.where(objects_BT[..., None], labels_BT3, labels_BT3.new_tensor(self.padding_labels))
        lowest, highest = POSITION_RANGE
        unit_BTC = (positions_BT3[..., : self.position_dims] - lowest) / (highest - lowest)
        parts_BTD = [wide(table(labels_BT3[..., index])) for index, table in enumerate(self.tables)]
        parts_BTD.append(self.activation(self.position(unit_BTC.to(parts_BTD[0].dtype))))
        x_BTD = self.fuse(torch.cat(parts_BTD, dim=-1))
        with in_full_precision(x_BTD):
            for block in self.blocks:
                x_BTD = block(x_BTD, seen_BT, noise)
        hidden_BTD = self.norm(x_BTD)
        return self.head(hidden_BTD, noise), hidden_BTD


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(LN(x)), then x + MLP(LN(x)).

    `norm_residual` (the public code's first block): the first LayerNorm replaces the residual stream itself,
    x = LN(x); x + attention(x).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dropout: float,
        stream: str,
        norm_residual: bool,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"a model width of {d_model} doesn't split into {num_heads} heads")
        self.num_heads, self.dropout, self.stream, self.norm_residual = num_heads, dropout, stream, norm_residual
        self.norm_attention = LayerNorm(d_model)
        self.project_q = xavier(Linear(d_model, d_model, bias=False))
        self.project_k = xavier(Linear(d_model, d_model, bias=False))
        self.project_v = xavier(Linear(d_model, d_model, bias=False))
        self.project_out = xavier(Linear(d_model, d_model, bias=False))
        self.norm_mlp = LayerNorm(d_model)
        self.mlp = xavier_mlp(d_model, EXPANSION * d_model, d_model, activation)

    def forward(self, x_BTD: Tensor, seen_BT: Tensor, noise: KeyedNoise) -> Tensor:
        """x_BTD -> x_BTD; no primitive attends to one whose seen_BT is False."""
        normed_BTD = self.norm_attention(x_BTD)
        if self.norm_residual:
            x_BTD = normed_BTD
        x_BTD = x_BTD + self._drop(self._attend(normed_BTD, seen_BT, noise), noise, "attention")
        return x_BTD + self._drop(self.mlp(self.norm_mlp(x_BTD)), noise, "mlp")

    def _attend(self, x_BTD: Tensor, seen_BT: Tensor, noise: KeyedNoise) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (
            project(x_BTD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.project_q, self.project_k, self.project_v)
        )
        logits_BHTT = q_BHTK @ k_BHTK.transpose(-1, -2) * q_BHTK.shape[-1] ** -0.5
        # The lowest finite number, not -inf: beside any real primitive its weight is exactly 0, and where a scene
        # has none the weights are uniform, not NaN.
        logits_BHTT = logits_BHTT.masked_fill(~seen_BT[:, None, None], torch.finfo(logits_BHTT.dtype).min)
        weights_BHTT = self._drop(logits_BHTT.softmax(dim=-1), noise, "weights")
        return self.project_out((weights_BHTT @ v_BHTK).transpose(1, 2).flatten(-2))

    def _drop(self, x: Tensor, noise: KeyedNoise, part: str) -> Tensor:
        return noise.dropout(x, self.dropout, f"{self.stream}_{part}") if self.training else x
