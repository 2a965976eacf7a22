"""Grounding: does the slot that a primitive picks by its score hold that primitive's object?

Each figure is a table of hits, True where slot n would be a right answer for primitive t. The model's choice (free,
or one-to-one), the oracle and the floor read the same tables, so segmentation's share in a figure is plain to see.

Legend: T primitives of one schema, primitive t being the object with id t + 1; V those with visible pixels;
N slots; F the figures in the order of FIGURES.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from nsi.metrics.discovery import iou

FIGURES = ("slot_accuracy", "IoU@0.5", "pointing")
CHOICES = ("argmax", "hungarian", "oracle", "floor")
IOU_THRESHOLD = 0.5


@dataclass(frozen=True, eq=False)
class Grounding:
    """One image: each visible primitive's hits (0 or 1; a probability for the floor) for each way of choosing."""

    argmax_VF: np.ndarray
    hungarian_VF: np.ndarray
    oracle_VF: np.ndarray
    floor_VF: np.ndarray
    sizes_V: np.ndarray  # int64 ids of the vocabulary's sizes
    objects: int  # T: primitives of the schema, the hidden ones included
    hidden: int  # primitives without a visible pixel: in no figure


def grounding(
    similarity_TN: np.ndarray, table_TN: np.ndarray, peak_ids_N: np.ndarray, sizes_T: np.ndarray
) -> Grounding:
    """Hits of one image and its own schema.

    similarity_TN: dot products of primitive and slot embeddings, (T, N), higher is better.
    table_TN: `discovery.contingency(..., slots=N, objects=T)` in the view, (T + 1, N), background first.
    peak_ids_N: the true id under the highest pixel of each slot's alpha in the view, (N,).
    sizes_T: size ids of the primitives, (T,).

    - argmax: slot k* = argmax of the row, ties to the lowest index.
    - hungarian: the one-to-one assignment with the largest total over ALL primitives, since a model can't know
      which objects the view hides; with more primitives than slots the unassigned ones miss.
    - oracle: whether any slot is a right answer, so no choice can do better.
    - floor: the share of the slots that are right answers, the exact mean of a uniformly random choice.

    Slots that tie for the highest IoU are all right answers to slot accuracy.
    Raises ValueError for shapes that do not agree, no slots, or similarities that are not finite.
    """
    similarity_TN, table_TN = np.asarray(similarity_TN, dtype=np.float64), np.asarray(table_TN)
    peak_ids_N, sizes_T = np.asarray(peak_ids_N), np.asarray(sizes_T, dtype=np.int64)
    if similarity_TN.ndim != 2 or similarity_TN.shape[1] == 0 or not np.isfinite(similarity_TN).all():
        raise ValueError(f"similarities must be finite and (T, N) with N above 0, not {similarity_TN.shape}")
    objects, slots = similarity_TN.shape
    if table_TN.shape != (objects + 1, slots) or peak_ids_N.shape != (slots,) or sizes_T.shape != (objects,):
        raise ValueError(
            f"{objects} primitives and {slots} slots do not fit a table {table_TN.shape}, "
            f"peaks {peak_ids_N.shape}, sizes {sizes_T.shape}"
        )
    visible_T = table_TN[1:].any(axis=1)
    hits_TNF = hit_tables(table_TN, peak_ids_N)
    everyone = np.arange(objects)
    argmax_TF = hits_TNF[everyone, similarity_TN.argmax(axis=1)]
    hungarian_TF = np.zeros((objects, len(FIGURES)), dtype=bool)
    rows, columns = linear_sum_assignment(similarity_TN, maximize=True)
    hungarian_TF[rows] = hits_TNF[rows, columns]
    return Grounding(
        argmax_VF=argmax_TF[visible_T].astype(np.float64),
        hungarian_VF=hungarian_TF[visible_T].astype(np.float64),
        oracle_VF=np.any(hits_TNF, axis=1)[visible_T].astype(np.float64),
        floor_VF=np.mean(hits_TNF, axis=1)[visible_T],
        sizes_V=sizes_T[visible_T],
        objects=objects,
        hidden=int((~visible_T).sum()),
    )


def hit_tables(table_TN: np.ndarray, peak_ids_N: np.ndarray) -> np.ndarray:
    """Right answers, bool (T, N, F): the highest IoU, an IoU of at least 0.5, the peak inside the object's mask.

    table_TN: (T + 1, N), background first. A hidden object has no right answer but, idly, in slot accuracy.
    """
    iou_TN = iou(table_TN)[1:]
    best_TN = iou_TN == iou_TN.max(axis=1, keepdims=True)
    pointing_TN = peak_ids_N == np.arange(1, len(table_TN))[:, None]
    return np.stack((best_TN, iou_TN >= IOU_THRESHOLD, pointing_TN), axis=-1)


def summarise_grounding(images: Sequence[Grounding], size_names: Sequence[str] | None = None) -> dict:
    """Means over primitives: all, by size, and by the number of objects in the scene.

    Gives {primitives, primitives_left_out, argmax: {slot_accuracy, IoU@0.5, pointing}, hungarian, oracle, floor: the
    same, by_size: {name: ...}, by_objects: {"3": ...}}, where a part has `primitives` and the four ways of choosing.
    Fractions; None in place of a mean over nothing. size_names: the vocabulary's; without it ids stand as names.
    Raises ValueError where there are no images.
    """
    if not images:
        raise ValueError("no image to summarise")
    hits_VCF = np.concatenate(
        [np.stack((image.argmax_VF, image.hungarian_VF, image.oracle_VF, image.floor_VF), axis=1) for image in images]
    )
    sizes_V = np.concatenate([image.sizes_V for image in images])
    objects_V = np.concatenate([np.full(len(image.sizes_V), image.objects) for image in images])
    whole = _means(hits_VCF)
    return {
        "primitives": whole.pop("primitives"),
        "primitives_left_out": sum(image.hidden for image in images),
        **whole,
        "by_size": {
            str(size) if size_names is None else size_names[size]: _means(hits_VCF[sizes_V == size])
            for size in np.unique(sizes_V).tolist()
        },
        "by_objects": {str(count): _means(hits_VCF[objects_V == count]) for count in np.unique(objects_V).tolist()},
    }


def _means(hits_VCF: np.ndarray) -> dict:
    """The number of primitives, and for each way of choosing (C) its figures' means."""
    means_CF = hits_VCF.mean(axis=0).tolist() if len(hits_VCF) else [[None] * len(FIGURES)] * len(CHOICES)
    return {
        "primitives": len(hits_VCF),
        **{choice: dict(zip(FIGURES, means_F, strict=True)) for choice, means_F in zip(CHOICES, means_CF, strict=True)},
    }
