"""Keyed noise: a pure function of its key, frozen by golden values, and noise by its statistics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsi.noise import KeyedNoise, _mix, _signed

# Frozen: a change of these changes every run that is resumed over it.
NORMALS = [[-0.47446844, 0.3389889], [0.35377267, -0.329998136], [-0.348895133, -0.39023751]]
UNIFORMS = [
    [0.5453391671180725, 0.6382883191108704],
    [0.8896613717079163, 0.9431440830230713],
    [0.07994735240936279, 0.15941035747528076],
]


def noise(seed=0, step=0, ids=(0,)) -> KeyedNoise:
    return KeyedNoise(seed, step, torch.tensor(ids))


def test_the_mixer_is_splitmix64():
    # The first outputs of the public reference generator from state 1234567.
    state, golden = 1234567, 0x9E3779B97F4A7C15
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    words = torch.tensor([_signed(state + golden * index) for index in (1, 2, 3)])
    assert [int(word) % 2**64 for word in _mix(words)] == expected


def test_golden_values():
    draw = noise(seed=7, step=1000, ids=(-1, 0, 40_000))
    torch.testing.assert_close(draw.normal("slots", (2,)), torch.tensor(NORMALS), rtol=1e-6, atol=0)
    assert draw.uniform(3, (2,)).tolist() == UNIFORMS


WORDS = st.integers(0, 2**63 - 1)


@given(WORDS, WORDS, st.lists(st.integers(-1, 2**62), min_size=1, max_size=6), st.data())
@settings(derandomize=True, deadline=None, max_examples=50)
def test_a_row_hangs_on_its_own_key_alone(seed, step, ids, data):
    whole = noise(seed, step, ids).normal("s", (3, 5))
    row = data.draw(st.integers(0, len(ids) - 1))
    assert torch.equal(noise(seed, step, ids[row : row + 1]).normal("s", (3, 5))[0], whole[row])
    assert torch.equal(noise(seed, step, ids).normal("s", (2, 5)), whole[:, :2])  # flat index, not shape


def test_each_part_of_the_key_counts():
    draws = [
        KeyedNoise(seed, step, torch.tensor([sample])).uniform(stream, (64,)).flatten()
        for seed in (0, 1, -1)
        for step in (0, 1)
        for sample in (-1, 0, 1)
        for stream in ("a", "b", 0, "0")
    ]
    stacked = torch.stack(draws)
    assert len(torch.unique(stacked, dim=0)) == len(draws)
    off_diagonal = torch.corrcoef(stacked) - torch.eye(len(draws))
    assert off_diagonal.abs().max() < 6 / math.sqrt(64)


def test_statistics():
    steps, ids, n = 8, 8, 20_000
    z = torch.stack([noise(3, step, range(ids)).normal("slots", (n,)) for step in range(steps)]).double()
    total = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(total)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / total)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / total)
    rows = z.reshape(steps * ids, n)
    correlation = torch.corrcoef(rows) - torch.eye(steps * ids)
    assert correlation.abs().max() < 6 / math.sqrt(n)
    assert abs((rows[:, 1:] * rows[:, :-1]).mean()) < 5 / math.sqrt(total)  # neighbours in one stream

    u = noise(3, 0, range(ids)).uniform("u", (n,)).double()
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    expected = ids * n / 100
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert 99 - 5 * math.sqrt(198) < chi_square < 99 + 5 * math.sqrt(198)


def test_dropout_zeroes_and_scales():
    x = torch.full((4, 50, 50), 2.0, dtype=torch.float64)
    dropped = noise(ids=range(4)).dropout(x, 0.25, "d")
    assert dropped.dtype == x.dtype
    assert set(dropped.unique().tolist()) == {0.0, 2 / 0.75}
    assert abs(float((dropped == 0).double().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / x.numel())
    assert noise(ids=range(4)).dropout(x, 0.0, "d") is x
    with pytest.raises(ValueError, match="probability"):
        noise().dropout(x[:1], 1.0, "d")


def test_an_empty_batch_and_an_empty_shape():
    assert KeyedNoise(0, 0, torch.empty(0, dtype=torch.int64)).normal("s", (2, 3)).shape == (0, 2, 3)
    assert noise(ids=(1, 2)).uniform("s", ()).shape == (2,)
    assert noise(ids=(1, 2)).uniform("s", (0, 4)).shape == (2, 0, 4)
