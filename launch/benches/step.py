"""A training step without the backbone beside its textbook form: the whole model's forward, loss and backward.

Shapes: B images, N slots, P patches, F features, T objects, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

from launch.benches.comparison import Comparison
from launch.benches.decoder import TextbookDecoder
from launch.benches.forms import FEATURES, IMAGES, PATCHES, Form, compare_forms, device
from nsi.loss import Rows, contrastive_sum
from nsi.model import ModelConfig, NeuralSlotInterpreter, Output
from nsi.noise import KeyedNoise

VOCABULARY, OBJECTS = (3, 4, 60), 10  # CLEVRTex's


def comparisons(data: Path | None, scenes: int) -> Iterator[Comparison]:
    """Time and memory of a step as it comes, then with --recompute."""
    against = "the decoder's textbook form and all dot products at once"
    return compare_forms("step", "launch.benches.step", against, run_of)


def run_of(form: Form) -> Callable[[], None]:
    """One step of a form, with every default of `nsi train`."""
    torch.manual_seed(0)
    model = NeuralSlotInterpreter(ModelConfig(), FEATURES, PATCHES, VOCABULARY, recompute=form == "recompute")
    if form == "textbook":
        model.register_module("decoder", TextbookDecoder(model.decoder))
    model.to(device())
    features_BPF = torch.randn(IMAGES, PATCHES, FEATURES, device=device())
    labels_BT3 = torch.stack([torch.randint(0, count, (IMAGES, OBJECTS)) for count in VOCABULARY], dim=-1).to(device())
    positions_BT3 = torch.randn(IMAGES, OBJECTS, 3, device=device())
    objects_BT = torch.ones(IMAGES, OBJECTS, dtype=torch.bool, device=device())
    ids_B = torch.arange(IMAGES, device=device())
    contrastive = textbook_contrastive if form == "textbook" else _contrastive

    def run() -> None:
        model.zero_grad()
        output = model(features_BPF, labels_BT3, positions_BT3, objects_BT, KeyedNoise(0, 0, ids_B))
        loss = contrastive(output, objects_BT, ids_B) + output.squared_error_B.mean() / FEATURES
        loss.backward()

    return run


def textbook_contrastive(output: Output, objects_BT: Tensor, ids_B: Tensor) -> Tensor:
    """The contrastive loss of distinct scenes, from the dot products of all slots with all primitives."""
    slots_BNE, primitives_BTE = output.slot_embeddings_BNE, output.primitive_embeddings_BTE
    dots_BNBT = torch.einsum("ane,cte->anct", slots_BNE, primitives_BTE)
    scores_BB = dots_BNBT.max(dim=1).values.masked_fill(~objects_BT, 0).sum(dim=-1) / output.tau_1
    own_B = torch.arange(len(ids_B), device=ids_B.device)
    return (functional.cross_entropy(scores_BB, own_B) + functional.cross_entropy(scores_BB.T, own_B)) / 2


def _contrastive(output: Output, objects_BT: Tensor, ids_B: Tensor) -> Tensor:
    rows_B = torch.ones_like(ids_B, dtype=torch.bool)
    rows = Rows(output.slot_embeddings_BNE, output.primitive_embeddings_BTE, objects_BT, ids_B, rows_B)
    return contrastive_sum(rows, lambda tensor: tensor, 0, output.tau_1) / len(ids_B)
