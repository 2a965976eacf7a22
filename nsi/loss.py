"""The contrastive loss between images and schemas, for one rank's rows against everybody's columns.

Shapes: R local rows, C gathered columns (all ranks' rows), N slots, T objects, E embedding size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from nsi.maxsim import maxsim

Gather = Callable[[torch.Tensor], torch.Tensor]


class Rows(NamedTuple):
    """What one rank brings to the loss. Empty rows have `rows_R` False."""

    slots_RNE: torch.Tensor
    primitives_RTE: torch.Tensor
    objects_RT: torch.Tensor
    sample_ids_R: torch.Tensor
    rows_R: torch.Tensor


def contrastive_sum(
    local: Rows, gather: Gather, rank: int, tau: float, reduce: Literal["sum", "mean"] = "sum"
) -> torch.Tensor:
    """The contrastive loss summed over the local rows: divide by the global count of rows for the mean.

    The mean of two cross entropies of score / tau: an image among all schemas, and a schema among all images
    (Dedhia and Jha 2025, following CLIP). Columns that are empty, or that hold the row's own scene a second time, are
    no negatives. `gather` takes (R, ...) to (C, ...) with rank r's rows at r * R; with the identity and rank 0 this is
    the one-process loss.
    """
    everyone = Rows(*(gather(tensor) for tensor in local))
    rows = local.rows_R.shape[0]
    own_R = rank * rows + torch.arange(rows, device=local.rows_R.device)
    same_RC = local.sample_ids_R[:, None] == everyone.sample_ids_R[None, :]
    same_RC[torch.arange(rows), own_R] = False  # the row itself is its positive
    closed_RC = same_RC | ~everyone.rows_R[None, :]
    # An empty row must stay finite (it is left out of the sum below): let it see its own column.
    closed_RC[torch.arange(rows), own_R] = False

    images_RC = maxsim(local.slots_RNE, everyone.primitives_RTE, everyone.objects_RT, reduce)
    schemas_RC = maxsim(everyone.slots_RNE, local.primitives_RTE, local.objects_RT, reduce).T
    total = local.slots_RNE.new_zeros(())
    for scores_RC in (images_RC, schemas_RC):
        logits_RC = (scores_RC / tau).masked_fill(closed_RC, -torch.inf)
        losses_R = F.cross_entropy(logits_RC, own_R, reduction="none")
        total = total + losses_R.masked_fill(~local.rows_R, 0.0).sum() / 2
    return total
