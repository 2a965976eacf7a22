"""Fetches shards into the node's cache before they are needed, so that no step waits for them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from shards.order import Order, rank_rows
from shards.reading.dataset import Split

_THREADS = 4


@contextlib.contextmanager
def prefetching(split: Split, order: Order, start: int, rank: int, world: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told each step; threads see to it that the cache has the shards of this rank's rows, of
    the block they are in and of the one they come to next. Does nothing where there is no cache.
    """
    if split.source.cache is None:
        yield lambda step: None
        return
    rows = rank_rows(order.batch_size, rank, world)
    wanted = _Wanted()
    for _ in range(_THREADS):
        threading.Thread(target=_fetch, args=(split, wanted), daemon=True).start()

    def tell(step: int) -> None:
        wanted.replace(order.shards_ahead(step, rows))

    tell(start)
    try:
        yield tell
    finally:
        wanted.close()


class _Wanted:
    """The shards that are wanted, in order of need. Each is handed out once, until others are wanted in between."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._all: list[int] = []
        self._left: list[int] = []
        self._closed = False

    def replace(self, shards: list[int]) -> None:
        """From now on these are wanted."""
        with self._changed:
            if shards != self._all:
                known = set(self._all) - set(self._left)
                self._all, self._left = shards, [shard for shard in shards if shard not in known]
                self._changed.notify_all()

    def take(self) -> int | None:
        """The next one; waits for it. None when no more will be wanted."""
        with self._changed:
            self._changed.wait_for(lambda: self._left or self._closed)
            return None if self._closed else self._left.pop(0)

    def close(self) -> None:
        """Nothing is wanted any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _fetch(split: Split, wanted: _Wanted) -> None:
    cache = split.source.cache
    assert cache is not None
    while (number := wanted.take()) is not None:
        shard = split.table[number]
        # The worker that needs the shard meets the same trouble, and tells of it.
        with contextlib.suppress(Exception):
            cache.get_if_free(split.storage, split.source.fingerprint, shard.name, shard.bytes, shard.xxh3_128)
