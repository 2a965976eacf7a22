"""Slot attention: a textbook loop gives the same, and its symmetries hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional

from nsi.slot_attention import SlotAttention

B, P, F, N, D = 2, 7, 5, 3, 6


def module(num_heads=1, iterations=2) -> SlotAttention:
    torch.manual_seed(0)
    return SlotAttention(F, D, 8, iterations, num_heads).double()


def inputs():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((B, P, F), (B, N, D)))


def textbook(m: SlotAttention, features_PF, noise_ND):
    """One image, one slot and one head at a time."""
    x_PF = m.norm_inputs(m.input_mlp(m.input_norm(features_PF)))
    k_PD, v_PD = x_PF @ m.project_k.weight.T, x_PF @ m.project_v.weight.T
    width = D // m.num_heads
    heads = [slice(h * width, (h + 1) * width) for h in range(m.num_heads)]
    slots = [m.slot_mu + m.slot_log_sigma.exp() * noise for noise in noise_ND]
    attention = None
    for _ in range(m.num_iterations):
        queries = [m.norm_slots(slot) @ m.project_q.weight.T for slot in slots]
        rows = [k_PD[:, part] @ query[part] / width**0.5 for part in heads for query in queries]
        attention = torch.stack(rows).exp()
        attention = attention / attention.sum(dim=0)
        new = []
        for n, slot in enumerate(slots):
            pieces = []
            for h, part in enumerate(heads):
                weight_P = attention[h * N + n] + 1e-8
                pieces.append(weight_P @ v_PD[:, part] / weight_P.sum())
            update = torch.cat(pieces)
            gates_i = functional.linear(update, m.gru.weight_ih, m.gru.bias_ih).chunk(3)
            gates_h = functional.linear(slot, m.gru.weight_hh, m.gru.bias_hh).chunk(3)
            reset, keep = ((i + h).sigmoid() for i, h in zip(gates_i[:2], gates_h[:2], strict=True))
            slot = (1 - keep) * (gates_i[2] + reset * gates_h[2]).tanh() + keep * slot
            new.append(slot + m.mlp(m.norm_mlp(slot)))
        slots = new
    return torch.stack(slots), attention.view(m.num_heads, N, -1).sum(dim=0)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_equals_the_textbook_loop(num_heads):
    m = module(num_heads)
    features_BPF, noise_BND = inputs()
    slots_BND, attention_BNP = m(features_BPF, noise_BND)
    for b in range(B):
        slots_ND, attention_NP = textbook(m, features_BPF[b], noise_BND[b])
        torch.testing.assert_close(slots_BND[b], slots_ND, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(attention_BNP[b], attention_NP, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention_BNP.sum(dim=1), torch.ones(B, P, dtype=torch.float64))


def test_slots_and_patches_are_sets():
    m = module()
    features_BPF, noise_BND = inputs()
    slots_BND, _ = m(features_BPF, noise_BND)
    patches, order = torch.randperm(P), torch.tensor([2, 0, 1])
    shuffled_BND, _ = m(features_BPF[:, patches], noise_BND[:, order])
    torch.testing.assert_close(shuffled_BND, slots_BND[:, order], rtol=1e-12, atol=1e-12)


def test_heads_must_divide_the_slot():
    with pytest.raises(ValueError, match="4 heads"):
        module(num_heads=4)


def test_initialisation():
    m = SlotAttention(64, 48, 32, 3)
    for gate in m.gru.weight_hh.detach().chunk(3):
        torch.testing.assert_close(gate @ gate.T, torch.eye(48), atol=1e-5, rtol=0)
    assert all(not p.any() for name, p in m.named_parameters() if "bias" in name)
    assert m.input_mlp[0].weight.abs().max() <= (6 / 64) ** 0.5  # Kaiming, in front of the ReLU
    assert m.project_q.weight.abs().max() <= (6 / 96) ** 0.5  # Xavier
