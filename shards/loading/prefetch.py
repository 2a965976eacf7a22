"""Fetches the next block's shards into the node's cache while this block is trained on, so that no step waits."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator

from nsi.errors import UserError
from shards.order import Order
from shards.reading.dataset import Split


@contextlib.contextmanager
def prefetching(split: Split, order: Order, start: int, rank: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told each step; a thread sees to it that the next block's shards are in the cache.

    Ranks begin at different shards, so that those of a node share the work. Does nothing where there is no cache.
    """
    if split.source.cache is None:
        yield lambda step: None
        return
    blocks: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
    thread = threading.Thread(target=_fetch, args=(split, blocks, rank), daemon=True)
    thread.start()
    last: list[int] = []

    def tell(step: int) -> None:
        nonlocal last
        _, coming = order.blocks(step)
        if coming.tolist() != last:
            last = coming.tolist()
            blocks.put(last)

    tell(start)
    try:
        yield tell
    finally:
        blocks.put(None)


def _fetch(split: Split, blocks: queue.SimpleQueue[list[int] | None], rank: int) -> None:
    cache = split.source.cache
    assert cache is not None
    while (shards := blocks.get()) is not None:
        turn = rank % len(shards)
        for number in shards[turn:] + shards[:turn]:
            shard = split.table[number]
            # The worker that needs the shard meets the same trouble, and tells of it.
            with contextlib.suppress(UserError):
                cache.get_if_free(split.storage, split.source.fingerprint, shard.name, shard.bytes, shard.sha256)
