"""The parameters of the public NSI code by its names, and ours: one table, read in both directions.

The public code saves two state dicts; a key here is the module's name, a dot and the state dict's key. The frozen ViT
that lies among them (`slot_encoder.encoder.*`) is no parameter and not named here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from nsi.errors import UserError

SLOT_ENCODER = (
    "slot_attention.",
    "slot_head.",
    "decoder.",
)  # how names begin that the public one has in its own module
FROZEN = "slot_encoder.encoder."  # how keys of the frozen ViT begin; timm's names follow

# How ours begin, how the public ones begin: the first that fits counts.
_BEGINNINGS = (
    ("slot_attention.slot_mu", "slot_encoder.slot_attn.slot_mu"),
    ("slot_attention.slot_log_sigma", "slot_encoder.slot_attn.slot_log_sigma"),
    ("slot_attention.input_norm.", "slot_encoder.slot_attn.layer_norm."),
    ("slot_attention.input_mlp.", "slot_encoder.slot_attn.mlp."),
    ("slot_attention.", "slot_encoder.slot_attn.slot_attention."),
    ("slot_head.project.", "slot_encoder.embed_proj."),
    ("slot_head.norm.", "slot_encoder.norm_embed."),
    ("slot_head.mlp.", "slot_encoder.embed_mlp."),
    ("decoder.positions", "slot_encoder.decoder.postional_encoding.weight"),  # sic
    ("decoder.first_", "slot_encoder.decoder.mlp.0."),
    ("decoder.hidden.0.", "slot_encoder.decoder.mlp.2."),
    ("decoder.hidden.1.", "slot_encoder.decoder.mlp.4."),
    ("decoder.alpha.", "slot_encoder.decoder.mlp.6."),  # its first row
    ("decoder.features.", "slot_encoder.decoder.mlp.6."),  # the others
    ("schema_encoder.tables.0.", "program_encoder.size_embedding."),
    ("schema_encoder.tables.1.", "program_encoder.shape_embedding."),
    ("schema_encoder.tables.2.", "program_encoder.material_embedding."),
    ("schema_encoder.position.", "program_encoder.pos_embedding.0."),
    ("schema_encoder.fuse.", "program_encoder.program_embed."),
    ("schema_encoder.blocks.", "program_encoder.encoder.blocks."),
    ("schema_encoder.norm.", "program_encoder.encoder.layer_norm."),
    ("schema_encoder.head.project.", "program_encoder.embed_proj."),
    ("schema_encoder.head.norm.", "program_encoder.norm_embed."),
    ("schema_encoder.head.mlp.", "program_encoder.embed_mlp."),
)
_INSIDE_A_BLOCK = (
    (".project_out.", ".attn.proj_o."),
    (".project_", ".attn.proj_"),
    (".norm_attention.", ".attn_layer_norm."),
    (".norm_mlp.", ".ffn_layer_norm."),
    (".mlp.", ".ffn."),
)


def reference_key(name: str) -> str:
    """The public key of a parameter of ours; a KeyError for one that the public code does not have."""
    for ours, theirs in _BEGINNINGS:
        if name.startswith(ours):
            key = theirs + name[len(ours) :]
            break
    else:
        raise KeyError(name)
    if ours == "schema_encoder.blocks.":
        inside = next(pair for pair in _INSIDE_A_BLOCK if pair[0] in key)
        key = key.replace(*inside)
    return key


def by_reference_key(names: Iterable[str]) -> dict[str, list[str]]:
    """Our parameters under their public key: one each, or the decoder's alpha and features, in that order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(reference_key(name), []).append(name)
    return {key: sorted(names) for key, names in found.items()}


def from_reference(model: nn.Module, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's parameters out of the public code's tensors, by our names, in the model's dtype.

    Raises UserError for the first key that is missing, of another shape, or left over.
    """
    ours = dict(model.named_parameters())
    keys = by_reference_key(ours)
    found: dict[str, Tensor] = {}
    for key, names in sorted(keys.items()):
        wanted = _reference_shape(key, [ours[name] for name in names])
        if key not in theirs:
            raise UserError(f"lacks {key}, whose shape would be {wanted}")
        if tuple(theirs[key].shape) != wanted:
            raise UserError(f"{key} has the shape {tuple(theirs[key].shape)}, this model wants {wanted}")
        rows = [len(ours[name]) for name in names]
        pieces = theirs[key].split(rows) if len(names) > 1 else [theirs[key]]
        for name, piece in zip(names, pieces, strict=True):
            found[name] = piece.reshape(ours[name].shape).to(ours[name].dtype)
    if left_over := sorted(theirs.keys() - keys.keys()):
        shape = tuple(theirs[left_over[0]].shape)
        raise UserError(f"has {left_over[0]} of the shape {shape}, which this model does not have")
    return found


def _reference_shape(key: str, ours: list[nn.Parameter]) -> tuple[int, ...]:
    if key in ("slot_encoder.slot_attn.slot_mu", "slot_encoder.slot_attn.slot_log_sigma"):
        return (1, 1, *ours[0].shape)  # the public code broadcasts them over images and slots
    return (sum(len(part) for part in ours), *ours[0].shape[1:])
