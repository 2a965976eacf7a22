"""The decoder's cheap arrangement against the textbook form, in values and in gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st

from nsi.decoder import BroadcastDecoder


def textbook(decoder: BroadcastDecoder, slots_BND):
    """The MLP on slot + position for every pair of the two, F + 1 outputs, mixed by alpha."""
    x = slots_BND[:, :, None] + decoder.positions  # B, N, P, D
    x = functional.linear(x, decoder.first_weight, decoder.first_bias).relu()
    for layer in decoder.hidden:
        x = layer(x).relu()
    last_weight = torch.cat([decoder.alpha.weight, decoder.features.weight])
    x = functional.linear(x, last_weight, torch.cat([decoder.alpha.bias, decoder.features.bias]))
    alphas = x[..., :1].softmax(dim=1)
    return (alphas * x[..., 1:]).sum(dim=1), alphas.squeeze(-1)


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 7),
    st.integers(1, 3),
)
@settings(derandomize=True, deadline=None, max_examples=25)
def test_equals_the_textbook_form(batch, slots, patches, width, features, depth):
    torch.manual_seed(0)
    decoder = BroadcastDecoder(width, features, patches, 8, depth, position_std=1.0).double()
    for parameter in decoder.parameters():  # biases too
        torch.nn.init.normal_(parameter)
    slots_BND = torch.randn(batch, slots, width, dtype=torch.float64, requires_grad=True)
    leaves = [slots_BND, *decoder.parameters()]
    results = []
    for form in (decoder, lambda x: textbook(decoder, x)):
        reconstruction_BPF, alphas_BNP = form(slots_BND)
        weights = torch.linspace(-1, 1, reconstruction_BPF.numel(), dtype=torch.float64).view_as(reconstruction_BPF)
        loss = (reconstruction_BPF * weights).sin().sum() + alphas_BNP.square().sum()
        results.append([reconstruction_BPF, alphas_BNP, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


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
