"""The decoder's cheap arrangement against the textbook form, in values and in gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nsi.decoder import BroadcastDecoder


def textbook(decoder: BroadcastDecoder, slots_BND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The MLP on slot + position for every pair of the two, F + 1 outputs, mixed by alpha."""
    activation = {"relu": functional.relu, "silu": functional.silu}[decoder.activation]
    x = slots_BND[:, :, None] + decoder.positions  # B, N, P, D
    x = activation(functional.linear(x, decoder.first_weight, decoder.first_bias))
    for layer in decoder.hidden:
        x = activation(functional.linear(x, layer.weight, layer.bias))
    last_weight = torch.cat([decoder.alpha.weight, decoder.features.weight])
    x = functional.linear(x, last_weight, torch.cat([decoder.alpha.bias, decoder.features.bias]))
    alphas = x[..., :1].softmax(dim=1)
    return (alphas * x[..., 1:]).sum(dim=1), alphas.squeeze(-1)


def results(form, decoder: BroadcastDecoder, slots_BND: torch.Tensor) -> list[torch.Tensor]:
    """Both outputs of a form, and the gradients of the slots and all parameters."""
    reconstruction_BPF, alphas_BNP = form(slots_BND)
    weights = torch.linspace(-1, 1, reconstruction_BPF.numel(), dtype=torch.float64).view_as(reconstruction_BPF)
    loss = (reconstruction_BPF.double() * weights).sin().sum() + alphas_BNP.double().square().sum()
    return [reconstruction_BPF, alphas_BNP, *torch.autograd.grad(loss, [slots_BND, *decoder.parameters()])]


def distance(found: torch.Tensor, truth: torch.Tensor, floor: float = 0.0) -> float:
    """The norm of the difference, relative to that of the truth, or to `floor` if that is larger."""
    return float((found.detach().double() - truth.detach()).norm() / truth.detach().norm().clamp(min=floor))


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 7),
    st.integers(1, 3),
    st.sampled_from(["relu", "silu"]),
    st.booleans(),
)
@settings(derandomize=True, deadline=None, max_examples=40)
def test_equals_the_textbook_form(batch, slots, patches, width, features, depth, activation, recompute):
    torch.manual_seed(0)
    decoder = BroadcastDecoder(width, features, patches, 8, depth, 1.0, activation, recompute).double()
    for parameter in decoder.parameters():  # biases too
        torch.nn.init.normal_(parameter)
    slots_BND = torch.randn(batch, slots, width, dtype=torch.float64, requires_grad=True)
    truth = results(lambda x: textbook(decoder, x), decoder, slots_BND)
    for ours, theirs in zip(results(decoder, decoder, slots_BND), truth, strict=True):
        assert distance(ours, theirs, floor=1.0) <= 1e-12  # alpha's bias has none at all


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(("dtype", "autocast"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_rounds_no_more_than_the_textbook_form(dtype: str, autocast: bool, activation, recompute: bool) -> None:
    """Parameters in float32, in float32 under autocast, in bfloat16. The slots are of the same dtype."""
    torch.manual_seed(0)
    decoder = BroadcastDecoder(16, 24, 30, 64, 3, 1.0, activation, recompute).to(getattr(torch, dtype))
    slots_BND = torch.randn(4, 5, 16, dtype=decoder.positions.dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = results(decoder, decoder, slots_BND)
        theirs = results(lambda x: textbook(decoder, x), decoder, slots_BND)
    decoder.double()
    truth = results(lambda x: textbook(decoder, x), decoder, slots_BND.detach().double().requires_grad_())
    assert ours[0].dtype == (torch.float32 if dtype == "float32" and not autocast else torch.bfloat16)
    assert ours[1].dtype == torch.float32
    names = ["reconstruction", "alphas", "slots", *dict(decoder.named_parameters())]
    for name, mine, other, true in zip(names, ours, theirs, truth, strict=True):
        if name != "alpha.bias":  # whose true gradient is zero
            assert 1e-9 < distance(mine, true) <= 3 * distance(other, true), name


def test_the_parameters_are_those_of_linear_layers() -> None:
    """Their names are in everybody's checkpoints, their draws in everybody's seeds."""
    torch.manual_seed(3)
    decoder = BroadcastDecoder(4, 6, 9, 8, 3)
    torch.manual_seed(3)
    positions = torch.randn(9, 4) * 0.02
    first, *others = [nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 6)]
    expected = {"positions": positions, "first_weight": first.weight, "first_bias": first.bias}
    for name, layer in zip(["hidden.0", "hidden.1", "alpha", "features"], others, strict=True):
        expected |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    assert list(decoder.state_dict()) == list(expected)
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_big_tensor_is_never_built():
    B, N, P, H, F = 2, 3, 50, 8, 1000
    decoder = BroadcastDecoder(4, F, P, H, 2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        reconstruction_BPF, _ = decoder(torch.randn(B, N, 4))
    assert reconstruction_BPF.shape == (B, P, F)
    assert max(saved) <= max(B * N * P * H, F * H)


def test_position_std_and_depth():
    assert abs(BroadcastDecoder(64, 3, 400, 4, 1).positions.std() - 0.02) < 0.001
    assert abs(BroadcastDecoder(64, 3, 400, 4, 1, position_std=1.0).positions.std() - 1) < 0.05
    with pytest.raises(ValueError, match="hidden layer"):
        BroadcastDecoder(4, 3, 4, 4, 0)
