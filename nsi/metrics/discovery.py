"""Object discovery: how well the slots' segments of one image agree with its true object masks.

Every figure comes from one contingency table, so the pixels of an image are read once. Counts stay exact
integers up to the last division; overlaps are float64.

Legend: H, W pixels; T rows, one a true id (row 0 is the background, row t the object with id t);
N columns, one a slot. Empty rows (objects out of view) and empty columns (slots that win no pixel) are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment


@dataclass(frozen=True)
class Discovery:
    """The figures of one image, each a fraction; None where the image shows no foreground."""

    ari: float
    fg_ari: float | None
    mbo: float | None
    miou: float | None
    miou_official: float


@dataclass(frozen=True)
class DiscoverySummary:
    """Means over images. Foreground figures are None where no image shows any foreground."""

    ari: float
    fg_ari: float | None
    mbo: float | None
    miou: float | None
    miou_official: float
    images: int
    images_left_out: int  # images without foreground: in ARI and mIoU_official, out of the other three

    def as_dict(self) -> dict[str, float | int | None]:
        """The summary under the names that the evaluation file uses."""
        return {
            "ARI": self.ari,
            "FG-ARI": self.fg_ari,
            "mBO": self.mbo,
            "mIoU": self.miou,
            "mIoU_official": self.miou_official,
            "images": self.images,
            "images_left_out": self.images_left_out,
        }


def contingency(
    pred_HW: np.ndarray, true_HW: np.ndarray, slots: int | None = None, objects: int | None = None
) -> np.ndarray:
    """Pixels of every pair of a true id and a slot: int64 (T, N), background first.

    pred_HW: slot ids from 0. true_HW: object ids, 0 for the background. `slots` and `objects` (without the
    background) fix the table's size; without them it ends at the largest id that occurs.
    Raises ValueError for maps that are empty, differ in shape, do not hold integers, or hold an id out of range.
    """
    pred_HW, true_HW = np.asarray(pred_HW), np.asarray(true_HW)
    if pred_HW.shape != true_HW.shape or pred_HW.size == 0:
        raise ValueError(f"label maps must agree in shape and hold pixels: {pred_HW.shape} and {true_HW.shape}")
    if pred_HW.dtype.kind not in "iu" or true_HW.dtype.kind not in "iu":
        raise ValueError(f"label maps must hold integers: {pred_HW.dtype} and {true_HW.dtype}")
    columns = int(pred_HW.max()) + 1 if slots is None else slots
    rows = int(true_HW.max()) + 1 if objects is None else objects + 1
    for name, ids, count in (("slot", pred_HW, columns), ("object", true_HW, rows)):
        if ids.min() < 0 or ids.max() >= count:
            raise ValueError(f"{name} ids run from {ids.min()} to {ids.max()}, outside 0 to {count - 1}")
    pairs = true_HW.astype(np.int64).ravel() * columns + pred_HW.astype(np.int64).ravel()
    return np.bincount(pairs, minlength=rows * columns).reshape(rows, columns)


def iou(table_TN: np.ndarray) -> np.ndarray:
    """Intersection over union of every true mask and every slot's segment: float64 (T, N), 0 for empty ones."""
    union_TN = table_TN.sum(axis=1, keepdims=True) + table_TN.sum(axis=0, keepdims=True) - table_TN
    return table_TN / np.maximum(union_TN, 1)  # the union is 0 only where the intersection is


def ari(table_TN: np.ndarray) -> float:
    """Adjusted Rand index over all pixels, background included (Hubert & Arabie 1985, "Comparing partitions").

    1 where both partitions are trivial in the same way (the denominator is 0).
    Raises ValueError for a table without pixels.
    """
    pixels = int(table_TN.sum())
    if pixels == 0:
        raise ValueError("the adjusted Rand index needs at least one pixel")
    # Python's integers: the products pass 2^63 on large frames, and exactness makes 0 and 1 come out as such.
    both, rows, columns = (_ordered_pairs(counts) for counts in (table_TN, table_TN.sum(axis=1), table_TN.sum(axis=0)))
    every = pixels * (pixels - 1)
    denominator = (rows + columns) * every - 2 * rows * columns
    return 1.0 if denominator == 0 else 2 * (both * every - rows * columns) / denominator


