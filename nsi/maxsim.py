"""The score of an image and a schema: sum over the schema's objects of the best slot's dot product.

ColBERT's MaxSim (Khattab and Zaharia, SIGIR 2020) with slots as document tokens and primitives as query tokens. All of
it goes tile by tile, some images by some schemas: the matrix of all slots by all primitives is never there, and the
backward finds each tile's best slots once more instead of keeping them.

Shapes: A images, N slots, C schemas, T objects (padded), E embedding; a tile has I images and J schemas, and in it
K = N * I slots and Q = T * J primitives.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Reduce = Literal["sum", "mean"]

CPU_ELEMENTS = 1 << 21  # of a tile's largest tensor: small, for it is read several times and should stay in the cache
DEVICE_ELEMENTS = 1 << 22  # a GPU wants more at once; 16 MiB in float32, of which some ten are there at a time


def maxsim(
    slots_ANE: Tensor,
    primitives_CTE: Tensor,
    objects_CT: Tensor,
    reduce: Reduce = "sum",
    max_elements: int | None = None,
) -> Tensor:
    """scores_AC = sum over the real objects t of schema c of max over slots n of <slots_an, primitives_ct>.

    reduce "mean" divides by the schema's number of real objects, at least 1. A schema without objects scores 0.
    Computed in float32, or in float64 where an input is so, also under autocast; the scores keep that dtype.
    The gradient goes to the best slot alone, the lowest index at ties. Memory besides the scores: the inputs, their
    gradients and a few tensors of max_elements, but one image by one schema at the least; None takes what suits the
    device. ValueError for another reduce.
    """
    slots_ANE, primitives_CTE = scored(slots_ANE, primitives_CTE, objects_CT, reduce)
    return _MaxSim.apply(slots_ANE, primitives_CTE, max_elements)  # pyright: ignore[reportReturnType]


def scored(slots_ANE: Tensor, primitives_CTE: Tensor, objects_CT: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Slots and primitives in the score's dtype, such that the plain sum over all T is the score.

    A zero vector in the place of padding scores 0 with every slot, and hands no gradient to any of them.
    """
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce is 'sum' or 'mean', not {reduce!r}")
    dtype = torch.promote_types(torch.promote_types(slots_ANE.dtype, primitives_CTE.dtype), torch.float32)
    primitives_CTE = primitives_CTE.to(dtype).masked_fill(~objects_CT[..., None], 0)
    if reduce == "mean":
        primitives_CTE = primitives_CTE / objects_CT.sum(dim=1).clamp(min=1).to(dtype)[:, None, None]
    return slots_ANE.to(dtype), primitives_CTE


