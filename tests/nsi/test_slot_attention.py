"""Slot attention: a textbook loop gives the same, and its symmetries hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional

from nsi.slot_attention import SlotAttention

B, P, F, N, D = 2, 7, 5, 3, 6


def module(num_heads=1, iterations=2, **options) -> SlotAttention:
    torch.manual_seed(0)
    return SlotAttention(F, D, 8, iterations, num_heads, N, **options).double()


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


@pytest.mark.parametrize("start", ["noise", "learned"])
def test_bilevel_has_the_same_slots_and_the_gradient_of_the_last_iteration(start):
    features_BPF, noise_BND = inputs()
    whole, bilevel = module(iterations=3, start=start), module(iterations=3, start=start, bilevel=True)
    slots_BND, attention_BNP = bilevel(features_BPF, noise_BND)
    expected_BND, expected_BNP = whole(features_BPF, noise_BND)
    torch.testing.assert_close(slots_BND, expected_BND, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention_BNP, expected_BNP, rtol=1e-12, atol=1e-12)
    slots_BND.square().sum().backward()

    # The textbook of it: two iterations whose result is a constant, plus a start whose value is 0 and gradient is 1.
    other = module(iterations=2, start=start)
    with torch.no_grad():
        reached_BND, _ = other(features_BPF, noise_BND)
    inputs_BPF = other.norm_inputs(other.input_mlp(other.input_norm(features_BPF)))
    k_BHPK = other._split(other.project_k(inputs_BPF)) * D**-0.5
    v_BHPK = other._split(other.project_v(inputs_BPF))
    start_BND = other._start(noise_BND)
    last_BND, _ = other._iterate(reached_BND + start_BND - start_BND.detach(), k_BHPK, v_BHPK)
    last_BND.square().sum().backward()
    for (name, one), two in zip(bilevel.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-12, msg=name)
        assert one.grad.any(), name


def test_learned_starts_are_each_slots_own_and_nothing_is_drawn():
    m = module(start="learned")
    features_BPF, noise_BND = inputs()
    slots_BND, _ = m(features_BPF, noise_BND)
    again_BND, _ = m(features_BPF, noise_BND + 1)
    assert torch.equal(slots_BND, again_BND)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        m.slot_starts.copy_(m.slot_starts[order])
    torch.testing.assert_close(m(features_BPF, noise_BND)[0], slots_BND[:, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slots_keep_float32_in_half_precision(dtype):
    """Patches in 8 or 11 bits, the competition in 24: slots stay near the exact ones."""
    m = SlotAttention(F, D, 8, 8)
    features_BPF, noise_BND = (x.float() for x in inputs())
    exact_BND, exact_BNP = m(features_BPF, noise_BND)
    slots_BND, attention_BNP = m.to(dtype)(features_BPF.to(dtype), noise_BND)
    assert slots_BND.dtype == attention_BNP.dtype == torch.float32
    torch.testing.assert_close(attention_BNP.sum(dim=1), torch.ones(B, P))  # to 1e-5: bfloat16 would miss by 1e-3
    torch.testing.assert_close(slots_BND, exact_BND, rtol=0.1, atol=0.1)
    torch.testing.assert_close(attention_BNP, exact_BNP, rtol=0, atol=0.05)


def test_initialisation():
    m = SlotAttention(64, 48, 32, 3)
    for gate in m.gru.weight_hh.detach().chunk(3):
        torch.testing.assert_close(gate @ gate.T, torch.eye(48), atol=1e-5, rtol=0)
    assert all(not p.any() for name, p in m.named_parameters() if "bias" in name)
    assert m.input_mlp[0].weight.abs().max() <= (6 / 64) ** 0.5  # Kaiming, in front of the ReLU
    assert m.project_q.weight.abs().max() <= (6 / 96) ** 0.5  # Xavier
