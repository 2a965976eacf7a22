"""The model: patch features and schemas in; slots, embeddings of both sides and the reconstruction error out.

Dedhia and Jha, "Neural Slot Interpreters", TMLR 2025, arXiv 2403.07887. The frozen backbone stands before it
(nsi/backbone.py), or in it where it is trained too (nsi/finetuned.py); the score and the loss stand behind it: the
score spans all ranks, the model one rank's rows.

Shapes: B rows, P patches, F features, N slots, D slot width, T objects (padded), E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from nsi.decoder import BroadcastDecoder
from nsi.embedding_head import EmbeddingHead
from nsi.errors import UsageError
from nsi.layers import Activation, wide
from nsi.noise import KeyedNoise
from nsi.schema_encoder import SchemaEncoder
from nsi.slot_attention import SlotAttention, SlotStart

LOWEST_TAU = 0.01  # of a learned temperature: below it the loss hangs on single scores


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
    padding_labels: tuple[int, int, int] = (0, 0, 0)
    """Ids of size, shape and material of the objects that padding is with --attend_padding. In the public code they are
    its 0, 0, 0, which `nsi import-reference` turns into ours."""
    position_std: float = 0.02
    """Standard deviation of the decoder's position table at the start (1.0 in the public code)."""
    position_dims: Literal[2, 3] = 3
    """Coordinates of a position that the schema encoder sees: 3 for x, y, z; 2 for x, y (z tells the size)."""
    slot_start: SlotStart = "noise"
    """Where slots start: drawn from one learned Gaussian, or each at a learned place of its own (Jia et al. 2023)."""
    bilevel: bool = False
    """Gradient through the last iteration of slot attention alone (Chang et al. 2022, Jia et al. 2023)."""
    activation: Activation = "relu"
    """Of all hidden layers: relu, as in the public code, or silu."""
    learned_tau: bool = False
    """Learn the temperature, beginning at --tau and not below 0.01 (Radford et al. 2021, CLIP)."""

    def __post_init__(self) -> None:
        may_be_zero = ("num_blocks", "dropout", "schema_dropout", "position_std")
        for name, value in vars(self).items():
            if isinstance(value, (bool, str, tuple)):
                continue
            if not value >= 0 or (value == 0 and name not in may_be_zero):
                raise UsageError(f"--{name} {value}: must be {'at least' if name in may_be_zero else 'above'} 0")
        for width, heads in (("slot_dim", "num_slot_heads"), ("d_model", "num_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise UsageError(f"--{width} {getattr(self, width)} is no multiple of --{heads} {getattr(self, heads)}")
        for name in ("dropout", "schema_dropout"):
            if getattr(self, name) >= 1:
                raise UsageError(f"--{name} {getattr(self, name)}: must be below 1")
        choices_of = {"position_dims": (2, 3), "slot_start": get_args(SlotStart), "activation": get_args(Activation)}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"--{name} {getattr(self, name)}: {' or '.join(map(str, choices))}")


class Output(NamedTuple):
    """What one forward gives, a tuple of tensors because DeepSpeed walks over outputs."""

    slots_BND: Tensor
    slot_embeddings_BNE: Tensor
    primitive_embeddings_BTE: Tensor  # without meaning where there is no object
    alphas_BNP: Tensor  # the decoder's masks; they sum to 1 over the slots. Empty where nothing is reconstructed
    attention_BNP: Tensor  # slot attention's own masks, of its last iteration; they sum to 1 over the slots
    squared_error_B: Tensor  # of the reconstruction: summed over F, mean over P; float32 at the least. Empty likewise
    tau_1: Tensor  # the temperature of the contrastive loss, learned or not


class NeuralSlotInterpreter(nn.Module):
    """Both encoders and the decoder in one module, since DeepSpeed takes one. All that it holds is trained, and
    every parameter takes part in every forward with a gradient (ZeRO 3 waits for ever for one that doesn't)."""

    def __init__(
        self,
        config: ModelConfig,
        feature_dim: int,
        num_patches: int,
        vocabulary_counts: tuple[int, int, int],
        tau: float = 0.1,
        recompute: bool = False,
    ) -> None:
        """`tau` is the temperature, or where it begins if it is learned. `recompute`: the decoder keeps none of its
        hidden layers for the backward."""
        super().__init__()
        self.config, self.tau = config, tau
        self.slot_attention = SlotAttention(
            feature_dim,
            config.slot_dim,
            config.mlp_hidden_size,
            config.num_iterations,
            config.num_slot_heads,
            config.num_slots,
            config.slot_start,
            config.bilevel,
            config.activation,
        )
        self.slot_head = EmbeddingHead(
            config.slot_dim, config.embed_dim, config.dropout, "slot_embedding", config.activation
        )
        self.decoder = BroadcastDecoder(
            config.slot_dim,
            feature_dim,
            num_patches,
            config.decoder_hidden_dim,
            config.decoder_depth,
            config.position_std,
            config.activation,
            recompute,
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
            activation=config.activation,
            padding_labels=config.padding_labels,
        )
        if config.learned_tau:
            # Of the change, which begins at 0: bfloat16 is finest there. (1,), since DeepSpeed takes no 0-d parameter.
            self.log_tau_change_1 = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        features_BPF: Tensor,
        labels_BT3: Tensor,
        positions_BT3: Tensor,
        objects_BT: Tensor,
        noise: KeyedNoise,
        reconstruct: bool = True,
        target: Callable[[], Tensor] | None = None,
    ) -> Output:
        """One pass over both sides of B scenes. Rows never mix. Features and positions of any float dtype.

        `reconstruct`: without it only what embeddings need is computed. `target` gives the features to reconstruct
        where they are others than those that slots are made of.
        """
        # DeepSpeed's bf16 casts parameters, not what comes in; a parameter knows its dtype even where ZeRO 3 has
        # left it without values.
        dtype = next(self.parameters()).dtype
        noise_BND = noise.normal("slots", (self.config.num_slots, self.config.slot_dim))
        slots_BND, attention_BNP = self.slot_attention(features_BPF.to(dtype), noise_BND)
        primitive_embeddings_BTE, _ = self.schema_encoder(labels_BT3, positions_BT3, objects_BT, noise)
        slot_embeddings_BNE = self.slot_head(slots_BND, noise)
        alphas_BNP = squared_error_B = slots_BND.new_empty(0)
        if reconstruct:  # last, so that a pass without it is the beginning of one with it: ZeRO 3 prefetches in order
            reconstruction_BPF, alphas_BNP = self.decoder(slots_BND.to(dtype))
            squared_error_B = squared_error(reconstruction_BPF, target() if target else features_BPF)
        return Output(
            slots_BND=slots_BND,
            slot_embeddings_BNE=slot_embeddings_BNE,
            primitive_embeddings_BTE=primitive_embeddings_BTE,
            alphas_BNP=alphas_BNP,
            attention_BNP=attention_BNP,
            squared_error_B=squared_error_B,
            tau_1=self._tau(slot_embeddings_BNE),
        )

    def _tau(self, like: Tensor) -> Tensor:
        """tau_1 in the dtype and on the device of another tensor."""
        if not self.config.learned_tau:
            return like.new_full((1,), self.tau)
        tau_1 = self.tau * wide(self.log_tau_change_1).exp()
        floored_1: Tensor = _AtLeast.apply(tau_1, min(self.tau, LOWEST_TAU))  # pyright: ignore[reportAssignmentType]
        return floored_1.to(like.dtype)