def fg_ari(table_TN: np.ndarray) -> float | None:
    """Adjusted Rand index over the pixels whose true id is not 0; None where there are none.

    Predictions are left as they are: a slot that spills into the background is not punished (Greff et al.
    2019, "Multi-Object Representation Learning with Iterative Variational Inference").
    """
    return ari(table_TN[1:]) if table_TN[1:].any() else None


def mean_best_overlap(table_TN: np.ndarray) -> float | None:
    """mBO: each visible object's best IoU over the slots, reuse allowed, averaged; None without an object.

    The measure of object proposals in Pont-Tuset et al. 2017, "Multiscale Combinatorial Grouping".
    """
    iou_TN = _visible_objects(table_TN)
    return float(iou_TN.max(axis=1).mean()) if len(iou_TN) else None


def mean_iou_hungarian(table_TN: np.ndarray) -> float | None:
    """mIoU: the best one-to-one matching of visible objects and slots, divided by the number of visible objects.

    An object that finds no slot counts 0; the background is left out; None without an object. Never above mBO.
    """
    iou_TN = _visible_objects(table_TN)
    return float(iou_TN[linear_sum_assignment(iou_TN, maximize=True)].sum() / len(iou_TN)) if len(iou_TN) else None


def mean_iou_official(table_TN: np.ndarray) -> float:
    """mIoU of the CLEVRTex evaluator (Karazija et al. 2021, "ClevrTex", as its public code computes it).

    The background is one of the masks; both sides are padded with empty masks to the same number; the matched
    sum is divided by the pairs in which either mask is non-empty. Where several matchings have the same sum the
    number of such pairs may differ between them, and with it the figure: like the evaluator's it then hangs on
    the order of the slots. So the table must have all slots, the empty ones too.
    """
    size = max(table_TN.shape)
    iou_KK = np.zeros((size, size))
    iou_KK[: table_TN.shape[0], : table_TN.shape[1]] = iou(table_TN)
    true_K, pred_K = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    true_K[: table_TN.shape[0]] = table_TN.any(axis=1)
    pred_K[: table_TN.shape[1]] = table_TN.any(axis=0)
    rows, columns = linear_sum_assignment(iou_KK, maximize=True)
    return float(iou_KK[rows, columns].sum() / (true_K[rows] | pred_K[columns]).sum())


def discovery(table_TN: np.ndarray) -> Discovery:
    """All figures of one image from its contingency table. Raises ValueError for a table without pixels."""
    return Discovery(
        ari=ari(table_TN),
        fg_ari=fg_ari(table_TN),
        mbo=mean_best_overlap(table_TN),
        miou=mean_iou_hungarian(table_TN),
        miou_official=mean_iou_official(table_TN),
    )


def summarise_discovery(images: Sequence[Discovery]) -> DiscoverySummary:
    """Means over images; those without foreground are counted and left out of the foreground figures.

    Raises ValueError where there are no images.
    """
    if not images:
        raise ValueError("no image to summarise")
    return DiscoverySummary(
        ari=float(np.mean([image.ari for image in images])),
        fg_ari=_mean_of_known([image.fg_ari for image in images]),
        mbo=_mean_of_known([image.mbo for image in images]),
        miou=_mean_of_known([image.miou for image in images]),
        miou_official=float(np.mean([image.miou_official for image in images])),
        images=len(images),
        images_left_out=sum(image.fg_ari is None for image in images),
    )


def _ordered_pairs(counts: np.ndarray) -> int:
    """Sum of n(n-1) over the counts: the ordered pairs of distinct pixels that share a cell."""
    counts = counts.astype(np.int64)
    return int((counts * (counts - 1)).sum())


def _visible_objects(table_TN: np.ndarray) -> np.ndarray:
    """IoU of the objects that show at least one pixel, with every slot."""
    return iou(table_TN)[1:][table_TN[1:].any(axis=1)]


def _mean_of_known(figures: Sequence[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return float(np.mean(known)) if known else None
