"""MaxSim of a tile as Triton kernels, in float32: what `nsi.maxsim` uses on a GPU.

No pair of a slot and a primitive ever leaves the chip: a program holds the dots of a block of images with a block of
schemas, one object after the other, and writes their scores and, for the backward, the best slots. The gradients go
the same way back, with one program for a block of what it writes: no atomics, so that sums have one order. Dots are
IEEE float32 and not TF32, whose ten bits would make ties of different slots.

Shapes: I images, N slots, J schemas, T objects, E embedding; a block has BI images of BN slots (BR = BI * BN rows),
BJ schemas, and BE of the embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Chosen such that dots and operands stay in registers from sm_80 to sm_100: ptxas says so without a GPU.
BLOCK_ROWS = 64  # BR; more slots than that come in turns
BLOCK_SCHEMAS = 64  # BJ
BLOCK_EMBEDDING = 32  # BE at most
WARPS = 8


def scores(slots_INE: Tensor, primitives_JTE: Tensor) -> Tensor:
    """scores_IJ of a tile, the sum over all T."""
    return _scores(slots_INE, primitives_JTE, None)


def scores_and_best(slots_INE: Tensor, primitives_JTE: Tensor) -> tuple[Tensor, Tensor]:
    """scores_IJ of a tile, and best_TIJ, the lowest index of the slots that are best for an object."""
    shape = (primitives_JTE.shape[1], len(slots_INE), len(primitives_JTE))
    best_TIJ = torch.empty(shape, dtype=torch.int16, device=slots_INE.device)
    return _scores(slots_INE, primitives_JTE, best_TIJ), best_TIJ


def gradients(slots_INE: Tensor, primitives_JTE: Tensor, best_TIJ: Tensor, grad_IJ: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a tile's slots and primitives, given those of its scores."""
    slots_INE, primitives_JTE, grad_IJ = slots_INE.contiguous(), primitives_JTE.contiguous(), grad_IJ.contiguous()
    grad_slots_INE, grad_primitives_JTE = torch.empty_like(slots_INE), torch.empty_like(primitives_JTE)
    sizes = _sizes(slots_INE, primitives_JTE)
    blocks_I, blocks_N, blocks_J, blocks_E = (triton.cdiv(sizes[of], sizes[f"B{of}"]) for of in "INJE")
    with torch.cuda.device_of(slots_INE):
        grad_slots_kernel[(blocks_I, blocks_N, blocks_E)](grad_IJ, best_TIJ, primitives_JTE, grad_slots_INE, **sizes)
        grad_primitives_kernel[(blocks_J, sizes["T"], blocks_E)](
            grad_IJ, best_TIJ, slots_INE, grad_primitives_JTE, **sizes
        )
    return grad_slots_INE, grad_primitives_JTE


def _scores(slots_INE: Tensor, primitives_JTE: Tensor, best_TIJ: Tensor | None) -> Tensor:
    slots_INE, primitives_JTE = slots_INE.contiguous(), primitives_JTE.contiguous()
    scores_IJ = slots_INE.new_empty(len(slots_INE), len(primitives_JTE))
    sizes = _sizes(slots_INE, primitives_JTE)
    grid = (triton.cdiv(sizes["I"], sizes["BI"]), triton.cdiv(sizes["J"], sizes["BJ"]))
    with torch.cuda.device_of(slots_INE):
        scores_kernel[grid](slots_INE, primitives_JTE, scores_IJ, best_TIJ, **sizes)
    return scores_IJ


def _sizes(slots_INE: Tensor, primitives_JTE: Tensor) -> dict[str, Any]:
    """Every size a kernel asks for."""
    (I, N, E), (J, T, _) = slots_INE.shape, primitives_JTE.shape  # noqa: E741
    return {"I": I, "J": J, "N": N, "T": T, "E": E, **block_sizes(N, E)}


