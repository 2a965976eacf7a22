"""The score of an image and a schema: sum over the schema's objects of the best slot's dot product.

ColBERT's MaxSim (Khattab and Zaharia, SIGIR 2020) with slots as document tokens and primitives as query tokens.

Shapes: A images, N slots, C schemas, T objects (padded), E embedding; a chunk has I images of the A.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_ELEMENTS = 1 << 24  # of the I x N x C x T tensor of one chunk: 64 MiB in float32


def maxsim(
    slots_ANE: Tensor,
    primitives_CTE: Tensor,
    objects_CT: Tensor,
    reduce: Literal["sum", "mean"] = "sum",
    max_elements: int = MAX_ELEMENTS,
) -> Tensor:
    """scores_AC = sum over the real objects t of schema c of max over slots n of <slots_an, primitives_ct>.

    reduce "mean" divides by the schema's number of real objects, at least 1. A schema without objects scores 0.
    Computed in float32, or in float64 where an input is so, also under autocast; the scores keep that dtype.
    The gradient goes to the best slot alone, the lowest index at ties. Kept for the backward: A*C*T slot indices, a
    byte each. At no time are there more than max_elements pairs of a slot and a primitive (but one image's at the
    least). ValueError for another reduce.
    """
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce is 'sum' or 'mean', not {reduce!r}")
    dtype = torch.promote_types(torch.promote_types(slots_ANE.dtype, primitives_CTE.dtype), torch.float32)
    # A zero vector in the place of padding scores 0 with every slot, and hands no gradient to any of them.
    real_CTE = primitives_CTE.to(dtype).masked_fill(~objects_CT[..., None], 0)
    scores_AC = _MaxSim.apply(slots_ANE.to(dtype), real_CTE, max_elements)
    return scores_AC if reduce == "sum" else scores_AC / objects_CT.sum(dim=1).clamp(min=1).to(dtype)


class _MaxSim(torch.autograd.Function):
    """The sum over all T. Written out so that one byte an index is kept for the backward; autograd keeps eight."""

    @staticmethod
    def forward(ctx, slots_ANE: Tensor, primitives_CTE: Tensor, max_elements: int) -> Tensor:
        A, N, _ = slots_ANE.shape
        C, T, _ = primitives_CTE.shape
        chunk = max(1, max_elements // max(1, N * C * T))
        scores_AC = slots_ANE.new_empty(A, C)
        best_ACT = torch.empty(A, C, T, dtype=torch.uint8 if N <= 256 else torch.int64, device=slots_ANE.device)
        with torch.autocast(slots_ANE.device.type, enabled=False):
            for start in range(0, A, chunk):
                slots_INE = slots_ANE[start : start + chunk]
                dots_INCT = (slots_INE.flatten(0, 1) @ primitives_CTE.flatten(0, 1).T).view(-1, N, C, T)
                highest_ICT, index_ICT = dots_INCT.max(dim=1)  # the first of equals
                scores_AC[start : start + chunk] = highest_ICT.sum(dim=-1)
                best_ACT[start : start + chunk] = index_ICT
        ctx.save_for_backward(slots_ANE, primitives_CTE, best_ACT)
        ctx.chunk = chunk
        return scores_AC

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_AC,) = grads
        slots_ANE, primitives_CTE, best_ACT = ctx.saved_tensors
        A, N, E = slots_ANE.shape
        C, T, _ = primitives_CTE.shape
        primitives_QE = primitives_CTE.flatten(0, 1)  # Q = C * T
        grad_slots_ANE = torch.zeros_like(slots_ANE)
        grad_primitives_QE = torch.zeros_like(primitives_QE)
        with torch.autocast(slots_ANE.device.type, enabled=False):
            for start in range(0, A, ctx.chunk):
                rows = slice(start, start + ctx.chunk)
                # A primitive hands its score's gradient to the pair of itself and its best slot.
                best_I1CT = best_ACT[rows, None].long()
                pairs_INCT = grad_AC.new_zeros(len(best_I1CT), N, C, T)
                pairs_INCT.scatter_(1, best_I1CT, grad_AC[rows, None, :, None].expand_as(best_I1CT))
                pairs_RQ = pairs_INCT.view(-1, C * T)  # R = I * N
                if ctx.needs_input_grad[0]:
                    grad_slots_ANE[rows] = (pairs_RQ @ primitives_QE).view(-1, N, E)
                if ctx.needs_input_grad[1]:
                    grad_primitives_QE += pairs_RQ.T @ slots_ANE[rows].flatten(0, 1)
        return grad_slots_ANE, grad_primitives_QE.view_as(primitives_CTE), None
