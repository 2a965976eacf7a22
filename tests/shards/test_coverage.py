"""What was read, as numbers: frozen for ever, the same for any number of ranks, and another for anything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.coverage import batch_digest, first_fault, placed, read_digest, split_digests
from shards.index import index_path
from shards.order import Order, rank_rows

ORDER = Order((5, 3, 2), seed=9, batch_size=4)
DIGESTS = np.random.default_rng(0).integers(0, 2**64, 10, np.uint64)
NONE = np.empty(0, np.int64)
bits = st.integers(0, 2**64 - 1)


def positions_of(step: int) -> np.ndarray:
    return np.arange(step * ORDER.batch_size, (step + 1) * ORDER.batch_size)


def read_all(steps: int) -> np.ndarray:
    """The digests of the first steps, read one at a time as training does."""
    return np.array([batch_digest(DIGESTS[ORDER.batch(step)], positions_of(step)) for step in range(steps)], np.uint64)


def test_golden_values() -> None:
    """Ledgers outlive versions: these numbers must never change."""
    assert read_digest("CLEVRTEX_full_000123", 0x0123456789ABCDEF, 0xFEDCBA9876543210) == 0xEB473F94B6382883
    assert read_digest("Szene-ß", 0, 2**64 - 1) == 0x914921B8E3F0E11E
    assert placed(np.array([0, 1, 2**64 - 1], np.uint64), np.array([0, 1, 2**40])).tolist() == [
        0x48218226FF3CD4BF,
        0x0921B5C2E35C60D0,
        0xF1325451B66572A6,
    ]
    assert batch_digest(np.arange(128, dtype=np.uint64), np.arange(10**12, 10**12 + 128)) == 0x0C139A02890D2A81
    assert batch_digest(np.empty(0, np.uint64), NONE) == 0


@given(key=st.text(), image=bits, json=bits, bit=st.integers(0, 63))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_every_part_of_a_sample_counts(key: str, image: int, json: int, bit: int) -> None:
    key = key.encode(errors="replace").decode()
    found = {
        read_digest(key, image, json),
        read_digest(key + "x", image, json),
        read_digest(key, image ^ 1 << bit, json),
        read_digest(key, image, json ^ 1 << bit),
    }
    assert len(found) == 4


def test_image_and_json_are_told_apart() -> None:
    assert read_digest("a", 1, 2) != read_digest("a", 2, 1)


def test_a_splits_digests_are_those_of_its_samples(shards: Path) -> None:
    index = np.load(index_path(shards / "train-000000.tar"))
    found = split_digests(index["key"], index["image"]["xxh3"], index["json"]["xxh3"])
    assert found.dtype == np.uint64
    assert found.tolist() == [
        read_digest(record["key"].decode(), int(record["image"]["xxh3"]), int(record["json"]["xxh3"]))
        for record in index
    ]


@given(digests=st.lists(bits, min_size=1, max_size=40), world=st.integers(1, 7), first=st.integers(0, 2**50))
@settings(derandomize=True, deadline=None, max_examples=80)
def test_ranks_sums_add_up_to_the_batchs(digests: list[int], world: int, first: int) -> None:
    digests_R, positions_R = np.array(digests, np.uint64), np.arange(first, first + len(digests))
    parts = [rank_rows(len(digests), rank, world) for rank in range(world)]
    sums = np.array([batch_digest(digests_R[part], positions_R[part]) for part in parts], np.uint64).view(np.int64)
    reduced = int(sums.sum())  # an all-reduce of int64, which wraps around
    assert reduced % 2**64 == batch_digest(digests_R, positions_R)


def test_another_order_is_another_batch() -> None:
    digests_R, positions_R = DIGESTS[:4], positions_of(3)
    whole = batch_digest(digests_R, positions_R)
    assert batch_digest(digests_R[::-1], positions_R[::-1]) == whole  # the rows may be summed in any order
    assert batch_digest(digests_R[[1, 0, 2, 3]], positions_R) != whole
    assert batch_digest(digests_R, positions_R + 1) != whole
    assert batch_digest(digests_R[:3], positions_R[:3]) != whole


def test_what_was_read_in_order_has_no_fault() -> None:
    seen: list[int] = []
    assert first_fault(ORDER, DIGESTS, read_all(203), NONE, NONE, seen.append) is None
    assert seen == sorted(seen)
    assert seen[-1] == 203
    assert len(seen) > 5  # so that the edges between pieces are tested too


@pytest.mark.parametrize("step", [*range(45), 101, 202])
def test_the_first_step_that_differs_is_named(step: int) -> None:
    read_N = read_all(203)
    read_N[step] ^= np.uint64(1)
    read_N[step + 1 :] = 0
    fault = first_fault(ORDER, DIGESTS, read_N, NONE, NONE, lambda done: None)
    assert fault == (step, "did not read the samples that the order gives")


def test_skipped_rows_are_left_out() -> None:
    skipped_K = np.array([0, 7, 39, 40, 41, 399])
    samples_K = ORDER.ids(skipped_K)
    read_N = read_all(100)
    for position, sample in zip(skipped_K, samples_K, strict=True):
        step = position // 4
        read_N[step : step + 1] -= placed(DIGESTS[[sample]], np.array([position]))
    assert first_fault(ORDER, DIGESTS, read_N, skipped_K, samples_K, lambda done: None) is None
    fault = first_fault(ORDER, DIGESTS, read_N, skipped_K[:-1], samples_K[:-1], lambda done: None)
    assert fault == (99, "did not read the samples that the order gives")
    samples_K[3] += 1
    fault = first_fault(ORDER, DIGESTS, read_N, skipped_K, samples_K, lambda done: None)
    assert fault == (10, "skipped another sample than the order has there")
    read_N[7] += np.uint64(1)
    fault = first_fault(ORDER, DIGESTS, read_N, skipped_K, samples_K, lambda done: None)
    assert fault == (7, "did not read the samples that the order gives")  # the first, of whatever kind


class Forgetful(Order):
    """An order that gives a sample twice in its third epoch, instead of another."""

    def ids(self, positions: np.ndarray) -> np.ndarray:
        ids = super().ids(positions)
        ids[positions == 25] = super().ids(np.array([22]))
        return ids


def test_an_order_that_repeats_is_caught_though_it_was_followed() -> None:
    order = Forgetful(ORDER.shard_samples, ORDER.seed, ORDER.batch_size)
    read_N = np.array([batch_digest(DIGESTS[order.batch(s)], positions_of(s)) for s in range(20)], np.uint64)
    fault = first_fault(order, DIGESTS, read_N, NONE, NONE, lambda done: None)
    assert fault == (5, "has a sample that comes twice in its epoch")  # position 22 is of step 5, 25 of step 6
    assert first_fault(order, DIGESTS, read_N[:5], NONE, NONE, lambda done: None) is None