def block_sizes(N: int, E: int) -> dict[str, int]:
    """The sizes of a block: powers of 2, and at least the 16 that tl.dot asks for."""
    BN = min(BLOCK_ROWS, max(16, triton.next_power_of_2(N)))
    BE = min(BLOCK_EMBEDDING, max(16, triton.next_power_of_2(E)))
    return {"BI": BLOCK_ROWS // BN, "BN": BN, "BJ": BLOCK_SCHEMAS, "BE": BE, "num_warps": WARPS}


@triton.jit
def scores_kernel(
    slots_INE, primitives_JTE, scores_IJ, best_TIJ, I, J,  # noqa: E741
    N: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
    BI: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """A program a block of scores_IJ."""
    image = tl.program_id(0) * BI
    images_I = image + tl.arange(0, BI)
    images_R = image + tl.arange(0, BI * BN) // BN
    schemas_J = tl.program_id(1) * BJ + tl.arange(0, BJ)
    inside_IJ = (images_I < I)[:, None] & (schemas_J < J)[None, :]
    offsets_IJ = images_I[:, None] * J + schemas_J[None, :]
    sum_IJ = tl.zeros((BI, BJ), tl.float32)
    for t in range(T):
        highest_IJ = tl.full((BI, BJ), float("-inf"), tl.float32)
        best_IJ = tl.zeros((BI, BJ), tl.int32)
        for slot in range(0, N, BN):
            slots_R = slot + tl.arange(0, BI * BN) % BN
            dots_RJ = tl.zeros((BI * BN, BJ), tl.float32)
            for e in range(0, E, BE):
                e_E = e + tl.arange(0, BE)
                slots_RE = _slots(slots_INE, images_R, slots_R, e_E, I, N, E)
                primitives_JE = _primitives(primitives_JTE, schemas_J, t, e_E, J, T, E)
                dots_RJ = tl.dot(slots_RE, tl.trans(primitives_JE), dots_RJ, input_precision="ieee")
            dots_RJ = tl.where((slots_R < N)[:, None], dots_RJ, float("-inf"))
            dots_INJ = tl.reshape(dots_RJ, (BI, BN, BJ))
            here_IJ, index_IJ = tl.max(dots_INJ, axis=1, return_indices=True, return_indices_tie_break_left=True)
            better_IJ = here_IJ > highest_IJ
            best_IJ = tl.where(better_IJ, slot + index_IJ, best_IJ)
            highest_IJ = tl.where(better_IJ, here_IJ, highest_IJ)
        sum_IJ += highest_IJ
        if best_TIJ is not None:
            tl.store(best_TIJ + t * I * J + offsets_IJ, best_IJ.to(tl.int16), mask=inside_IJ)
    tl.store(scores_IJ + offsets_IJ, sum_IJ, mask=inside_IJ)


@triton.jit
def grad_slots_kernel(
    grad_IJ, best_TIJ, primitives_JTE, grad_slots_INE, I, J,  # noqa: E741
    N: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
    BI: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """A program a block of grad_slots_INE: all primitives come by."""
    images_R = tl.program_id(0) * BI + tl.arange(0, BI * BN) // BN
    slots_R = tl.program_id(1) * BN + tl.arange(0, BI * BN) % BN
    e_E = tl.program_id(2) * BE + tl.arange(0, BE)
    sum_RE = tl.zeros((BI * BN, BE), tl.float32)
    for schema in range(0, J, BJ):
        schemas_J = schema + tl.arange(0, BJ)
        for t in range(T):
            handed_RJ = _handed(grad_IJ, best_TIJ, images_R, slots_R, schemas_J, t, I, J)
            primitives_JE = _primitives(primitives_JTE, schemas_J, t, e_E, J, T, E)
            sum_RE = tl.dot(handed_RJ, primitives_JE, sum_RE, input_precision="ieee")
    inside_RE = ((images_R < I) & (slots_R < N))[:, None] & (e_E < E)[None, :]
    tl.store(grad_slots_INE + (images_R * N + slots_R)[:, None] * E + e_E[None, :], sum_RE, mask=inside_RE)


@triton.jit
def grad_primitives_kernel(
    grad_IJ, best_TIJ, slots_INE, grad_primitives_JTE, I, J,  # noqa: E741
    N: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
    BI: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """A program a block of grad_primitives_JTE at one t: all slots come by."""
    schemas_J = tl.program_id(0) * BJ + tl.arange(0, BJ)
    t = tl.program_id(1)
    e_E = tl.program_id(2) * BE + tl.arange(0, BE)
    sum_JE = tl.zeros((BJ, BE), tl.float32)
    for image in range(0, I, BI):
        images_R = image + tl.arange(0, BI * BN) // BN
        for slot in range(0, N, BN):
            slots_R = slot + tl.arange(0, BI * BN) % BN
            handed_RJ = _handed(grad_IJ, best_TIJ, images_R, slots_R, schemas_J, t, I, J)
            slots_RE = _slots(slots_INE, images_R, slots_R, e_E, I, N, E)
            sum_JE = tl.dot(tl.trans(handed_RJ), slots_RE, sum_JE, input_precision="ieee")
    inside_JE = (schemas_J < J)[:, None] & (e_E < E)[None, :]
    tl.store(grad_primitives_JTE + (schemas_J * T + t)[:, None] * E + e_E[None, :], sum_JE, mask=inside_JE)


@triton.jit
def _slots(slots_INE, images_R, slots_R, e_E, I, N: tl.constexpr, E: tl.constexpr):  # noqa: E741
    inside_RE = ((images_R < I) & (slots_R < N))[:, None] & (e_E < E)[None, :]
    return tl.load(slots_INE + (images_R * N + slots_R)[:, None] * E + e_E[None, :], mask=inside_RE, other=0.0)


@triton.jit
def _primitives(primitives_JTE, schemas_J, t, e_E, J, T: tl.constexpr, E: tl.constexpr):
    inside_JE = (schemas_J < J)[:, None] & (e_E < E)[None, :]
    return tl.load(primitives_JTE + (schemas_J * T + t)[:, None] * E + e_E[None, :], mask=inside_JE, other=0.0)


@triton.jit
def _handed(grad_IJ, best_TIJ, images_R, slots_R, schemas_J, t, I, J):  # noqa: E741
    """What each slot gets of each score: its gradient where the slot is the best, else nothing."""
    inside_RJ = (images_R < I)[:, None] & (schemas_J < J)[None, :]
    offsets_RJ = images_R[:, None] * J + schemas_J[None, :]
    best_RJ = tl.load(best_TIJ + t * I * J + offsets_RJ, mask=inside_RJ, other=-1)
    gradient_RJ = tl.load(grad_IJ + offsets_RJ, mask=inside_RJ, other=0.0)
    return tl.where(best_RJ == slots_R[:, None], gradient_RJ, 0.0)
