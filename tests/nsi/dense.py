"""MaxSim and the contrastive loss as one would write them down, all pairs at once, for autograd to differentiate."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nsi.loss import Rows


def dense_scores(
    slots_ANE: torch.Tensor, primitives_CTE: torch.Tensor, objects_CT: torch.Tensor, reduce: str = "sum"
) -> torch.Tensor:
    """scores_AC; the gradient of torch's max goes to the lowest index."""
    dots_ANCT = torch.einsum("ane,cte->anct", slots_ANE, primitives_CTE)
    scores_AC = dots_ANCT.max(dim=1).values.masked_fill(~objects_CT, 0).sum(dim=-1)
    return scores_AC / objects_CT.sum(dim=1).clamp(min=1) if reduce == "mean" else scores_AC


def dense_contrastive_sum(rows: Rows, tau: float | torch.Tensor, reduce: str = "sum") -> torch.Tensor:
    """The loss of all rows of one process."""
    scores_RR = dense_scores(rows.slots_RNE, rows.primitives_RTE, rows.objects_RT, reduce) / tau
    own_R = torch.arange(len(rows.rows_R), device=rows.rows_R.device)
    closed_RR = (rows.sample_ids_R[:, None] == rows.sample_ids_R) | ~rows.rows_R
    closed_RR[own_R, own_R] = False
    total = scores_RR.new_zeros(())
    for logits_RR in (scores_RR, scores_RR.T):
        losses_R = F.cross_entropy(logits_RR.masked_fill(closed_RR, -torch.inf), own_R, reduction="none")
        total = total + losses_R.masked_fill(~rows.rows_R, 0).sum() / 2
    return total
