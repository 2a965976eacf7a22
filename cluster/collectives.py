"""What ranks say to each other: rows gathered with the gradient of the whole batch, and small facts shared.

Shapes: a rank has R rows, of which some may be empty; W ranks have W * R together, in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nsi.errors import UserError

Thing = TypeVar("Thing")


def gather_rows(rows_R: torch.Tensor) -> torch.Tensor:
    """Everybody's rows, (W * R, ...), differentiable.

    The gradient of each row is summed over all ranks, so that a loss of local rows against gathered columns has the
    gradient of the one-process batch once the ranks' losses are added up. Slicing the gathered tensor without this
    sum is the classic mistake: it drops what other ranks' losses say about our columns.
    """
    if rows_R.dtype == torch.bool:  # gloo has no booleans
        return _GatherRows.apply(rows_R.to(torch.uint8)).to(torch.bool)  # type: ignore[union-attr]
    return _GatherRows.apply(rows_R)  # type: ignore[return-value]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_R: torch.Tensor) -> torch.Tensor:
        ctx.rows = rows_R.shape[0]
        gathered = rows_R.new_empty(dist.get_world_size() * ctx.rows, *rows_R.shape[1:])
        dist.all_gather(list(gathered.chunk(dist.get_world_size())), rows_R.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        gradient_WR = grad_outputs[0].contiguous().clone()
        dist.all_reduce(gradient_WR)
        begin = dist.get_rank() * ctx.rows
        return gradient_WR[begin : begin + ctx.rows]


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, not differentiable."""
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def share(thing: Thing) -> Thing:
    """Rank 0's object, on every rank."""
    box = [thing]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def collect(thing: Thing) -> list[Thing]:
    """Every rank's object, on every rank, in the order of the ranks."""
    things: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def any_rank(flag: bool) -> bool:
    """Whether any rank says so: all ranks get the same answer at the same step."""
    vote = torch.tensor([int(flag)])
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())


def together(make: Callable[[], Thing]) -> Thing:
    """Runs something on every rank; where it fails on any, all end, and the first that failed says why."""
    made: Any = None
    trouble: str | None = None
    try:
        made = make()
    except UserError as error:
        trouble = str(error)
    except Exception as error:  # the others must hear of it too, or they would wait for ever
        trouble = f"{type(error).__name__}: {error}"
    troubles = collect(trouble)
    failed = [rank for rank, each in enumerate(troubles) if each is not None]
    if not failed:
        return made
    if trouble is not None and troubles.index(trouble) == dist.get_rank():
        raise UserError(trouble)
    raise SystemExit(1)
