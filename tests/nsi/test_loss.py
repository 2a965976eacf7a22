"""The contrastive loss in tiles against its dense form, in values and gradients, and in what memory it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsi.loss import Rows, contrastive_sum
from tests.nsi.dense import dense_contrastive_sum

ROOT = Path(__file__).parents[2]
TAU = 0.5


def draw(R: int, N: int, T: int, E: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Rows:
    """Some rows are empty, some hold a scene twice, some schemas have no object."""
    g = torch.Generator().manual_seed(seed)
    return Rows(
        (torch.randn(R, N, E, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_(),
        (torch.randn(R, T, E, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_(),
        torch.rand(R, T, generator=g) < 0.6,
        torch.randint(0, 2 * R, (R,), generator=g),
        torch.rand(R, generator=g) < 0.8,
    )


def alone(rows: Rows, tau: float | torch.Tensor = TAU, reduce="sum", max_elements: int | None = None) -> torch.Tensor:
    return contrastive_sum(rows, lambda tensor: tensor, 0, tau, reduce, max_elements)


def gradients(loss: torch.Tensor, rows: Rows) -> list[torch.Tensor]:
    """The loss and its gradients."""
    return [loss, *torch.autograd.grad(loss, [rows.slots_RNE, rows.primitives_RTE])]


sizes = st.integers(1, 5)
reductions = st.sampled_from(["sum", "mean"])


@given(st.integers(1, 8), sizes, sizes, sizes, st.integers(0, 999), st.integers(1, 300), reductions)
@settings(derandomize=True, deadline=None, max_examples=80)
def test_equals_the_dense_form(R: int, N: int, T: int, E: int, seed: int, max_elements: int, reduce) -> None:
    rows = draw(R, N, T, E, seed)
    tau_1 = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    inputs = [rows.slots_RNE, rows.primitives_RTE, tau_1]
    ours, theirs = (
        [loss.reshape(()), *torch.autograd.grad(loss.sum(), inputs)]
        for loss in (alone(rows, tau_1, reduce, max_elements), dense_contrastive_sum(rows, tau_1, reduce))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 1, 3, 4), (4, 300, 2, 2), (1, 3, 2, 4)])
def test_one_slot_many_slots_one_row(shape: tuple[int, int, int, int]) -> None:
    rows = draw(*shape)._replace(rows_R=torch.ones(shape[0], dtype=torch.bool))
    for max_elements in (None, 1000):
        found = gradients(alone(rows, max_elements=max_elements), rows)
        torch.testing.assert_close(found, gradients(dense_contrastive_sum(rows, TAU), rows), rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    rows = draw(5, 3, 2, 4, scale=0.5)
    tau_1 = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)

    def function(slots_RNE: torch.Tensor, primitives_RTE: torch.Tensor, tau_1: torch.Tensor) -> torch.Tensor:
        return alone(rows._replace(slots_RNE=slots_RNE, primitives_RTE=primitives_RTE), tau_1, "mean", 20)

    assert torch.autograd.gradcheck(function, (rows.slots_RNE, rows.primitives_RTE, tau_1))


@given(st.integers(1, 6), sizes, sizes, st.integers(0, 99), st.integers(0, 3), st.integers(0, 2), reductions)
@settings(derandomize=True, deadline=None, max_examples=40)
def test_neither_order_nor_padding_changes_the_loss(
    R: int, N: int, T: int, seed: int, padding: int, empty: int, reduce
) -> None:
    rows = draw(R, N, T, 3, seed)
    g = torch.Generator().manual_seed(seed)
    order_N, order_T, order_R = (torch.randperm(size, generator=g) for size in (N, T + padding, R + empty))
    # Objects without a primitive, and rows that are no scene: one with an object, and with the id of a scene.
    primitives_RTE = torch.cat([rows.primitives_RTE, rows.primitives_RTE.new_full((R, padding, 3), torch.nan)], dim=1)
    objects_RT = torch.cat([rows.objects_RT, rows.objects_RT.new_zeros(R, padding)], dim=1)
    changed = Rows(
        torch.cat([rows.slots_RNE, torch.ones(empty, N, 3)])[:, order_N],
        torch.cat([primitives_RTE, torch.ones(empty, T + padding, 3)])[:, order_T],
        torch.cat([objects_RT, torch.ones(empty, T + padding, dtype=torch.bool)])[:, order_T],
        torch.cat([rows.sample_ids_R, rows.sample_ids_R[:1].expand(empty)]),
        torch.cat([rows.rows_R, torch.zeros(empty, dtype=torch.bool)]),
    )
    changed = Rows(*(tensor[order_R] for tensor in changed))
    found = gradients(alone(changed, TAU, reduce, 20), rows)
    torch.testing.assert_close(found, gradients(alone(rows, TAU, reduce), rows), rtol=1e-12, atol=1e-12)


def test_ties_go_to_the_lowest_slot() -> None:
    rows = draw(4, 3, 2, 5)
    twice = rows.slots_RNE.detach().repeat_interleave(2, dim=1).requires_grad_()
    found = gradients(alone(rows._replace(slots_RNE=twice), max_elements=50), rows._replace(slots_RNE=twice))
    assert not found[1][:, 1::2].any()
    torch.testing.assert_close(found[1][:, ::2], gradients(alone(rows), rows)[1], rtol=1e-12, atol=1e-12)


def test_without_rows_or_negatives_the_loss_is_zero() -> None:
    rows = draw(4, 3, 2, 5)
    empty = rows._replace(rows_R=torch.zeros(4, dtype=torch.bool))
    same = rows._replace(sample_ids_R=torch.zeros(4, dtype=torch.long), rows_R=torch.ones(4, dtype=torch.bool))
    for each in (empty, same):
        assert not any(tensor.any() for tensor in gradients(alone(each), each))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    rows = draw(12, 3, 2, 5, scale=100.0, dtype=dtype)
    found = gradients(alone(rows, max_elements=60), rows)
    wanted = gradients(dense_contrastive_sum(rows, TAU), rows)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert found[0] > 1e4


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_summed_in_float32(autocast: bool) -> None:
    rows = draw(6, 3, 4, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = alone(rows)
    assert loss.dtype == torch.float32
    exact = rows._replace(slots_RNE=rows.slots_RNE.double(), primitives_RTE=rows.primitives_RTE.double())
    torch.testing.assert_close(loss.double(), dense_contrastive_sum(exact, TAU), rtol=1e-5, atol=1e-5)
    assert gradients(loss, rows)[1].dtype == torch.bfloat16


def test_twice_the_same_bits() -> None:
    rows = draw(20, 4, 3, 8, dtype=torch.float32)
    first, second = (gradients(alone(rows, max_elements=500), rows) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


class Watched(TorchDispatchMode):
    """Looks at every tensor that is made, and at what matrix products are given."""

    largest = 0
    denormal = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        if "mm" in func.__name__:
            for x in (x for x in tree_leaves(args) if isinstance(x, torch.Tensor)):
                self.denormal |= bool(((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).any())
        return result


@pytest.mark.parametrize("R", [60, 120])
def test_no_tensor_is_larger_than_the_inputs_or_a_tile(R: int) -> None:
    """Each tensor is linear in R or of a fixed size; `test_memory_is_linear_in_the_batch` sees how many there are."""
    N, T, E, tile = 5, 4, 8, 2000
    rows = draw(R, N, T, E, dtype=torch.float32)
    with Watched() as watched:
        alone(rows, max_elements=tile).backward()
    assert 0 < watched.largest <= max(tile, R * N * E) < R * N * R * T / 20


def test_matrix_products_see_no_denormal_numbers() -> None:
    """They take ten times as long, and exp of a low enough score is one."""
    rows = draw(64, 3, 4, 16, scale=1.5, dtype=torch.float32)
    shares = torch.exp(-torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 200)
    with Watched() as watched:
        assert alone(rows).isfinite()
        shares[None] @ shares[:, None]
        assert watched.denormal  # of this product: the watch can see
        watched.denormal = False
        alone(rows).backward()
    assert not watched.denormal


# Not getrusage's peak, which begins with that of the process that started this one.
_PEAK = """
import re, sys, torch
from nsi.loss import Rows, contrastive_sum
def run(batch):
    slots, primitives = (torch.randn(batch, tokens, 64).mul_(0.3).requires_grad_() for tokens in (15, 10))
    ids, ones = torch.arange(batch), torch.ones(batch, 10, dtype=torch.bool)
    contrastive_sum(Rows(slots, primitives, ones, ids, ones[:, 0]), lambda tensor: tensor, 0, 0.5).backward()
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(-run(64) + run(int(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_memory_is_linear_in_the_batch() -> None:
    """A batch of 2,048 takes under an eighth of 1 GB, 8,192 so under half of it; the dense form's matrix 2.5 GB."""
    command = [sys.executable, "-c", _PEAK, "2048"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(found.stdout) * 1024 < 1e9 / 8
