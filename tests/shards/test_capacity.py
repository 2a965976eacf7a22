"""What a run will need: hand-checked cases, sums that must add up, and bounds held against the real order."""

from __future__ import annotations

import inspect
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsi.schema import Vocabulary
from shards import capacity as capacities
from shards import pace as paces
from shards.capacity import INDEX_HEADER_BYTES, INDEX_RECORD_BYTES, Capacity, World, capacity, shards_touched
from shards.index import MemberPlace, index_bytes, make_index
from shards.loading.loader import training_batches
from shards.manifest import Manifest, ShardTable
from shards.order import Order, rank_rows, rows_per_rank
from shards.pace import Speeds, pace
from shards.reading import dataset, remote
from shards.reading.dataset import Split
from shards.reading.reader import SpanReader
from shards.reading.storage import open_storage


def manifest_of(samples: Sequence[int] | np.ndarray, bytes_: Sequence[int] | np.ndarray) -> Manifest:
    table = ShardTable(
        "train",
        np.asarray(samples, np.int64),
        np.asarray(bytes_, np.int64),
        np.zeros((len(samples), 16), np.uint8),
        np.zeros((len(samples), 32), np.uint8),
    )
    return Manifest("full", (320, 240), None, 10, "none", "official", "", Vocabulary((), (), ()), {"train": table})


def needs(samples: Sequence[int], ranks: int, nodes: int, batch_size: int, max_steps: int = 0) -> Capacity:
    """What ten epochs over shards of 1000 bytes a sample need, with two workers a rank."""
    manifest = manifest_of(samples, [1000 * count for count in samples])
    return capacity(manifest, "train", 500, World(ranks, nodes, batch_size, 2), epochs=10, max_steps=max_steps)


SLOW = Speeds(storage_mb_per_second=1, storage_latency_ms=100, decode_images_per_second=50, requests_at_once=1)


def index_size(*samples: int) -> int:
    return sum(INDEX_HEADER_BYTES + INDEX_RECORD_BYTES * count for count in samples)


def test_a_small_run_by_hand() -> None:
    found = needs([3, 5, 2, 6], ranks=4, nodes=2, batch_size=6)
    data = found.data
    assert (data.shards, data.samples, data.bytes, data.manifest_bytes) == (4, 16, 16000, 500)
    assert data.index_bytes_about == index_size(3, 5, 2, 6)
    assert found.length.steps_an_epoch == Fraction(8, 3)
    assert (found.length.steps, found.length.epochs) == (27, Fraction(81, 8))  # 160 samples are 26.67 batches
    # Six rows on four ranks are 1, 2, 1, 2; on two nodes 3 and 3.
    assert (found.rank.rows_at_least, found.rank.rows_at_most, found.rank.parts_with_most) == (1, 2, 2)
    assert (found.node.rows_at_least, found.node.rows_at_most, found.node.parts_with_most) == (3, 3, 2)
    assert found.masked_rows_a_step == 2
    assert found.rank.samples_an_epoch_at_most == Fraction(16, 3)
    assert found.rank.bytes_an_epoch_at_least == Fraction(16000, 6)
    assert found.node.samples_an_epoch_at_most == 8
    assert found.open_shards.a_batch_at_most == 4
    assert found.open_shards.a_rank_a_step_at_most == 2
    assert found.open_shards.kept_a_worker_at_most == 4
    # A node fetches every shard; all four are fewer than two blocks.
    assert (found.cache.bytes_an_epoch_at_most, found.cache.bytes_an_epoch_all_nodes_at_most) == (16000, 32000)
    assert found.cache.bytes_needed == found.cache.bytes_needed_to_fetch_once == 16000
    # A rank with a third of the rows has none of a shard's k samples with a chance of (2/3)^k.
    chances = {count: 1 - (2 / 3) ** count for count in (3, 5, 2, 6)}
    assert found.indexes.shards_a_rank_about == pytest.approx(sum(chances.values()))
    about = sum(chance * index_size(count) for count, chance in chances.items())
    assert found.indexes.bytes_a_rank_about == pytest.approx(about)
    assert found.indexes.bytes_a_node_about == pytest.approx(2 * about)
    assert found.indexes.read_once
    assert found.memory.bytes_a_rank == 4 * 64 + 4 * 89 + index_size(3, 5, 2, 6)
    assert found.memory.bytes_a_node == 2 * found.memory.bytes_a_rank


