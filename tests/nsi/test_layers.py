"""The narrow layers: torch's own numbers in full precision, and no less than that precision anywhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nsi.layers import GRUCell, LayerNorm, Linear, in_full_precision, mlp, wide

CASES = [
    (Linear(5, 3), nn.Linear(5, 3), 1),
    (Linear(5, 3, bias=False), nn.Linear(5, 3, bias=False), 1),
    (LayerNorm(5), nn.LayerNorm(5), 1),
    (GRUCell(5, 5), nn.GRUCell(5, 5), 2),
]


def drawn(ours: nn.Module, torchs: nn.Module, inputs: int, dtype: torch.dtype):
    """Copies of the two with equal weights, so that no test finds another's gradients; and inputs."""
    torch.manual_seed(0)
    ours, torchs = copy.deepcopy(ours), copy.deepcopy(torchs)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    torchs.load_state_dict(ours.state_dict())
    return ours.to(dtype), torchs.to(dtype), [torch.randn(4, 5).to(dtype) for _ in range(inputs)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case[1]).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torchs_layer_with_its_gradient(case, dtype) -> None:
    ours, torchs, inputs = drawn(*case, dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    found, expected = ours(*inputs), torchs(*inputs)
    torch.testing.assert_close(found, expected, **tolerance)
    found.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, **tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case[1]).__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_compute_in_float32(case, dtype) -> None:
    ours, torchs, inputs = drawn(*case, dtype)
    found = ours(*inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torchs.float()(*(x.float() for x in inputs)), rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert all(parameter.grad.dtype == dtype for parameter in ours.parameters())


def test_autocast_does_not_reach_them() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(4, 5), mlp(5, 8, 3)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), exact)
        assert nn.Linear(5, 3)(x).dtype == torch.bfloat16  # so that it could have been otherwise
        with in_full_precision(x):
            assert (x @ x.T).dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32),
     (torch.float64, torch.float64)],
)  # fmt: skip
def test_wide(dtype, expected) -> None:
    assert wide(torch.ones(1, dtype=dtype)).dtype == expected
