"""The contrastive loss between images and schemas, for one rank's images against everybody's schemas.

Shapes: R local rows, C gathered columns (all ranks' rows), W ranks, N slots, T objects, E embedding size; a tile has
I images and J schemas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsi.maxsim import Reduce, gradients, scored, tile_scores, tiles

Gather = Callable[[Tensor], Tensor]


class Rows(NamedTuple):
    """What one rank brings to the loss. Empty rows have `rows_R` False."""

    slots_RNE: Tensor
    primitives_RTE: Tensor
    objects_RT: Tensor
    sample_ids_R: Tensor
    rows_R: Tensor


def contrastive_sum(
    local: Rows,
    gather: Gather,
    rank: int,
    tau: float | Tensor,
    reduce: Reduce = "sum",
    max_elements: int | None = None,
) -> Tensor:
    """The contrastive loss summed over the local rows: divide by the global count of rows for the mean.

    The mean of two cross entropies of score / tau: an image among all schemas, and a schema among all images
    (Dedhia and Jha 2025, following CLIP). Columns that are empty, or that hold the row's own scene a second time, are
    no negatives. `tau`, above 0, may be a tensor of one element, and gets its gradient. `gather` takes (R, ...) to
    (W * R, ...) with rank r's rows at r * R, whatever R is, and is differentiable; with the identity and rank 0 this
    is the one-process loss.

    Each pair of an image and a schema is scored by one rank alone, the image's. Scores come in tiles, are summed up as
    they come and scored once more in the backward, as in flash attention (Dao et al., NeurIPS 2022): memory is linear
    in C. `max_elements` is that of `maxsim`.
    """
    rows = local.rows_R.shape[0]
    slots_RNE, primitives_RTE = scored(local.slots_RNE, local.primitives_RTE, local.objects_RT, reduce)
    slots_RNE = slots_RNE / (tau.to(slots_RNE.dtype) if isinstance(tau, Tensor) else tau)
    with torch.autocast(slots_RNE.device.type, enabled=False):
        positives_R = (slots_RNE @ primitives_RTE.mT).max(dim=1).values.sum(dim=-1)
    images_R, schemas_C = _NegativesLogSumExp.apply(  # pyright: ignore[reportGeneralTypeIssues]
        slots_RNE,
        gather(primitives_RTE),
        local.sample_ids_R,
        gather(local.sample_ids_R),
        local.rows_R,
        gather(local.rows_R),
        max_elements,
    )
    # Every rank knows each schema's negatives among its own images; here are those of our schemas, from every rank.
    schemas_WR = gather(schemas_C).view(-1, len(schemas_C))[:, rank * rows : (rank + 1) * rows]
    return (_losses(images_R[None], positives_R) + _losses(schemas_WR, positives_R)).sum() / 2


def _losses(negatives_WR: Tensor, positives_R: Tensor) -> Tensor:
    """The cross entropies, given the log-sum-exp of the negatives in parts. A row without any, or empty, has 0."""
    margins_WR = negatives_WR - positives_R
    return torch.cat([torch.zeros_like(margins_WR[:1]), margins_WR]).logsumexp(dim=0)


class _NegativesLogSumExp(torch.autograd.Function):
    """The log of the sum of exp(score) over each image's negatives, and over each schema's; -inf for none."""

    @staticmethod
    def forward(
        ctx,
        slots_RNE: Tensor,
        primitives_CTE: Tensor,
        ids_R: Tensor,
        ids_C: Tensor,
        rows_R: Tensor,
        rows_C: Tensor,
        max_elements: int | None,
    ) -> tuple[Tensor, Tensor]:
        images_R, schemas_C = _Sum.empty(slots_RNE), _Sum.empty(primitives_CTE)
        with torch.autocast(slots_RNE.device.type, enabled=False):
            for images, schemas in tiles(slots_RNE, primitives_CTE, max_elements):
                scores_IJ = tile_scores(slots_RNE[images], primitives_CTE[schemas])
                closed_IJ = _closed(ids_R[images], ids_C[schemas], rows_R[images], rows_C[schemas])
                scores_IJ = scores_IJ.masked_fill_(closed_IJ, -torch.inf)
                images_R.add(images, scores_IJ)
                schemas_C.add(schemas, scores_IJ.T)
        logs = images_R.log(), schemas_C.log()
        ctx.save_for_backward(slots_RNE, primitives_CTE, ids_R, ids_C, rows_R, rows_C, *logs)
        ctx.max_elements = max_elements
        return logs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_R, grad_C = grads
        slots_RNE, primitives_CTE, ids_R, ids_C, rows_R, rows_C, log_R, log_C = ctx.saved_tensors

        def weigh(images: slice, schemas: slice, scores_IJ: Tensor) -> Tensor:
            """What the scores' gradients are: how much of each sum a score is."""
            of_images_IJ = _shares(scores_IJ - log_R[images, None]).mul_(grad_R[images, None])
            of_schemas_IJ = _shares(scores_IJ - log_C[schemas]).mul_(grad_C[schemas])
            closed_IJ = _closed(ids_R[images], ids_C[schemas], rows_R[images], rows_C[schemas])
            return of_images_IJ.add_(of_schemas_IJ).masked_fill_(closed_IJ, 0)

        both = gradients(slots_RNE, primitives_CTE, weigh, ctx.max_elements)
        return *both, None, None, None, None, None


def _shares(logs_IJ: Tensor) -> Tensor:
    """exp in place. Shares far below rounding become 0, for a matrix product of denormal numbers takes ten times as
    long on a CPU, and once the model has learned most scores are such."""
    numbers = torch.finfo(logs_IJ.dtype)
    return F.threshold(logs_IJ.exp_(), numbers.tiny / numbers.eps, 0.0, inplace=True)


def _closed(ids_I: Tensor, ids_J: Tensor, rows_I: Tensor, rows_J: Tensor) -> Tensor:
    """Where there is no negative: at the positive, at the same scene once more, and at empty rows."""
    return (ids_I[:, None] == ids_J) | ~rows_I[:, None] | ~rows_J


class _Sum(NamedTuple):
    """Sums of exp(score) for some rows, as total * exp(highest), so that none overflows."""

    highest_B: Tensor
    total_B: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> _Sum:
        # The lowest number and not -inf, whose difference from itself is none.
        return cls(like.new_full(like.shape[:1], torch.finfo(like.dtype).min), like.new_zeros(like.shape[:1]))

    def add(self, rows: slice, scores_BJ: Tensor) -> None:
        """Adds the scores of these rows, in place."""
        before_B, total_B = self.highest_B[rows], self.total_B[rows]
        highest_B = torch.maximum(before_B, scores_BJ.amax(dim=1))
        added_B = (scores_BJ - highest_B[:, None]).exp_().sum(dim=1)
        total_B.mul_((before_B - highest_B).exp_()).add_(added_B)
        before_B.copy_(highest_B)

    def log(self) -> Tensor:
        return self.highest_B + self.total_B.log()