def test_max_steps_beats_epochs() -> None:
    assert needs([10], 1, 1, 4).length.steps == 25
    assert (needs([10], 1, 1, 4, max_steps=7).length.steps, needs([10], 1, 1, 4, 7).length.epochs) == (
        7,
        Fraction(14, 5),
    )


def test_a_batch_smaller_than_the_world() -> None:
    found = needs([10], ranks=8, nodes=4, batch_size=3)
    assert (found.rank.rows_at_least, found.rank.rows_at_most, found.rank.parts_with_most) == (0, 1, 3)
    assert found.masked_rows_a_step == 5
    assert found.node.samples_an_epoch_at_least == 0


def test_the_cache_holds_two_blocks_of_the_largest_shards() -> None:
    found = needs([*range(1, 101)], 1, 1, 4)
    largest = range(37, 101)  # 64 of them
    assert found.cache.bytes_needed == 1000 * sum(largest)
    assert found.cache.bytes_needed_to_fetch_once == 1000 * 5050
    assert needs([*range(1, 101)], 1, 1, 3000).cache.bytes_needed == 1000 * 5050  # a batch of more than two blocks


def test_indexes_beyond_those_kept_are_read_each_epoch() -> None:
    assert needs([10] * 128, 1, 1, 4).indexes.read_once
    found = needs([10] * 129, 1, 1, 4)
    assert not found.indexes.read_once
    assert found.indexes.bytes_a_rank_about == pytest.approx(129 * index_size(10))
    assert found.memory.index_bytes_a_rank == 128 * index_size(10)


def test_first_batch_by_hand() -> None:
    found = needs([100] * 64, ranks=4, nodes=2, batch_size=40)  # ten rows a rank, two workers each
    at_once = pace(found, SLOW).first_batch_ranged
    # A rank reads the manifest, then the indexes of the rows of three batches, 30 shards at most, one by one.
    opening = 31 * 0.1 + 2 * (500 + 30 * index_size(100)) / 1e6
    assert at_once.opening_seconds == pytest.approx(opening)
    assert at_once.reading_seconds == pytest.approx(5 * 0.1 + 20 * 1000 / 1e6)
    assert at_once.decoding_seconds == pytest.approx(5 / 50)
    assert at_once.seconds == pytest.approx(opening + 0.52 + 0.1)
    assert pace(found, replace(SLOW, requests_at_once=2)).first_batch_ranged.reading_seconds == pytest.approx(0.32)
    cached = pace(found, SLOW).first_batch_cached
    assert cached.opening_seconds == pytest.approx(opening)
    # 32 shards by four workers, and half as much besides by the two that fetch the next block.
    assert cached.reading_seconds == pytest.approx(8 * 0.1 + 1.5 * 32 * 100_000 / 1e6)
    assert cached.decoding_seconds == at_once.decoding_seconds


def test_a_batch_of_many_blocks_waits_for_all_of_them() -> None:
    speeds = replace(SLOW, storage_latency_ms=0)
    for batch_size, shards in ((320, 32), (321, 64), (100_000, 100)):
        first = pace(needs([10] * 100, 1, 1, batch_size), speeds).first_batch_cached
        assert first.reading_seconds == pytest.approx(1.5 * shards * 10_000 / 1e6)


def test_rates_by_hand() -> None:
    few = needs([100] * 64, ranks=4, nodes=2, batch_size=40)  # all indexes are kept
    rates = pace(few, SLOW).rates
    assert rates.decoding_images_per_second == pytest.approx(8 * 50)
    assert rates.ranged.images_per_second == pytest.approx(8 / (0.1 + 0.02))  # eight workers wait, then decode
    assert rates.full_cache.images_per_second == rates.filling_cache.images_per_second == pytest.approx(8 * 50)
    assert rates.ranged.mb_a_node_per_image == pytest.approx(1000 / 2 / 1e6)
    assert rates.filling_cache.mb_a_node_per_image == pytest.approx(1000 / 1e6)
    assert rates.full_cache.mb_a_node_per_image == 0
    assert pace(few, replace(SLOW, requests_at_once=4)).rates.ranged.images_per_second == pytest.approx(8 / 0.045)
    # More at once than a worker has rows, five, is no faster.
    assert pace(few, replace(SLOW, requests_at_once=32)).rates.ranged.images_per_second == pytest.approx(8 / 0.04)
    quick = pace(few, replace(SLOW, storage_latency_ms=0, decode_images_per_second=1e6)).rates
    assert quick.ranged.images_per_second == pytest.approx(2 * 1e6 / 1000)  # now the storage is what limits
    assert quick.filling_cache.images_per_second == pytest.approx(1e6 / 1000)  # and each node fetches everything


