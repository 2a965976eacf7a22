"""MaxSim against a loop, in values and gradients, however it is cut into chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsi.maxsim import maxsim


def loop(slots_ANE, primitives_CTE, objects_CT, reduce):
    rows = []
    for slots_NE in slots_ANE:
        row = []
        for primitives_TE, objects_T in zip(primitives_CTE, objects_CT, strict=True):
            best = [max(slot @ primitive for slot in slots_NE) for primitive in primitives_TE[objects_T]]
            total = sum(best, start=slots_ANE.new_zeros(()))
            row.append(total / max(1, len(best)) if reduce == "mean" else total)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def draw(A, N, C, T, E, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    slots_ANE = torch.randn(A, N, E, generator=g, dtype=dtype).requires_grad_()
    primitives_CTE = torch.randn(C, T, E, generator=g, dtype=dtype).requires_grad_()
    return slots_ANE, primitives_CTE, torch.rand(C, T, generator=g) < 0.6, g


sizes = st.integers(1, 4)


@given(sizes, sizes, sizes, sizes, sizes, st.integers(0, 99), st.integers(1, 100), st.sampled_from(["sum", "mean"]))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_equals_the_loop(A, N, C, T, E, seed, max_elements, reduce):
    slots_ANE, primitives_CTE, objects_CT, g = draw(A, N, C, T, E, seed)
    weights_AC = torch.randn(A, C, generator=g, dtype=torch.float64)
    results = []
    for scores_AC in (
        maxsim(slots_ANE, primitives_CTE, objects_CT, reduce, max_elements),
        loop(slots_ANE, primitives_CTE, objects_CT, reduce),
    ):
        # The products with 0 tie the loss to both inputs where no schema has an object.
        loss = (scores_AC * weights_AC).sin().sum() + 0 * (slots_ANE.sum() + primitives_CTE.sum())
        results.append([scores_AC, *torch.autograd.grad(loss, [slots_ANE, primitives_CTE])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    slots_ANE, primitives_CTE, objects_CT, _ = draw(3, 4, 2, 3, 5)
    assert torch.autograd.gradcheck(lambda s, p: maxsim(s, p, objects_CT, "mean", 30), (slots_ANE, primitives_CTE))


def test_ties_go_to_the_lowest_slot():
    slots_ANE = torch.ones(2, 300, 4, requires_grad=True)  # more slots than a byte counts
    primitives_CTE = torch.ones(3, 2, 4)
    maxsim(slots_ANE, primitives_CTE, torch.ones(3, 2, dtype=torch.bool)).sum().backward()
    assert slots_ANE.grad is not None
    assert torch.equal(slots_ANE.grad[:, 0], torch.full((2, 4), 6.0))
    assert not slots_ANE.grad[:, 1:].any()


def test_many_slots_keep_their_indices():
    slots_ANE = torch.zeros(1, 300, 2)
    slots_ANE[0, 299] = 1
    slots_ANE.requires_grad_()
    maxsim(slots_ANE, torch.ones(1, 1, 2), torch.ones(1, 1, dtype=torch.bool)).sum().backward()
    assert slots_ANE.grad is not None
    assert slots_ANE.grad.nonzero().tolist() == [[0, 299, 0], [0, 299, 1]]


def test_padding_is_never_read():
    slots_ANE, primitives_CTE, objects_CT, _ = draw(3, 4, 5, 6, 2)
    poisoned_CTE = primitives_CTE.detach().masked_fill(~objects_CT[..., None], float("nan"))
    clean = maxsim(slots_ANE, primitives_CTE, objects_CT)
    assert torch.equal(maxsim(slots_ANE, poisoned_CTE, objects_CT), clean)
    (grad_ANE,) = torch.autograd.grad(maxsim(slots_ANE, poisoned_CTE, objects_CT).sum(), slots_ANE)
    assert grad_ANE.isfinite().all()
    empty = maxsim(slots_ANE, primitives_CTE, torch.zeros_like(objects_CT), "mean")
    assert torch.equal(empty, torch.zeros(3, 5, dtype=torch.float64))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_inputs_are_scored_in_float32(autocast):
    slots_ANE, primitives_CTE, objects_CT, _ = draw(3, 4, 5, 6, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores_AC = maxsim(slots_ANE, primitives_CTE, objects_CT)
    assert scores_AC.dtype == torch.float32
    exact_AC = maxsim(slots_ANE.double(), primitives_CTE.double(), objects_CT)
    torch.testing.assert_close(scores_AC.double(), exact_AC, rtol=1e-5, atol=1e-5)
    scores_AC.sum().backward()
    assert slots_ANE.grad is not None
    assert slots_ANE.grad.dtype == torch.bfloat16


def test_nothing_is_kept_for_the_backward_but_the_inputs():
    slots_ANE, primitives_CTE, objects_CT, _ = draw(8, 15, 8, 10, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        maxsim(slots_ANE, primitives_CTE, objects_CT)
    assert max(x.numel() for x in saved) <= 8 * 15 * 4


@given(sizes, sizes, sizes, sizes, st.integers(0, 99), st.integers(0, 3), st.sampled_from(["sum", "mean"]))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_neither_order_nor_padding_changes_a_score(A, N, C, T, seed, padding, reduce):
    slots_ANE, primitives_CTE, objects_CT, g = draw(A, N, C, T, 3, seed)
    order_N, order_T = torch.randperm(N, generator=g), torch.randperm(T + padding, generator=g)
    padded_CTE = torch.cat([primitives_CTE, primitives_CTE.new_full((C, padding, 3), torch.nan)], dim=1)
    padded_CT = torch.cat([objects_CT, objects_CT.new_zeros(C, padding)], dim=1)
    scores_AC = maxsim(slots_ANE, primitives_CTE, objects_CT, reduce)
    changed_AC = maxsim(slots_ANE[:, order_N], padded_CTE[:, order_T], padded_CT[:, order_T], reduce, 20)
    torch.testing.assert_close(changed_AC, scores_AC, rtol=1e-12, atol=1e-12)
    weights_AC = torch.randn(A, C, generator=g, dtype=torch.float64)
    plain, changed = (
        torch.autograd.grad((each_AC * weights_AC).sum(), [slots_ANE, primitives_CTE])
        for each_AC in (scores_AC, changed_AC)
    )
    torch.testing.assert_close(changed, plain, rtol=1e-12, atol=1e-12)


def test_no_other_reduction():
    with pytest.raises(ValueError, match="max"):
        maxsim(*draw(1, 1, 1, 1, 1)[:3], reduce="max")  # pyright: ignore[reportArgumentType]
