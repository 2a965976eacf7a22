"""Retrieval over a whole gallery: image to schema and schema to image, with ties and twins told apart.

Two schemas that are the same multiset of primitives can't be told apart by any score, so each of them is
relevant to the images of both. The best-ranked relevant item counts, and only irrelevant items compete with it.
Equal scores are settled against the model (pessimistic, the figure under the plain name) and for it (optimistic).

Legend: I images, S schemas, both n; Q a block of queries; T primitives (padded); P position coordinates.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import comb

import numpy as np
import torch

CUTOFFS = (1, 5, 10)
BLOCK = 1 << 20  # scores compared at a time: beside the matrix a few blocks are held, never a copy of it


@dataclass(frozen=True)
class Retrieval:
    """Figures of one gallery. Each direction: R@1, R@5, R@10 (fractions) and median_rank (1 is best), pessimistic
    at ties; the same names with `_optimistic` behind them are the optimistic ones. Chance: R@k of a random order.
    """

    gallery: int
    chance: dict[str, float]
    schema_to_image: dict[str, float]
    image_to_schema: dict[str, float]

    def as_dict(self) -> dict:
        """The figures as nested dictionaries, ready for JSON."""
        return asdict(self)


def retrieval(scores_IS: torch.Tensor, group_ids: torch.Tensor | np.ndarray | None = None) -> Retrieval:
    """Both directions over a gallery of n images and their n schemas, image i belonging to schema i.

    scores_IS: (n, n), any float type, on any device; higher is better. group_ids: (n,) integers, equal where
    two schemas are the same (see `schema_groups`); None: all differ.
    Raises ValueError for a matrix that is empty, not square or not a number somewhere, and for ids of another shape.
    """
    n = len(scores_IS)
    if scores_IS.shape != (n, n) or n == 0:
        raise ValueError(f"scores must be square and not empty, not {tuple(scores_IS.shape)}")
    groups_n = torch.arange(n) if group_ids is None else torch.as_tensor(group_ids)
    if groups_n.shape != (n,):
        raise ValueError(f"group ids must be ({n},), not {tuple(groups_n.shape)}")
    scores_IS, groups_n = scores_IS.detach(), groups_n.to(scores_IS.device)
    return Retrieval(
        gallery=n,
        chance=chance(groups_n.cpu().numpy()),
        schema_to_image=_direction(*ranks(scores_IS.T, groups_n)),
        image_to_schema=_direction(*ranks(scores_IS, groups_n)),
    )


def ranks(scores_nn: torch.Tensor, groups_n: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rank of each query's best relevant item, from 1: (pessimistic, optimistic), int64 (n,) each.

    Rows are queries, columns items; an item is relevant where its group is the query's. The rank is one more
    than the number of irrelevant items with a higher score (pessimistic: a higher or the same).
    Raises ValueError for scores that are not a number.
    """
    n = len(groups_n)
    # Filled in place: small results kept between large passing blocks would keep the heap from shrinking.
    pessimistic_n = torch.empty(n, dtype=torch.int64, device=scores_nn.device)
    optimistic_n = torch.empty_like(pessimistic_n)
    rows = max(1, BLOCK // n)
    for block in (slice(start, start + rows) for start in range(0, n, rows)):
        scores_Qn = scores_nn[block]
        if scores_Qn.isnan().any():
            raise ValueError("scores hold values that are not a number: no rank can be given")
        relevant_Qn = groups_n[block, None] == groups_n
        best_Q1 = scores_Qn.masked_fill(~relevant_Qn, -torch.inf).amax(dim=1, keepdim=True)
        pessimistic_n[block] = 1 + ((scores_Qn >= best_Q1) & ~relevant_Qn).sum(dim=1)
        optimistic_n[block] = 1 + ((scores_Qn > best_Q1) & ~relevant_Qn).sum(dim=1)
    return pessimistic_n.cpu().numpy(), optimistic_n.cpu().numpy()


def chance(groups_n: np.ndarray) -> dict[str, float]:
    """R@k of a uniformly random order of the items, exact: the mean over queries of the probability that the
    first k items hold a relevant one, 1 - C(n-g, k) / C(n, k) with g relevant items. Without twins min(1, k/n).
    """
    n = len(groups_n)
    twins = Counter(np.unique(groups_n, return_counts=True)[1].tolist())  # how many groups have g members
    hit = {}
    for k in (min(cutoff, n) for cutoff in CUTOFFS):
        # Fractions of whole numbers: k/n comes out as such, whatever the order of the groups.
        hit[k] = sum(groups * g * (1 - Fraction(comb(n - g, k), comb(n, k))) for g, groups in twins.items()) / n
    return {f"R@{cutoff}": float(hit[min(cutoff, n)]) for cutoff in CUTOFFS}


def schema_groups(
    labels_ST3: torch.Tensor, objects_ST: torch.Tensor, positions_STP: torch.Tensor | None = None
) -> np.ndarray:
    """Group ids of schemas, int64 (S,): equal where, and only where, two schemas are the same multiset of primitives.

    labels_ST3: ids. objects_ST: bool, True where an object is real; padding has no say. positions_STP: metres,
    compared exactly, with as many coordinates as the model is shown (2 or 3); None: positions are ignored.
    Ids are given in order of first appearance. Raises ValueError for shapes that do not agree.
    """
    shape = tuple(objects_ST.shape)
    if any(tensor is not None and tuple(tensor.shape[:-1]) != shape for tensor in (labels_ST3, positions_STP)):
        raise ValueError(f"labels and positions must have {shape} in front of their last axis")
    labels, objects = labels_ST3.tolist(), objects_ST.tolist()
    positions = [[[]] * shape[1]] * shape[0] if positions_STP is None else positions_STP.tolist()
    known: dict[tuple, int] = {}
    ids = []
    for schema in zip(labels, positions, objects, strict=True):
        primitives = sorted((*label, *place) for label, place, real in zip(*schema, strict=True) if real)
        ids.append(known.setdefault(tuple(primitives), len(known)))
    return np.array(ids, dtype=np.int64)


def _direction(pessimistic_n: np.ndarray, optimistic_n: np.ndarray) -> dict[str, float]:
    figures: dict[str, float] = {}
    for suffix, ranks_n in (("", pessimistic_n), ("_optimistic", optimistic_n)):
        figures |= {f"R@{k}{suffix}": float((ranks_n <= k).mean()) for k in CUTOFFS}
        figures[f"median_rank{suffix}"] = float(np.median(ranks_n))
    return figures