class _AtLeast(torch.autograd.Function):
    """A clamp from below whose gradient still leads back up: torch's own would hold what has reached the floor."""

    @staticmethod
    def forward(ctx, x: Tensor, floor: float) -> Tensor:
        ctx.save_for_backward(x <= floor)
        return x.clamp(min=floor)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        (at_floor,) = ctx.saved_tensors
        return grad.masked_fill(at_floor & (grad > 0), 0), None  # descent would go further down


def undecayed(model: nn.Module) -> frozenset[str]:
    """The names of the parameters that weight decay leaves alone: all but the weights of linear layers.

    Norms and biases, since decay would change what a layer can say and not how much it varies; and what is looked up
    and not multiplied: the tables of the schema, the decoder's positions, where slots start, the temperature. timm's
    models name their own: tokens and position embeddings.
    """
    tables = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, (nn.Embedding, nn.LayerNorm))
    }
    for name, module in model.named_modules():
        declared: Callable[[], Iterable[str]] = getattr(module, "no_weight_decay", tuple)
        tables |= {f"{name}.{own}" for own in declared()}
    looked_up = ("positions", "slot_starts")
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim < 2 or name in tables or name.rpartition(".")[2] in looked_up
    )


def load_trained(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Sets the trained parameters; what is frozen stays. A RuntimeError, torch's own, names those that are missing,
    left over or of another shape."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name: tensor for name, tensor in model.state_dict().items() if name not in trained}
    model.load_state_dict({**frozen, **parameters})


def squared_error(reconstruction_BPF: Tensor, features_BPF: Tensor) -> Tensor:
    """squared_error_B: squared differences summed over F, mean over P; in float32 or float64."""
    return (wide(reconstruction_BPF) - wide(features_BPF)).square().sum(dim=-1).mean(dim=-1)
