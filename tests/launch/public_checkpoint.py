"""A checkpoint as the public NSI code saves it, drawn at random, and what that code computes with it.

The computation is written down from the public description with the public code's own names and ids, in plain
functions on its tensors: none of the product's modules takes part.

Shapes: B scenes, T objects (padded), N slots, P patches, D slot width, E embedding.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from nsi.schema import Vocabulary
from shards.writing.vocabulary import known_materials

VIT, IMAGE_SIZE, PATCHES = "test_vit", 64, 16  # timm's own tiny one: patches of 16, width 64
SLOTS, ITERATIONS, HEADS = 5, 3, 4
# The goldens' shapes, with another feature size, patches and a narrower decoder.
OTHER_SIZES = {48: 64, 49: 65, 784: PATCHES, 1024: 24}
GOLDENS = Path(__file__).parents[1] / "golden" / "reference_goldens.json"

State = dict[str, dict[str, torch.Tensor]]


def make_state() -> State:
    """Both state dicts, with the frozen ViT in the first."""
    generator = torch.Generator().manual_seed(5)
    state: State = {}
    for module, shapes in json.loads(GOLDENS.read_text())["parameters"].items():
        state[module] = {}
        for key, shape in shapes:
            shape = [OTHER_SIZES.get(size, size) for size in shape]
            drawn = torch.randn(shape, generator=generator)
            scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
            centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            state[module][key] = drawn * scale + centre
    torch.manual_seed(6)
    vit = timm.create_model(VIT, pretrained=False, img_size=IMAGE_SIZE, num_classes=0)
    state["slot_encoder"] |= {f"encoder.{key}": value for key, value in vit.state_dict().items()}
    return state


def make_names(vocabulary: Vocabulary) -> dict[str, dict[str, int]]:
    """A program2label.json's content: 60 materials in no order, those of `vocabulary` among them."""
    order = random.Random(3)
    others = sorted(known_materials() - set(vocabulary.materials))
    materials = [*vocabulary.materials, *others][:60]
    lists = {
        "sizes": ["small", "medium", "large"],
        "shapes": ["cube", "cylinder", "sphere", "monkey"],
        "materials": [materials[0], *order.sample(materials[1:], 59)],
    }
    return {kind: {name: label for label, name in enumerate(names)} for kind, names in lists.items()}


def features(state: State, pictures: list[Image.Image]) -> torch.Tensor:
    """features_BPF of pictures: made 128 square, then 64, and shown to the ViT as they are, in [0, 1]."""
    square = [picture.convert("RGB").resize((128, 128), Image.Resampling.HAMMING) for picture in pictures]
    small = [np.asarray(picture.resize((IMAGE_SIZE,) * 2, Image.Resampling.BICUBIC)) for picture in square]
    images_B3HW = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 255
    vit: Any = timm.create_model(VIT, pretrained=False, img_size=IMAGE_SIZE, num_classes=0).eval()
    frozen = {k.removeprefix("encoder."): v for k, v in state["slot_encoder"].items() if k.startswith("encoder.")}
    vit.load_state_dict(frozen)
    with torch.no_grad():
        return vit.forward_features(images_B3HW)[:, 1:]


def slot_embeddings(state: State, features_BPF: torch.Tensor, noise_BND: torch.Tensor) -> torch.Tensor:
    """slot_embeddings_BNE of features and standard normal noise."""
    w = state["slot_encoder"]
    inner = "slot_attn.slot_attention"
    x = _mlp(w, "slot_attn.mlp", _norm(w, "slot_attn.layer_norm", features_BPF))
    x = _norm(w, f"{inner}.norm_inputs", x)
    k, v = (x @ w[f"{inner}.project_{name}.weight"].T for name in "kv")
    B, N, D = noise_BND.shape
    slots = w["slot_attn.slot_mu"] + w["slot_attn.slot_log_sigma"].exp() * noise_BND
    for _ in range(ITERATIONS):
        q = _norm(w, f"{inner}.norm_slots", slots) @ w[f"{inner}.project_q.weight"].T
        attention_BNP = (q @ (k * D**-0.5).transpose(1, 2)).softmax(dim=1) + 1e-8
        updates = (attention_BNP / attention_BNP.sum(dim=2, keepdim=True)) @ v
        cell = torch.nn.GRUCell(D, D)
        cell.load_state_dict({n: w[f"{inner}.gru.{n}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")})
        slots = cell(updates.reshape(B * N, D), slots.reshape(B * N, D)).view(B, N, D)
        slots = slots + _mlp(w, f"{inner}.mlp", _norm(w, f"{inner}.norm_mlp", slots))
    return _head(w, slots)


def primitive_embeddings(state: State, labels_BT6: torch.Tensor) -> torch.Tensor:
    """primitive_embeddings_BTE of (size, shape, material, x, y, z) by the public ids; padding is all zeros."""
    w = state["program_encoder"]
    tables = [w[f"{name}_embedding.weight"] for name in ("size", "shape", "material")]
    parts = [table[labels_BT6[..., place].long()] for place, table in enumerate(tables)]
    parts.append(_linear(w, "pos_embedding.0", (labels_BT6[..., 3:] + 3) / 6).relu())
    x = _mlp(w, "program_embed", torch.cat(parts, dim=-1))
    for block in range(2):
        name = f"encoder.blocks.{block}"
        normed = _norm(w, f"{name}.attn_layer_norm", x)
        q, k, v = (
            (normed @ w[f"{name}.attn.proj_{which}.weight"].T).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for which in "qkv"
        )
        mixed = ((q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        x = (normed if block == 0 else x) + mixed @ w[f"{name}.attn.proj_o.weight"].T
        x = x + _mlp(w, f"{name}.ffn", _norm(w, f"{name}.ffn_layer_norm", x))
    return _head(w, _norm(w, "encoder.layer_norm", x))


def _linear(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _norm(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def _mlp(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return _linear(w, f"{name}.2", _linear(w, f"{name}.0", x).relu())


def _head(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    y = _linear(w, "embed_proj", x)
    return y + _mlp(w, "embed_mlp", _norm(w, "norm_embed", y))
