"""The order of training: a permutation every epoch, a pure function of (seed, step), frozen for ever."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.order import Order, permute, rank_rows, rows_per_rank


@given(size=st.integers(1, 5000), key=st.integers(0, 2**63))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    places = permute(np.arange(size), size, key, 3)
    assert sorted(places.tolist()) == list(range(size))


def test_permutations_of_different_keys_differ() -> None:
    one, two = permute(np.arange(1000), 1000, 1, 0), permute(np.arange(1000), 1000, 1, 1)
    assert (one == two).sum() < 20  # one place in a thousand agrees by chance
    assert (one == np.arange(1000)).sum() < 20


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    batch=st.integers(1, 50),
    block=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_every_epoch_has_every_sample_once(counts: list[int], batch: int, block: int, seed: int) -> None:
    order = Order(tuple(counts), seed, batch, block)
    n = order.samples
    ids = np.concatenate([order.batch(step) for step in range(-(-3 * n // batch))])
    for epoch in range(3):
        assert sorted(ids[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 64, 200])
def test_ranks_share_a_batch_without_loss(world: int) -> None:
    parts = [rank_rows(128, rank, world) for rank in range(world)]
    assert [row for part in parts for row in range(128)[part]] == list(range(128))
    assert max(len(range(128)[part]) for part in parts) == rows_per_rank(128, world)


def test_a_batch_needs_no_other_batch() -> None:
    order = Order((500,) * 20, 5, 96)
    late = order.batch(777)
    assert np.array_equal(Order((500,) * 20, 5, 96).batch(777), late)
    assert not np.array_equal(Order((500,) * 20, 6, 96).batch(777), late)


def test_a_batch_touches_few_shards() -> None:
    order = Order((100,) * 1000, 0, 512, block_shards=8)
    shards_touched = {int(sample) // 100 for sample in order.batch(3)}
    assert len(shards_touched) <= 16  # a block, or two where the batch crosses


def test_samples_are_mixed_within_a_block() -> None:
    order = Order((500,) * 8, 0, 4000)
    ids = order.batch(0)
    neighbours = np.abs(np.diff(ids)) == 1
    assert neighbours.sum() < 20
    # A uniform permutation of n has a mean distance of n / 3 between neighbours.
    assert 4000 / 3 * 0.9 < np.abs(np.diff(ids)).mean() < 4000 / 3 * 1.1


def test_golden_digest() -> None:
    """Changing the order changes what every run means: this digest must never change."""
    order = Order((500,) * 79 + (123,), seed=0, batch_size=128)
    digest = hashlib.sha256()
    for step in [*range(700), 10**6, 10**9]:
        digest.update(order.batch(step).astype("<i8").tobytes())
    assert digest.hexdigest() == GOLDEN
    assert order.batch(0)[:8].tolist() == GOLDEN_HEAD


def test_seeking_far_is_no_replay() -> None:
    order = Order((500,) * 1000, 0, 256)
    order.batch(0)
    began = time.perf_counter()
    order.batch(10**9)
    assert time.perf_counter() - began < 1.0  # replaying would take days; a pure function takes milliseconds


GOLDEN = "8c95062fad6a3fa3899a3aca0813c28645d13c4ec91fc75d27ae9240e9803487"
GOLDEN_HEAD = [31978, 9469, 2794, 35015, 2022, 2421, 13559, 1841]