def tiles(slots_ANE: Tensor, primitives_CTE: Tensor, max_elements: int | None) -> Iterator[tuple[slice, slice]]:
    """The images and the schemas of each tile. Tiles are about square, where both sides are reused most."""
    if max_elements is None:
        max_elements = CPU_ELEMENTS if slots_ANE.device.type == "cpu" else DEVICE_ELEMENTS
    # The largest tensor holds all pairs of a slot and a primitive; the kernels have but those of image and schema.
    N, T = (1, 1) if _by_kernels(slots_ANE) else (slots_ANE.shape[1], primitives_CTE.shape[1])
    images = max(1, math.isqrt(max_elements) // max(1, N))
    schemas = max(1, max_elements // max(1, images * N * T))
    for image in range(0, len(slots_ANE), images):
        for schema in range(0, len(primitives_CTE), schemas):
            yield slice(image, image + images), slice(schema, schema + schemas)


def gradients(
    slots_ANE: Tensor,
    primitives_CTE: Tensor,
    weigh: Callable[[slice, slice, Tensor], Tensor],
    max_elements: int | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of all slots and primitives; `weigh` takes a tile's images, schemas and scores to gradients."""
    grad_slots_ANE = torch.zeros_like(slots_ANE)
    grad_primitives_CTE = torch.zeros_like(primitives_CTE)
    with torch.autocast(slots_ANE.device.type, enabled=False):
        for images, schemas in tiles(slots_ANE, primitives_CTE, max_elements):
            weigh_tile = functools.partial(weigh, images, schemas)
            slots_INE, primitives_JTE = tile_gradients(slots_ANE[images], primitives_CTE[schemas], weigh_tile)
            grad_slots_ANE[images] += slots_INE
            grad_primitives_CTE[schemas] += primitives_JTE
    return grad_slots_ANE, grad_primitives_CTE


def tile_scores(slots_INE: Tensor, primitives_JTE: Tensor) -> Tensor:
    """scores_IJ of a tile, the sum over all T. No autograd here, nor in `tile_gradients`."""
    if _by_kernels(slots_INE):
        from nsi import maxsim_triton

        return maxsim_triton.scores(slots_INE, primitives_JTE)
    dots_NIQ = _dots(slots_INE, primitives_JTE)
    return _sum_over_objects(dots_NIQ.amax(dim=0), primitives_JTE)


def tile_gradients(
    slots_INE: Tensor, primitives_JTE: Tensor, weigh: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The gradients of a tile's slots and primitives; `weigh` takes its scores_IJ to their gradients_IJ."""
    if _by_kernels(slots_INE):
        from nsi import maxsim_triton

        scores_IJ, best_TIJ = maxsim_triton.scores_and_best(slots_INE, primitives_JTE)
        return maxsim_triton.gradients(slots_INE, primitives_JTE, best_TIJ, weigh(scores_IJ))
    dots_NIQ = _dots(slots_INE, primitives_JTE)
    best_IQ = dots_NIQ.amax(dim=0)
    gradients_IJ = weigh(_sum_over_objects(best_IQ, primitives_JTE))
    # A primitive hands its score's gradient to the first slot that has the best score, and the others get what is
    # left: nothing. In place and by floats, which is several times as fast as indices and a scatter on a CPU.
    left_IQ = gradients_IJ.repeat(1, primitives_JTE.shape[1])
    for dots_IQ in dots_NIQ:
        left_IQ.sub_(dots_IQ.eq_(best_IQ).mul_(left_IQ))
    pairs_KQ = dots_NIQ.flatten(0, 1)
    slots_KE, primitives_QE = _rows(slots_INE), _rows(primitives_JTE)
    slots_NIE = (pairs_KQ @ primitives_QE).view(dots_NIQ.shape[0], -1, slots_INE.shape[2])
    primitives_TJE = (pairs_KQ.T @ slots_KE).view(primitives_JTE.shape[1], -1, primitives_JTE.shape[2])
    return slots_NIE.transpose(0, 1), primitives_TJE.transpose(0, 1)


def _dots(slots_INE: Tensor, primitives_JTE: Tensor) -> Tensor:
    """All pairs, with slots first and objects before schemas: reductions over both run along whole rows."""
    return (_rows(slots_INE) @ _rows(primitives_JTE).T).view(slots_INE.shape[1], slots_INE.shape[0], -1)


def _rows(tokens_BNE: Tensor) -> Tensor:
    return tokens_BNE.transpose(0, 1).flatten(0, 1)


def _sum_over_objects(best_IQ: Tensor, primitives_JTE: Tensor) -> Tensor:
    return best_IQ.view(-1, primitives_JTE.shape[1], primitives_JTE.shape[0]).sum(dim=1)


def _by_kernels(slots: Tensor) -> bool:
    """Whether Triton's kernels do it: they know float32. In Triton's interpreter they run on the CPU."""
    on = slots.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return on and slots.dtype == torch.float32 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class _MaxSim(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slots_ANE: Tensor, primitives_CTE: Tensor, max_elements: int | None) -> Tensor:
        scores_AC = slots_ANE.new_empty(len(slots_ANE), len(primitives_CTE))
        with torch.autocast(slots_ANE.device.type, enabled=False):
            for images, schemas in tiles(slots_ANE, primitives_CTE, max_elements):
                scores_AC[images, schemas] = tile_scores(slots_ANE[images], primitives_CTE[schemas])
        ctx.save_for_backward(slots_ANE, primitives_CTE)
        ctx.max_elements = max_elements
        return scores_AC

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_AC,) = grads
        slots_ANE, primitives_CTE = ctx.saved_tensors

        def weigh(images: slice, schemas: slice, scores_IJ: Tensor) -> Tensor:
            return grad_AC[images, schemas]

        return *gradients(slots_ANE, primitives_CTE, weigh, ctx.max_elements), None
