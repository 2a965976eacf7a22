"""Batches for one rank, step after step: read, decoded and put together ahead of time by data workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

import numpy as np

from nsi.batch import Batch
from nsi.errors import UserError
from shards.dataset import Split
from shards.order import Order, rank_rows, rows_per_rank
from shards.rows import BatchShape, SceneShape
from shards.workers import DataWorkers


def check_fits(split: Split, max_objects: int) -> None:
    """Raises UserError where a split has scenes of more objects than the model takes."""
    if split.manifest.max_objects > max_objects:
        raise UserError(
            f"{split.folder}: has scenes of {split.manifest.max_objects} objects, "
            f"more than --max_program_len {max_objects}; raise it"
        )


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
    rows = rank_rows(order.batch_size, rank, world)
    batch_shape = BatchShape(rows_per_rank(order.batch_size, world), shape)

    def ids_of(step: int) -> np.ndarray:
        return order.ids(step * order.batch_size + np.arange(rows.start, rows.stop, dtype=np.int64))

    return _prefetched(split, batch_shape, ids_of, start, None, workers, ahead)


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
    batch_shape = BatchShape(rows_per_rank(batch_size, world), shape)
    steps = -(-len(split) // batch_size)

    def ids_of(step: int) -> np.ndarray:
        ids = np.arange(step * batch_size, min((step + 1) * batch_size, len(split)))
        return ids[rank_rows(len(ids), rank, world)]

    return _prefetched(split, batch_shape, ids_of, 0, steps, workers, ahead)


def refuse_faults(batch: Batch) -> Batch:
    """The batch itself. Raises UserError, naming the first, where a scene of it could not be read."""
    if batch.faults:
        raise UserError(batch.faults[0].text)
    return batch


def _prefetched(
    split: Split, shape: BatchShape, ids_of, start: int, stop: int | None, workers: DataWorkers, ahead: int
) -> Generator[Batch, None, None]:
    """Batches in order, of which `ahead` are under way while the caller works on one."""
    under_way: deque[int] = deque()
    step = start
    try:
        while True:
            while len(under_way) <= ahead and (stop is None or step < stop):
                under_way.append(workers.submit(split, shape, ids_of(step)))
                step += 1
            if not under_way:
                return
            yield workers.wait(under_way.popleft())
    finally:
        for ticket in under_way:
            workers.give_up(ticket)
