"""How much a training run over one split reads, keeps open and holds: arithmetic over the manifest's columns.

Nothing is opened or measured here. Four facts carry all of it:

- The order deals a batch out of one block of shards, or of the few that it reaches into (`shards/order.py`), and a
  rank takes its rows of every batch. So where samples are read one by one, each rank reads its share of the rows.
- The samples of a block are mixed, so a node's rows come from all its shards. A cache on the node's disk holds whole
  shards: every node fetches every shard, in each epoch anew unless the cache holds the whole split.
- Either way a rank reads the whole index of each shard that it has a sample of, and keeps those used last.
- The manifest knows whole shards only. Training reads images and schemas but no masks, so bytes are "at most".

Fractions and integers are exact; a float is an expectation. `shards/pace.py` turns these amounts into time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from shards.manifest import Manifest, ShardTable
from shards.order import BLOCK_SHARDS

MAPS_KEPT = 64  # shards that a data worker keeps mapped
INDEXES_KEPT = 128  # that a rank keeps in memory
MANIFEST_BYTES = 64  # of a shard in memory: two counts and two checksums
ORDER_BYTES = 89  # of a shard in memory: where it begins, twice, and three columns of each of the three epochs kept
INDEX_RECORD_BYTES = 96  # of a sample: three members of 24 bytes, and a key of about as many letters
INDEX_HEADER_BYTES = 320


@dataclass(frozen=True)
class World:
    """What a run is spread over. Nodes have equally many ranks, and `workers` processes of a rank read and decode."""

    ranks: int
    nodes: int
    batch_size: int  # the global one, G
    workers: int

    @property
    def ranks_a_node(self) -> int:
        """How many ranks a node has."""
        return self.ranks // self.nodes


@dataclass(frozen=True)
class Data:
    """The split. How large its indexes are depends on the length of the keys, which the manifest does not know."""

    shards: int
    samples: int
    bytes: int
    manifest_bytes: int
    index_bytes_about: int


@dataclass(frozen=True)
class Length:
    """How long training is."""

    steps_an_epoch: Fraction
    steps: int
    epochs: Fraction


@dataclass(frozen=True)
class Share:
    """What each of some equal parts of the world (its ranks, say) reads an epoch, sample by sample.

    `parts_with_most` parts have `rows_at_most` rows of every batch, the others `rows_at_least`. Amounts are means over
    epochs: where a batch crosses an epoch's edge, one epoch gives a few rows to the other.
    """

    parts: int
    parts_with_most: int
    rows_at_least: int
    rows_at_most: int
    samples_an_epoch_at_least: Fraction
    samples_an_epoch_at_most: Fraction
    bytes_an_epoch_at_least: Fraction  # masks included
    bytes_an_epoch_at_most: Fraction


@dataclass(frozen=True)
class Indexes:
    """What is read of the indexes an epoch by the ranks with most rows; once in all where a rank keeps every index."""

    shards_a_rank_about: float
    bytes_a_rank_about: float
    bytes_a_node_about: float
    read_once: bool


@dataclass(frozen=True)
class Cache:
    """What the nodes read an epoch through caches of whole shards, and how large those must be. Indexes are not kept
    there."""

    bytes_an_epoch_at_most: int
    bytes_an_epoch_all_nodes_at_most: int
    bytes_needed: int  # for the block that is read and the next one, whichever shards those are
    bytes_needed_to_fetch_once: int


@dataclass(frozen=True)
class OpenShards:
    """How many shards are in use at once."""

    a_batch_at_most: int
    a_rank_a_step_at_most: int
    kept_a_worker_at_most: int


@dataclass(frozen=True)
class Memory:
    """Bytes that the process of a rank holds to know where samples lie; batches come on top, workers hold no such."""

    manifest_bytes_a_rank: int
    order_bytes_a_rank: int
    index_bytes_a_rank: int
    bytes_a_rank: int
    bytes_a_node: int


@dataclass(frozen=True)
class Capacity:
    """All of it."""

    data: Data
    world: World
    length: Length
    rank: Share
    node: Share
    masked_rows_a_step: int
    indexes: Indexes
    cache: Cache
    open_shards: OpenShards
    memory: Memory


def capacity(
    manifest: Manifest, split: str, manifest_bytes: int, world: World, epochs: int, max_steps: int
) -> Capacity:
    """What a run of `max_steps` steps, or of `epochs` epochs where that is 0, needs over a split that has samples.

    `manifest_bytes` is the size of the manifest's file; ranks must be a multiple of nodes. Takes time and memory for
    the shards, none for samples or ranks.
    """
    table = manifest.splits[split]
    index_bytes_S = INDEX_HEADER_BYTES + INDEX_RECORD_BYTES * table.samples_S
    data = Data(
        shards=len(table),
        samples=manifest.samples(split),
        bytes=int(table.bytes_S.sum()),
        manifest_bytes=manifest_bytes,
        index_bytes_about=int(index_bytes_S.sum()),
    )
    rank, node = (_share(data, world.batch_size, parts) for parts in (world.ranks, world.nodes))
    open_shards = OpenShards(
        a_batch_at_most=shards_touched(table.samples_S, world.batch_size),
        a_rank_a_step_at_most=shards_touched(table.samples_S, rank.rows_at_most),
        kept_a_worker_at_most=min(MAPS_KEPT, data.shards),
    )
    return Capacity(
        data=data,
        world=world,
        length=_length(data, world.batch_size, epochs, max_steps),
        rank=rank,
        node=node,
        masked_rows_a_step=rank.rows_at_most * world.ranks - world.batch_size,
        indexes=_indexes(table.samples_S, index_bytes_S, rank.rows_at_most, world),
        cache=Cache(
            bytes_an_epoch_at_most=data.bytes,
            bytes_an_epoch_all_nodes_at_most=data.bytes * world.nodes,
            bytes_needed=cache_needed(table, world.batch_size),
            bytes_needed_to_fetch_once=data.bytes,
        ),
        open_shards=open_shards,
        memory=_memory(
            manifest=MANIFEST_BYTES * sum(len(each) for each in manifest.splits.values()),
            order=ORDER_BYTES * data.shards,
            indexes=_largest(index_bytes_S, INDEXES_KEPT),
            ranks_a_node=world.ranks_a_node,
        ),
    )


def cache_needed(table: ShardTable, batch_size: int) -> int:
    """Bytes of a node's cache that holds the block of shards that is read and the next one, whichever these are."""
    return _largest(table.bytes_S, max(2 * BLOCK_SHARDS, shards_touched(table.samples_S, batch_size)))


