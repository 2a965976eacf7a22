"""Size: what must not grow with the data set, does not; what must be instant, is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from launch.benches.loader import many_samples
from shards.order import Order, rank_rows
from shards.reading.dataset import open_split


def best_seconds(of: int, prepare, act) -> float:
    """The best of several tries: what the code takes, whatever else the machine does."""
    taken = []
    for _ in range(of):
        thing = prepare()
        began = time.perf_counter()
        act(thing)
        taken.append(time.perf_counter() - began)
    return min(taken)


def test_seeking_at_a_thousand_shards_takes_under_5_ms() -> None:
    fresh = lambda: Order(np.full(1000, 500), 0, 128)  # noqa: E731
    assert best_seconds(20, fresh, lambda order: order.batch(10**6)) < 0.005


@pytest.mark.slow
def test_seeking_at_a_million_shards_takes_under_a_second() -> None:
    samples_S = np.full(10**6, 1000)
    assert best_seconds(5, lambda: Order(samples_S, 0, 128), lambda order: order.batch(10**6)) < 1.0


def test_an_order_takes_no_memory_that_grows_with_samples() -> None:
    def peak(samples_a_shard: int) -> int:
        order = Order(np.full(10**5, samples_a_shard), 0, 128)
        order.batch(0)  # what is kept
        tracemalloc.start()
        for step in (0, 10**6, 10**9):
            order.batch(step)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(10**7) < peak(10) + 100_000


def test_the_order_of_a_million_shards_is_frozen() -> None:
    order = Order(np.full(10**6, 1000), seed=1, batch_size=64)
    assert order.batch(10**6)[:4].tolist() == FAR_HEAD
    assert order.samples == 10**9


def test_shards_ahead_are_those_that_a_rank_needs() -> None:
    ends_S = np.cumsum([7, 3, 5, 9, 4, 6, 8])
    for batch_size in (1, 5, 30):  # less than a block, and more than any
        order = Order([7, 3, 5, 9, 4, 6, 8], 3, batch_size, block_shards=2)
        for world in (1, min(3, batch_size)):
            for rank in range(world):
                rows = rank_rows(batch_size, rank, world)
                needed = [set(np.searchsorted(ends_S, order.batch(s)[rows], side="right").tolist()) for s in range(90)]
                for step in range(40):  # several epochs
                    ahead = order.shards_ahead(step, rows)
                    assert len(ahead) == len(set(ahead))
                    assert needed[step] <= set(ahead)
                    # What comes after a block that holds more than a batch is there in time.
                    news = [shards for shards in needed[step + 1 :] if not shards <= needed[step]]
                    assert batch_size > 1 or news[0] & set(ahead)


READ = """
import sys, resource
from shards.reading.dataset import open_split
from shards.loading.loader import rank_ids
from shards.order import Order, rank_rows
split = open_split(sys.argv[1], "train")
reader = split.source.reader()
ids = rank_ids(Order(split.shard_samples, 0, 64), 0, 1, 0)
for _ in range(40):
    reader.read([sample.span for sample in split.locate(next(ids))])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(split))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data_set(shards: Path) -> None:
    """Forty batches of a thousand samples, and forty of fifty thousand: the public loader takes 15 GB for these."""

    def peak_kb(samples: int) -> int:
        with many_samples(shards, samples) as folder:
            found = subprocess.run(
                [sys.executable, "-c", READ, str(folder)], capture_output=True, text=True, check=True
            )
        peak, count = map(int, found.stdout.split())
        assert count >= samples
        return peak

    assert peak_kb(50_000) < peak_kb(1000) + 30_000


def test_opening_reads_the_manifest_alone(shards: Path, tmp_path: Path) -> None:
    """No index, no tar: a million shards open as fast as their manifest is read."""
    os.link(shards / "manifest.json", tmp_path / "manifest.json")
    assert len(open_split(tmp_path, "train")) == 48


FAR_HEAD = [353233154, 154863540, 353233692, 126608906]