def test_rates_where_indexes_are_read_each_epoch() -> None:
    many = needs([10] * 1000, ranks=4, nodes=2, batch_size=40)
    indexes = many.indexes
    rates = pace(many, replace(SLOW, storage_latency_ms=1000)).rates
    assert rates.full_cache.images_per_second == pytest.approx(10_000 / indexes.shards_a_rank_about)  # one a second
    index_mb = 2 * indexes.bytes_a_rank_about / 10_000 / 1e6
    assert rates.full_cache.mb_a_node_per_image == pytest.approx(index_mb)
    assert rates.ranged.mb_a_node_per_image == pytest.approx(index_mb + 1000 / 2 / 1e6)
    assert rates.filling_cache.mb_a_node_per_image == pytest.approx(index_mb + 1000 / 1e6)


def test_the_readers_keep_as_many_as_is_said() -> None:
    assert inspect.signature(SpanReader).parameters["open_shards"].default == capacities.MAPS_KEPT
    assert dataset._INDEXES_KEPT == capacities.INDEXES_KEPT
    assert remote.CONCURRENT == paces.REMOTE_REQUESTS
    assert inspect.signature(training_batches).parameters["ahead"].default + 1 == paces.BATCHES_AT_START


worlds = st.integers(1, 8).flatmap(lambda nodes: st.integers(1, 8).map(lambda each: (nodes * each, nodes)))
counts = st.lists(st.integers(1, 30), min_size=1, max_size=100)


@given(samples=counts, world=worlds, batch_size=st.integers(1, 300))
@settings(derandomize=True, deadline=None, max_examples=80)
def test_shares_add_up(samples: list[int], world: tuple[int, int], batch_size: int) -> None:
    ranks, nodes = world
    found = needs(samples, ranks, nodes, batch_size)
    for share in (found.rank, found.node):
        rest = share.parts - share.parts_with_most
        total = share.samples_an_epoch_at_most * share.parts_with_most + share.samples_an_epoch_at_least * rest
        assert total == found.data.samples
        total = share.bytes_an_epoch_at_most * share.parts_with_most + share.bytes_an_epoch_at_least * rest
        assert total == found.data.bytes
    rows = [len(range(batch_size)[rank_rows(batch_size, rank, ranks)]) for rank in range(ranks)]
    assert (min(rows), max(rows)) == (found.rank.rows_at_least, found.rank.rows_at_most)
    assert rows.count(max(rows)) == found.rank.parts_with_most
    assert found.masked_rows_a_step == ranks * rows_per_rank(batch_size, ranks) - batch_size
    each = ranks // nodes
    node_rows = [sum(rows[node * each : (node + 1) * each]) for node in range(nodes)]
    assert (min(node_rows), max(node_rows)) == (found.node.rows_at_least, found.node.rows_at_most)
    assert node_rows.count(max(node_rows)) == found.node.parts_with_most