def shards_touched(samples_S: np.ndarray, positions: int, block_shards: int = BLOCK_SHARDS) -> int:
    """The most shards that so many consecutive positions of the order reach into, wherever they begin, at any seed."""
    shards = len(samples_S)
    fewest = np.sort(np.partition(samples_S, min(block_shards, shards) - 1)[:block_shards])
    last_shards = (shards - 1) % block_shards + 1  # of the last block of an epoch
    full_block, last_block = max(1, int(fewest.sum())), max(1, int(fewest[:last_shards].sum()))
    # The first and the last position are in a block each, and any blocks between are read whole. Of these, one may be
    # the last of an epoch, which is short. (Two such would have a whole epoch between them, so all shards.)
    between = positions - 2
    whole_blocks = 0 if between < last_block else 1 + (between - last_block) // full_block
    return min(shards, positions, (2 + whole_blocks) * block_shards)


def _length(data: Data, batch_size: int, epochs: int, max_steps: int) -> Length:
    steps = max_steps or math.ceil(Fraction(epochs * data.samples, batch_size))
    return Length(Fraction(data.samples, batch_size), steps, Fraction(steps * batch_size, data.samples))


def _share(data: Data, batch_size: int, parts: int) -> Share:
    """What each of `parts` parts of the world reads.

    Nodes are dealt rows as ranks are: the rows that `rank_rows` gives to the ranks of a node are together those that
    it gives to one of so many nodes.
    """
    least, more = divmod(batch_size, parts)
    most = least + (more > 0)
    return Share(
        parts=parts,
        parts_with_most=more or parts,
        rows_at_least=least,
        rows_at_most=most,
        samples_an_epoch_at_least=Fraction(least * data.samples, batch_size),
        samples_an_epoch_at_most=Fraction(most * data.samples, batch_size),
        bytes_an_epoch_at_least=Fraction(least * data.bytes, batch_size),
        bytes_an_epoch_at_most=Fraction(most * data.bytes, batch_size),
    )


def _indexes(samples_S: np.ndarray, index_bytes_S: np.ndarray, rows: int, world: World) -> Indexes:
    # A shard's samples fall to a rank by its share of the rows, as good as independently of each other.
    reached_S = 1 - (1 - rows / world.batch_size) ** samples_S
    bytes_a_rank = float(index_bytes_S @ reached_S)
    return Indexes(
        shards_a_rank_about=float(reached_S.sum()),
        bytes_a_rank_about=bytes_a_rank,
        bytes_a_node_about=bytes_a_rank * world.ranks_a_node,
        read_once=len(samples_S) <= INDEXES_KEPT,
    )


def _memory(manifest: int, order: int, indexes: int, ranks_a_node: int) -> Memory:
    total = manifest + order + indexes
    return Memory(manifest, order, indexes, total, total * ranks_a_node)


def _largest(column_S: np.ndarray, count: int) -> int:
    """The sum of the largest `count` entries, or of all where there are fewer."""
    rest = max(0, len(column_S) - count)
    return int(np.partition(column_S, rest)[rest:].sum()) if rest else int(column_S.sum())
