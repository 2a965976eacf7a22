"""Batches for one rank, step after step: read, decoded and put together ahead of time by data workers."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterator

import numpy as np

from nsi.batch import Batch
from nsi.errors import UserError
from shards.loading.rows import BatchShape, SceneShape
from shards.loading.workers import DataWorkers
from shards.order import Order, rank_rows, rows_per_rank
from shards.reading.dataset import Split

_STEPS_AT_ONCE = 16  # worked out together, which costs little more than one


def check_fits(split: Split, max_objects: int) -> None:
    """Raises UserError where scenes have more objects than the model takes, or a shard more bytes than the cache."""
    if split.manifest.max_objects > max_objects:
        raise UserError(
            f"{split.folder}: has scenes of {split.manifest.max_objects} objects, "
            f"more than --max_program_len {max_objects}; raise it"
        )
    if split.source.cache and len(split):
        largest = split.table[int(split.table.bytes_S.argmax())]
        split.source.cache.check_holds(largest.name, largest.bytes)


def training_batches(
    split: Split,
    order: Order,
    shape: SceneShape,
    rank: int,
    world: int,
    start: int,
    workers: DataWorkers,
    ahead: int = 2,
) -> Generator[Batch, None, None]:
    """This rank's rows of the batches of steps `start`, `start + 1`, ... without end.

    A scene that cannot be read is an empty row and a fault of its batch: whether that is borne is the caller's
    business (`refuse_faults`).
    """
    batch_shape = BatchShape(rows_per_rank(order.batch_size, world), shape)
    return _prefetched(split, batch_shape, rank_ids(order, rank, world, start), workers, ahead)


def whole_split(
    split: Split,
    shape: SceneShape,
    batch_size: int,
    rank: int,
    world: int,
    workers: DataWorkers,
    ahead: int = 2,
) -> Generator[Batch, None, None]:
    """This rank's rows of one pass over a split, in the order of sample ids, the tail masked.

    All ranks get equally many batches of `rows_per_rank(batch_size, world)` rows.
    """
    batches = (np.arange(first, min(first + batch_size, len(split))) for first in range(0, len(split), batch_size))
    ids = (ids_G[rank_rows(len(ids_G), rank, world)] for ids_G in batches)
    return chosen_batches(split, shape, rows_per_rank(batch_size, world), ids, workers, ahead)


def chosen_batches(
    split: Split, shape: SceneShape, rows: int, ids: Iterator[np.ndarray], workers: DataWorkers, ahead: int = 2
) -> Generator[Batch, None, None]:
    """A batch of so many rows for each of some lists of sample ids, (up to `rows`,) int64; rows beyond stay empty."""
    return _prefetched(split, BatchShape(rows, shape), ids, workers, ahead)


def rank_ids(order: Order, rank: int, world: int, start: int) -> Iterator[np.ndarray]:
    """The sample ids of this rank's rows, (R,) int64, of the steps `start`, `start + 1`, ... without end."""
    rows = rank_rows(order.batch_size, rank, world)
    rows_R = np.arange(rows.start, rows.stop, dtype=np.int64)
    for first in itertools.count(start, _STEPS_AT_ONCE):
        steps_K = np.arange(first, first + _STEPS_AT_ONCE, dtype=np.int64)
        positions_KR = steps_K[:, None] * order.batch_size + rows_R
        yield from order.ids(positions_KR.ravel()).reshape(positions_KR.shape)


def refuse_faults(batch: Batch) -> Batch:
    """The batch itself. Raises UserError, naming the first, where a scene of it could not be read."""
    if batch.faults:
        raise UserError(batch.faults[0].text)
    return batch


def _prefetched(
    split: Split, shape: BatchShape, ids: Iterator[np.ndarray], workers: DataWorkers, ahead: int
) -> Generator[Batch, None, None]:
    """Batches in order, of which `ahead` are under way while the caller works on one."""
    under_way: deque[int] = deque()
    try:
        while True:
            for ids_R in itertools.islice(ids, ahead + 1 - len(under_way)):
                under_way.append(workers.submit(split, shape, ids_R))
            if not under_way:
                return
            yield workers.wait(under_way.popleft())
    finally:
        for ticket in under_way:
            workers.give_up(ticket)
