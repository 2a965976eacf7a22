"""How soon and how fast the data of a run comes: estimates from what `shards/capacity.py` counts and a few speeds.

Two ways to read are set side by side: "ranged", each sample alone from where the shards lie, and "cached", whole shards
fetched to the node's disk. Either way a rank reads indexes one after the other, ahead of its workers; these read and
then decode the rows of their share. A megabyte has 10^6 bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from shards.capacity import Capacity
from shards.order import BLOCK_SHARDS

BATCHES_AT_START = 3  # a rank asks for so many before it waits for the first
REMOTE_REQUESTS = 32  # that a worker has under way at a server; at a file system it has one
MEGA = 1e6


@dataclass(frozen=True)
class Speeds:
    """How fast the machines are. All are above 0; the latency may be 0."""

    storage_mb_per_second: float  # what one node gets while all nodes read
    storage_latency_ms: float  # from a request to its first byte
    decode_images_per_second: float  # of one core
    requests_at_once: int  # that a worker has under way for ranged reads


@dataclass(frozen=True)
class FirstBatch:
    """Seconds until the slowest rank has its first batch, counted from when it asks for the manifest.

    Storage and decoding alone: what Python takes to start, and to parse a large manifest, comes on top.
    """

    opening_seconds: float
    reading_seconds: float
    decoding_seconds: float
    seconds: float


@dataclass(frozen=True)
class Rate:
    """The most images a second that all ranks together get in one way, and megabytes that a node reads for each."""

    images_per_second: float
    mb_a_node_per_image: float


@dataclass(frozen=True)
class Rates:
    """What limits the speed of training as far as data go."""

    decoding_images_per_second: float
    ranged: Rate
    filling_cache: Rate  # in each epoch, unless the cache holds the split
    full_cache: Rate  # the indexes alone are read


@dataclass(frozen=True)
class Pace:
    """All of it."""

    first_batch_ranged: FirstBatch
    first_batch_cached: FirstBatch
    rates: Rates


def pace(capacity: Capacity, speeds: Speeds) -> Pace:
    """How soon and how fast the data of a run comes."""
    return Pace(_first_ranged(capacity, speeds), _first_cached(capacity, speeds), _rates(capacity, speeds))


def _first_ranged(capacity: Capacity, speeds: Speeds) -> FirstBatch:
    rows = _rows_a_worker(capacity)
    node_bytes = capacity.node.rows_at_most * capacity.data.bytes / capacity.data.samples
    reading = _transfer(speeds, math.ceil(rows / speeds.requests_at_once), node_bytes)
    return _first_batch(capacity, speeds, reading)


def _first_cached(capacity: Capacity, speeds: Speeds) -> FirstBatch:
    """The workers of a node together fetch the shards that the first batch comes from, each one at a time."""
    world, shards = capacity.world, _shards_of_batches(capacity, 1)
    requests = math.ceil(shards / (world.workers * world.ranks_a_node))
    # Beside its workers each rank has a thread that fetches the next block, and gets its part of the bandwidth.
    node_bytes = shards * capacity.data.bytes / capacity.data.shards * (1 + 1 / world.workers)
    return _first_batch(capacity, speeds, _transfer(speeds, requests, node_bytes))


def _first_batch(capacity: Capacity, speeds: Speeds, reading: float) -> FirstBatch:
    """The manifest and the indexes are read first, by each rank for itself."""
    data, world = capacity.data, capacity.world
    rows_shards = BATCHES_AT_START * capacity.open_shards.a_rank_a_step_at_most
    indexes = min(rows_shards, _shards_of_batches(capacity, BATCHES_AT_START))
    index_bytes = indexes * data.index_bytes_about / data.shards
    opening = _transfer(speeds, 1 + indexes, world.ranks_a_node * (data.manifest_bytes + index_bytes))
    decoding = _rows_a_worker(capacity) / speeds.decode_images_per_second
    return FirstBatch(opening, reading, decoding, opening + reading + decoding)


def _shards_of_batches(capacity: Capacity, batches: int) -> int:
    """The shards of the blocks that the first batches fill."""
    data = capacity.data
    blocks = math.ceil(Fraction(batches * capacity.world.batch_size * data.shards, data.samples * BLOCK_SHARDS))
    return min(data.shards, blocks * BLOCK_SHARDS)


def _rows_a_worker(capacity: Capacity) -> int:
    return math.ceil(capacity.rank.rows_at_most / capacity.world.workers)


def _transfer(speeds: Speeds, requests_in_turn: int, bytes_a_node: float) -> float:
    """Seconds of the requests made one after the other, and of all bytes that the node reads meanwhile."""
    return requests_in_turn * speeds.storage_latency_ms / 1e3 + bytes_a_node / (speeds.storage_mb_per_second * MEGA)


def _rates(capacity: Capacity, speeds: Speeds) -> Rates:
    data, indexes = capacity.data, capacity.indexes
    workers = capacity.world.ranks * capacity.world.workers
    decode_s, latency_s = 1 / speeds.decode_images_per_second, speeds.storage_latency_ms / 1e3
    read_s = latency_s / min(speeds.requests_at_once, _rows_a_worker(capacity))
    index_s = 0 if indexes.read_once else indexes.shards_a_rank_about * latency_s / data.samples
    index_mb = 0 if indexes.read_once else indexes.bytes_a_node_about / data.samples / MEGA

    def rate(worker_s: float, mb: float) -> Rate:
        """Of workers that take so long for an image, where the busiest node reads so much for one of all images."""
        seconds = max(worker_s / workers, index_s, mb / speeds.storage_mb_per_second)
        return Rate(1 / seconds, mb)

    return Rates(
        decoding_images_per_second=workers / decode_s,
        ranged=rate(read_s + decode_s, float(capacity.node.bytes_an_epoch_at_most) / data.samples / MEGA + index_mb),
        filling_cache=rate(decode_s, data.bytes / data.samples / MEGA + index_mb),
        full_cache=rate(decode_s, index_mb),
    )
