"""The model: patch features and schemas in; slots, embeddings of both sides and the reconstruction error out.

Dedhia and Jha, "Neural Slot Interpreters", TMLR 2025, arXiv 2403.07887. The frozen backbone stands before it
(nsi/backbone.py), the score and the loss behind it: the score spans all ranks, the model one rank's rows.

Shapes: B rows, P patches, F features, N slots, D slot width, T objects (padded), E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from nsi.decoder import BroadcastDecoder
from nsi.embedding_head import EmbeddingHead
from nsi.errors import UsageError
from nsi.noise import KeyedNoise
from nsi.schema_encoder import SchemaEncoder
from nsi.slot_attention import SlotAttention


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of the model; ones that do not fit together raise a UserError."""

    num_slots: int = 15
    """Slots an image."""
    num_iterations: int = 5
    """Rounds of slot attention."""
    num_slot_heads: int = 1
    """Heads of slot attention; divides slot_dim."""
    slot_dim: int = 192
    """Width of a slot."""
    mlp_hidden_size: int = 192
    """Hidden width of the MLP on the slots."""
    embed_dim: int = 64
    """Width of the space in which slots and primitives meet."""
    num_blocks: int = 8
    """Transformer blocks of the schema encoder; 0 leaves each primitive to itself."""
    d_model: int = 192
    """Width of the schema encoder."""
    num_heads: int = 8
    """Attention heads of the schema encoder; divides d_model."""
    dropout: float = 0.1
    """Dropout in the two embedding heads."""
    schema_dropout: float = 0.0
    """Dropout in the schema encoder's transformer."""
    decoder_hidden_dim: int = 1024
    """Width of the decoder's hidden layers."""
    decoder_depth: int = 3
    """Hidden layers of the decoder."""
    hidden_dim: int = 192
    """Without effect: the public code takes this flag and uses it nowhere; kept so that its commands work."""
    attend_padding: bool = False
    """Let the schema encoder attend to padding as if it were objects, as the public code does."""
    position_std: float = 0.02
    """Standard deviation of the decoder's position table at the start (1.0 in the public code)."""
    position_dims: Literal[2, 3] = 3
    """Coordinates of a position that the schema encoder sees: 3 for x, y, z; 2 for x, y (z tells the size)."""

    def __post_init__(self) -> None:
        may_be_zero = ("num_blocks", "dropout", "schema_dropout", "attend_padding", "position_std")
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name not in may_be_zero):
                raise UsageError(f"--{name} {value}: must be {'at least' if name in may_be_zero else 'above'} 0")
        for width, heads in (("slot_dim", "num_slot_heads"), ("d_model", "num_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise UsageError(f"--{width} {getattr(self, width)} is no multiple of --{heads} {getattr(self, heads)}")
        for name in ("dropout", "schema_dropout"):
            if getattr(self, name) >= 1:
                raise UsageError(f"--{name} {getattr(self, name)}: must be below 1")
        if self.position_dims not in (2, 3):
            raise UsageError(f"--position_dims {self.position_dims}: 2 or 3")


class Output(NamedTuple):
    """What one forward gives, a tuple of tensors because DeepSpeed walks over outputs."""

    slots_BND: Tensor
    slot_embeddings_BNE: Tensor
    primitive_embeddings_BTE: Tensor  # without meaning where there is no object
    alphas_BNP: Tensor  # the decoder's masks; they sum to 1 over the slots
    attention_BNP: Tensor  # slot attention's own masks, of its last iteration; they sum to 1 over the slots
    squared_error_B: Tensor  # of the reconstruction: summed over F, mean over P; float32 at the least


class NeuralSlotInterpreter(nn.Module):
    """Both encoders and the decoder in one module, since DeepSpeed takes one. All that it holds is trained, and
    every parameter takes part in every forward (ZeRO 3 waits for ever for one that doesn't)."""

    def __init__(
        self, config: ModelConfig, feature_dim: int, num_patches: int, vocabulary_counts: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.config = config
        self.slot_attention = SlotAttention(
            feature_dim, config.slot_dim, config.mlp_hidden_size, config.num_iterations, config.num_slot_heads
        )
        self.slot_head = EmbeddingHead(config.slot_dim, config.embed_dim, config.dropout, stream="slot_embedding")
        self.decoder = BroadcastDecoder(
            config.slot_dim,
            feature_dim,
            num_patches,
            config.decoder_hidden_dim,
            config.decoder_depth,
            config.position_std,
        )
        self.schema_encoder = SchemaEncoder(
            vocabulary_counts,
            config.d_model,
            config.embed_dim,
            config.num_blocks,
            config.num_heads,
            dropout=config.schema_dropout,
            head_dropout=config.dropout,
            attend_padding=config.attend_padding,
            position_dims=config.position_dims,
        )

    def forward(
        self, features_BPF: Tensor, labels_BT3: Tensor, positions_BT3: Tensor, objects_BT: Tensor, noise: KeyedNoise
    ) -> Output:
        """One pass over both sides of B scenes. Rows never mix. Features and positions of any float dtype."""
        # DeepSpeed's bf16 casts parameters, not what comes in; a parameter knows its dtype even where ZeRO 3 has
        # left it without values.
        features_BPF = features_BPF.to(next(self.parameters()).dtype)
        noise_BND = noise.normal("slots", (self.config.num_slots, self.config.slot_dim))
        slots_BND, attention_BNP = self.slot_attention(features_BPF, noise_BND)
        reconstruction_BPF, alphas_BNP = self.decoder(slots_BND)
        primitive_embeddings_BTE, _ = self.schema_encoder(labels_BT3, positions_BT3, objects_BT, noise)
        return Output(
            slots_BND=slots_BND,
            slot_embeddings_BNE=self.slot_head(slots_BND, noise),
            primitive_embeddings_BTE=primitive_embeddings_BTE,
            alphas_BNP=alphas_BNP,
            attention_BNP=attention_BNP,
            squared_error_B=squared_error(reconstruction_BPF, features_BPF),
        )


def squared_error(reconstruction_BPF: Tensor, features_BPF: Tensor) -> Tensor:
    """squared_error_B: squared differences summed over F, mean over P; in float32 or float64."""
    dtype = torch.promote_types(features_BPF.dtype, torch.float32)
    return (reconstruction_BPF.to(dtype) - features_BPF.to(dtype)).square().sum(dim=-1).mean(dim=-1)