@given(
    samples=st.lists(st.one_of(st.integers(1, 3), st.integers(1, 40)), min_size=1, max_size=40),
    batch_size=st.integers(1, 200),
    ranks=st.integers(1, 9),
    block=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_no_batch_of_the_order_touches_more_shards(
    samples: list[int], batch_size: int, ranks: int, block: int, seed: int
) -> None:
    order = Order(tuple(samples), seed, batch_size, block)
    ends = np.cumsum(samples)
    a_batch = shards_touched(np.array(samples), batch_size, block)
    a_rank = shards_touched(np.array(samples), rows_per_rank(batch_size, ranks), block)
    for step in range(-(-3 * order.samples // batch_size)):  # over two epochs' edges
        shards = np.searchsorted(ends, order.batch(step), side="right")
        assert len(set(shards.tolist())) <= a_batch
        for rank in range(ranks):
            assert len(set(shards[rank_rows(batch_size, rank, ranks)].tolist())) <= a_rank


@pytest.mark.parametrize(("batch_size", "reached"), [(1, 1), (2, 2), (64, 8), (130, 12)])
def test_the_bound_on_shards_is_reached(batch_size: int, reached: int) -> None:
    samples = np.full(16, 22)  # four blocks of four shards, 88 samples
    assert shards_touched(samples, batch_size, block_shards=4) == reached
    order = Order(samples, 3, batch_size, block_shards=4)
    assert max(len(set((order.batch(step) // 22).tolist())) for step in range(30)) == reached


def test_a_short_last_block_counts() -> None:
    # Nine shards of ten samples in blocks of two. Twelve in a row may be one sample of a block, the ten of an epoch's
    # last block, which is one shard, and one sample of the next epoch; 32 may have a whole block of twenty besides.
    assert [shards_touched(np.full(9, 10), size, block_shards=2) for size in (11, 12, 31, 32)] == [4, 6, 6, 8]


@given(samples=counts, seed=st.integers(0, 2**32))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_any_block_and_the_next_fit_the_cache(samples: list[int], seed: int) -> None:
    found = needs(samples, 1, 1, 50)
    sizes = 1000 * np.array(samples)
    order = Order(tuple(samples), seed, 50)
    for step in range(-(-2 * order.samples // 50)):
        ahead = order.shards_ahead(step, slice(0, 50))
        assert sizes[ahead].sum() <= found.cache.bytes_needed


def test_ranks_read_as_many_indexes_as_the_order_asks() -> None:
    samples, ranks, batch_size = np.full(96, 6), 4, 32
    found = needs(samples.tolist(), ranks, 1, batch_size)
    order = Order(samples, 11, batch_size)
    reached = []  # by each rank in each epoch
    for epoch in range(40):
        steps = range(epoch * 18, (epoch + 1) * 18)  # 576 samples are 18 batches
        shards_RK = np.concatenate([(order.batch(step) // 6).reshape(ranks, -1) for step in steps], 1)
        reached += [len(set(row.tolist())) for row in shards_RK]
    assert np.mean(reached) == pytest.approx(found.indexes.shards_a_rank_about, rel=0.02)


def test_index_bytes_are_about_those_of_an_index() -> None:
    places = {member: MemberPlace(1, 2, 3) for member in ("image", "mask", "json")}
    data = index_bytes(make_index({f"CLEVRTEXv2_full_{number:06d}": places for number in range(500)}))
    assert index_size(500) == pytest.approx(len(data), rel=0.05)


def test_memory_is_what_the_columns_and_the_order_take(tmp_path: Path) -> None:
    samples = np.full(20_000, 3)
    found = needs(samples.tolist(), 1, 1, 1000)
    manifest = manifest_of(samples, samples)
    table = manifest.splits["train"]
    columns = (table.samples_S, table.bytes_S, table.xxh3_128_S16, table.index_sha256_S32)
    assert found.memory.manifest_bytes_a_rank == sum(column.nbytes for column in columns)
    tracemalloc.start()
    try:
        split = Split(open_storage(tmp_path), manifest, "train", cache=None)
        order = Order(split.shard_samples, 0, 1000)
        for step in range(0, 300, 60):  # five epochs, of which the last few are kept
            order.batch(step)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held == pytest.approx(found.memory.order_bytes_a_rank, rel=0.1)


@pytest.mark.parametrize("samples", [1_000, 1_000_000])
def test_a_million_shards_and_any_number_of_samples(samples: int) -> None:
    manifest = manifest_of(np.full(1_000_000, samples), np.full(1_000_000, 10**8))
    world = World(4096, 512, 65_536, 8)
    tracemalloc.start()
    try:
        began = time.perf_counter()
        found = capacity(manifest, "train", 145_000_000, world, 300, 0)
        took = time.perf_counter() - began
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(f"{took:.3f} s, {peak / 1e6:.0f} MB at most")
    assert found.data.samples == 1_000_000 * samples
    assert found.rank.samples_an_epoch_at_most * 4096 == found.data.samples
    assert took < 2
    assert peak < 60 * found.data.shards  # bytes
