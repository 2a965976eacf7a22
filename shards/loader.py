"""Batches for one rank, step after step: read, decoded and put together ahead of time by a few threads.

Threads, since decoders and memory copies run without Python's lock, and a thread shares the mapped shards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from nsi.batch import Batch
from nsi.errors import UserError
from shards.dataset import Split
from shards.decode import decode_image, decode_schema
from shards.order import Order, rank_rows, rows_per_rank

EMPTY = -1  # the sample id of a row without a scene


@dataclass(frozen=True)
class BatchShape:
    """What a batch's tensors look like."""

    image_size: int
    max_objects: int


def check_fits(split: Split, max_objects: int) -> None:
    """Raises UserError where a split has scenes of more objects than the model takes."""
    if split.manifest.max_objects > max_objects:
        raise UserError(
            f"{split.folder}: has scenes of {split.manifest.max_objects} objects, "
            f"more than --max_program_len {max_objects}; raise it"
        )


def training_batches(
    split: Split, order: Order, shape: BatchShape, rank: int, world: int, start: int, workers: int, ahead: int = 2
) -> Generator[Batch, None, None]:
    """This rank's rows of the batches of steps `start`, `start + 1`, ... without end."""
    rows = rows_per_rank(order.batch_size, world)

    def ids_of(step: int) -> np.ndarray:
        return order.batch(step)[rank_rows(order.batch_size, rank, world)]

    return _prefetched(split, shape, rows, ids_of, start, None, workers, ahead)


def whole_split(
    split: Split, shape: BatchShape, batch_size: int, rank: int, world: int, workers: int, ahead: int = 2
) -> Generator[Batch, None, None]:
    """This rank's rows of one pass over a split, in the order of sample ids, the tail masked.

    All ranks get equally many batches of `rows_per_rank(batch_size, world)` rows.
    """
    rows = rows_per_rank(batch_size, world)
    steps = -(-len(split) // batch_size)

    def ids_of(step: int) -> np.ndarray:
        ids = np.arange(step * batch_size, min((step + 1) * batch_size, len(split)))
        return ids[rank_rows(len(ids), rank, world)]

    return _prefetched(split, shape, rows, ids_of, 0, steps, workers, ahead)


def assemble(
    split: Split, shape: BatchShape, rows: int, ids: Sequence[int] | np.ndarray, map_: Callable[..., Iterable] = map
) -> Batch:
    """The batch of some samples, filled up with empty rows. `map_` decodes the samples (a pool's map, say)."""
    images_BCHW = torch.zeros(rows, 3, shape.image_size, shape.image_size, dtype=torch.uint8)
    labels_BT3 = torch.zeros(rows, shape.max_objects, 3, dtype=torch.int64)
    positions_BT3 = torch.zeros(rows, shape.max_objects, 3)
    objects_BT = torch.zeros(rows, shape.max_objects, dtype=torch.bool)
    sample_ids_B = torch.full((rows,), EMPTY, dtype=torch.int64)
    keys = [""] * rows

    def fill(row_and_id: tuple[int, int]) -> None:
        row, sample = row_and_id
        schema = split.decode(sample, "json", decode_schema)
        # Rows are disjoint, so threads can write them at the same time.
        image_HW3 = split.decode(sample, "image", lambda data: decode_image(data, shape.image_size))
        images_BCHW[row] = torch.from_numpy(image_HW3.copy()).permute(2, 0, 1)
        count = len(schema.primitives)
        labels_BT3[row, :count] = torch.tensor([(p.size, p.shape, p.material) for p in schema.primitives])
        positions_BT3[row, :count] = torch.tensor([p.position for p in schema.primitives])
        objects_BT[row, :count] = True
        keys[row] = schema.key
        sample_ids_B[row] = sample

    for _ in map_(fill, [(row, int(sample)) for row, sample in enumerate(ids)]):
        pass
    return Batch(sample_ids_B, sample_ids_B != EMPTY, images_BCHW, labels_BT3, positions_BT3, objects_BT, tuple(keys))


def _prefetched(
    split: Split, shape: BatchShape, rows: int, ids_of, start: int, stop: int | None, workers: int, ahead: int
) -> Generator[Batch, None, None]:
    """Batches in order, of which `ahead` are under way while the caller works on one."""
    # One thread puts a batch together and waits for it; the others decode its samples.
    with ThreadPoolExecutor(max(1, workers)) as decoders, ThreadPoolExecutor(1) as assembler:
        under_way: deque[Future[Batch]] = deque()
        step = start
        try:
            while True:
                while len(under_way) < ahead and (stop is None or step < stop):
                    under_way.append(assembler.submit(assemble, split, shape, rows, ids_of(step), decoders.map))
                    step += 1
                if not under_way:
                    return
                yield under_way.popleft().result()
        finally:
            for task in under_way:
                task.cancel()
