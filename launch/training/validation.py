"""Validation during training: losses over the whole split and retrieval in it, the same scenes and noise every time.

All ranks take part (ZeRO 3 needs them); each embeds its rows, a micro-batch of training at a time, and rank 0 scores
the whole gallery.
Shapes: S scenes of the split, M rows of a micro-batch, K scenes shown, N slots, T objects, P patches, E embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cluster.collectives import collect, gather_rows, sum_over_ranks
from cluster.engine.engine import Engine
from launch.training.step import StepSettings, features_of, forward, micro_batches
from nsi.backbone import Backbone
from nsi.batch import Batch
from nsi.errors import UserError
from nsi.loss import Rows, contrastive_sum
from nsi.maxsim import maxsim
from nsi.metrics.retrieval import retrieval, schema_groups

VALIDATION_STEP = -1  # keys the slot noise of every validation and evaluation: no training step has this number
SCENES_SHOWN = 8


@dataclass(frozen=True)
class Validation:
    """The figures of one validation, and the first scenes with their masks for a picture (rank 0)."""

    figures: dict[str, float]
    sample_ids_B: torch.Tensor
    alphas_BNP: torch.Tensor


def validate(
    engine: Engine, backbone: Backbone, batches: Iterable[Batch], settings: StepSettings, position_dims: int
) -> Validation:
    """Losses and retrieval over a split, given this rank's batches of it.

    Scenes whose schemas agree are each other's twins in retrieval, as far as the model sees them: by the first
    `position_dims` coordinates. Raises UserError where the loss is no finite number.
    """
    engine.eval()
    kept: list[Rows] = []
    labels: list[tuple[torch.Tensor, torch.Tensor]] = []
    sums_3 = torch.zeros(3, dtype=torch.float64)  # contrastive, reconstruction, scenes
    shown: tuple[torch.Tensor, torch.Tensor] | None = None
    tau = math.nan
    with torch.no_grad():
        for cpu_batch in batches:
            batch = cpu_batch.to(_device(engine))
            found = _embed(engine, backbone, batch, settings)
            rows = Rows(found.slots_BNE, found.primitives_BTE, batch.objects_BT, batch.sample_ids_B, batch.rows_B)
            contrastive = contrastive_sum(rows, gather_rows, settings.rank, found.tau_1, settings.loss.score)
            error = found.squared_error_B.masked_fill(~batch.rows_B, 0.0).sum()
            if settings.loss.reconstruction == "mean":
                error = error / settings.feature_dim
            sums_3 += torch.stack([contrastive, error, batch.rows_B.sum()]).double().cpu()
            tau = float(found.tau_1)
            kept.append(Rows(*(tensor[batch.rows_B].cpu() for tensor in rows)))
            labels.append((cpu_batch.labels_BT3[cpu_batch.rows_B], cpu_batch.positions_BT3[cpu_batch.rows_B]))
            if shown is None:
                shown = (batch.sample_ids_B[_shown(batch)].cpu(), found.alphas_KNP.cpu())
    engine.train()
    assert shown is not None
    contrastive_sum_all, reconstruction_sum, scenes = sum_over_ranks(sums_3).tolist()
    everyone = collect((kept, labels))
    contrastive, reconstruction = contrastive_sum_all / scenes, reconstruction_sum / scenes
    figures = {
        "loss": contrastive + settings.loss.beta * reconstruction,
        "contrastive": contrastive,
        "reconstruction": reconstruction,
        "tau": tau,
    }
    if not math.isfinite(figures["loss"]):
        raise UserError(
            "validation: the loss over the split is not a finite number, so the weights have gone astray; start a "
            "fresh --log_path, from an earlier checkpoint (--checkpoint_path) or with a lower --lr"
        )
    if settings.rank == 0:
        figures |= _retrieval(everyone, settings, position_dims)
    return Validation(figures, *shown)


class _Embedded(NamedTuple):
    """What is kept of some rows: little beside what the model needs to find it."""

    slots_BNE: torch.Tensor
    primitives_BTE: torch.Tensor
    squared_error_B: torch.Tensor
    alphas_KNP: torch.Tensor
    tau_1: torch.Tensor


def _embed(engine: Engine, backbone: Backbone, batch: Batch, settings: StepSettings) -> _Embedded:
    """A rank's rows; backbone and model never have more of them at once than in training. All ranks have equally many
    rows, empty ones among them, and so make equally many forwards."""
    parts = [_embed_micro(engine, backbone, micro, settings) for micro in micro_batches(batch, settings)]
    whole = _Embedded(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    return whole._replace(alphas_KNP=whole.alphas_KNP[:SCENES_SHOWN], tau_1=whole.tau_1[:1])  # all have the same tau


def _embed_micro(engine: Engine, backbone: Backbone, micro: Batch, settings: StepSettings) -> _Embedded:
    """`_embed` by one forward."""
    output = forward(engine, features_of(micro, backbone), micro, VALIDATION_STEP, settings)
    return _Embedded(
        output.slot_embeddings_BNE.float(),
        output.primitive_embeddings_BTE.float(),
        output.squared_error_B,
        output.alphas_BNP[_shown(micro)].float(),
        output.tau_1,
    )


def _shown(batch: Batch) -> torch.Tensor:
    """Which rows have its first scenes, (K,)."""
    return batch.rows_B.nonzero()[:SCENES_SHOWN, 0]


def _retrieval(everyone: list, settings: StepSettings, position_dims: int) -> dict[str, float]:
    """R@1 and R@5 (mean of both directions, and each), gallery and chance, over all ranks' scenes."""
    rows = [row for kept, _ in everyone for row in kept]
    labels_ST3, positions_ST3 = (torch.cat([pair[k] for _, labels in everyone for pair in labels]) for k in (0, 1))
    slots_SNE, primitives_STE, objects_ST, ids_S, _ = (torch.cat(parts) for parts in zip(*rows, strict=True))
    order_S = ids_S.argsort()
    scores_SS = maxsim(slots_SNE[order_S], primitives_STE[order_S], objects_ST[order_S], settings.loss.score)
    groups_S = schema_groups(labels_ST3[order_S], objects_ST[order_S], positions_ST3[order_S, :, :position_dims])
    found = retrieval(scores_SS, groups_S).as_dict()
    both = (found["schema_to_image"], found["image_to_schema"])
    return {
        "R@1": (both[0]["R@1"] + both[1]["R@1"]) / 2,
        "R@5": (both[0]["R@5"] + both[1]["R@5"]) / 2,
        "schema_to_image_R@5": both[0]["R@5"],
        "image_to_schema_R@5": both[1]["R@5"],
        "gallery": found["gallery"],
        "chance_R@5": found["chance"]["R@5"],
    }


def _device(engine: Engine) -> torch.device:
    return next(engine.module.parameters()).device
