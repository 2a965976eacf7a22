"""The order of training: a pure function of (seed, step), in integer arithmetic.

`batch(step)` is the positions [step * G, (step + 1) * G) of an endless sequence, so the whole state of the data is
`step`, nothing is padded, dropped or repeated, and any number of ranks can share a batch. An epoch is one pass over
the n samples: the shards in a keyed permutation, cut into blocks of a few shards, and the samples of each block in a
keyed permutation. So a reader touches few shards at a time, and no state but integers is needed.

Permutations are Feistel networks (Luby and Rackoff 1988) over the 64-bit mixer of splitmix64 (Steele, Lea and Flood
2014), walked until they fall inside the range. A library's shuffle is avoided because its stream may change.
Golden digests in the tests freeze the order for ever.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_SHARDS = 32  # shards whose samples are mixed: enough to decorrelate, few enough to keep open
_ROUNDS = 6
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_WORD = (1 << 64) - 1
_SHARDS_KEY, _SAMPLES_KEY = 1, 2  # two families of permutations from one seed
_LAYOUTS_KEPT = 3


@dataclass(frozen=True, eq=False)
class Order:
    """The order of one split. `shard_samples` are the shards' sample counts in the manifest's order, (S,) int64."""

    shard_samples: Sequence[int] | np.ndarray
    seed: int
    batch_size: int
    block_shards: int = BLOCK_SHARDS

    @functools.cached_property
    def samples(self) -> int:
        """n, the length of an epoch in samples."""
        return int(self._counts_S.sum())

    def epoch(self, step: int) -> float:
        """How many epochs lie before a step, with the fraction."""
        return step * self.batch_size / self.samples

    def batch(self, step: int) -> np.ndarray:
        """Sample ids of a step's global batch: (G,) int64, places in the split."""
        return self.ids(np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64))

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids at some positions of the endless sequence; both (P,) int64."""
        epochs_P, places_P = np.divmod(positions, self.samples)
        ids_P = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs_P):
            here = epochs_P == epoch
            ids_P[here] = self._layout(int(epoch)).ids(places_P[here])
        return ids_P

    def shards_ahead(self, step: int, rows: slice) -> list[int]:
        """The shards (places in the manifest) that some rows of a step's batch are mixed from; where that is one block,
        then those of the block that the same rows come to next. So two blocks have room for what is ahead."""
        first, stop = step * self.batch_size + rows.start, step * self.batch_size + rows.stop
        shards, position = self._block(first)
        if position < stop:
            while position < stop:
                block, position = self._block(position)
                shards += block
        else:
            steps_on = -(-(position - first) // self.batch_size)
            shards += self._block(first + steps_on * self.batch_size)[0]
        return list(dict.fromkeys(shards))

    def _block(self, position: int) -> tuple[list[int], int]:
        """The shards of the block at a position, and the position where it ends."""
        epoch, place = divmod(position, self.samples)
        layout = self._layout(epoch)
        block = layout.block_of(place)
        return layout.shards_of(block).tolist(), epoch * self.samples + int(layout.block_begins[block + 1])

    @functools.cached_property
    def _counts_S(self) -> np.ndarray:
        return np.asarray(self.shard_samples, np.int64)

    @functools.cached_property
    def _offsets_S(self) -> np.ndarray:
        """The sample id at which each shard begins."""
        return np.concatenate(([0], np.cumsum(self._counts_S)[:-1]))

    @functools.cached_property
    def _layouts(self) -> dict[int, EpochLayout]:
        return {}

    def _layout(self, epoch: int) -> EpochLayout:
        """An epoch's layout. The last few are kept, since a batch may cross an epoch's edge."""
        if epoch not in self._layouts:
            while len(self._layouts) >= _LAYOUTS_KEPT:
                self._layouts.pop(next(iter(self._layouts)))
            self._layouts[epoch] = _lay_out(self._counts_S, self._offsets_S, self.seed, self.block_shards, epoch)
        return self._layouts[epoch]


@dataclass(frozen=True, eq=False)
class EpochLayout:
    """One epoch: its shards in order, where each begins in the epoch, and where in the split."""

    shards_S: np.ndarray
    begins_S1: np.ndarray
    offsets_S: np.ndarray  # of the shards in this epoch's order
    block_begins: np.ndarray
    block_shards: int
    seed: int
    epoch: int

    def block_of(self, place: int) -> int:
        """The block in which a place of the epoch lies."""
        return int(np.searchsorted(self.block_begins, place, side="right")) - 1

    def shards_of(self, block: int) -> np.ndarray:
        """The shards of a block."""
        return self.shards_S[block * self.block_shards : (block + 1) * self.block_shards]

    def ids(self, places_P: np.ndarray) -> np.ndarray:
        """Sample ids at some places of the epoch."""
        blocks_P = np.searchsorted(self.block_begins, places_P, side="right") - 1
        mixed_P = np.empty_like(places_P)
        for block in np.unique(blocks_P):
            here = blocks_P == block
            begin, end = self.block_begins[block], self.block_begins[block + 1]
            key = (self.seed, self.epoch, _SAMPLES_KEY, int(block))
            mixed_P[here] = begin + permute(places_P[here] - begin, int(end - begin), *key)
        nth_P = np.searchsorted(self.begins_S1, mixed_P, side="right") - 1
        return self.offsets_S[nth_P] + mixed_P - self.begins_S1[nth_P]


def rank_rows(batch_size: int, rank: int, world: int) -> slice:
    """A rank's rows of a global batch: contiguous, so that ranks in order give the batch in order.

    Ranks differ by one row at most where the batch does not divide.
    """
    return slice(batch_size * rank // world, batch_size * (rank + 1) // world)


def rows_per_rank(batch_size: int, world: int) -> int:
    """The most rows that any rank has: every rank's tensors have so many, the last perhaps masked."""
    return -(-batch_size // world)


def permute(places: np.ndarray, size: int, *key: int) -> np.ndarray:
    """A keyed permutation of range(size), evaluated at `places` (int64, any shape)."""
    half_bits = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    round_keys = [_key(*key, number) for number in range(_ROUNDS)]
    values = _feistel(places.astype(np.uint64), half_bits, mask, round_keys)
    # The network permutes a power of four that may exceed the range: walk on until inside. The walk stays on the
    # value's own cycle, so the result is a permutation of the range.
    outside = values >= np.uint64(size)
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, mask, round_keys)
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: np.uint64, mask: np.uint64, round_keys: list[np.uint64]) -> np.ndarray:
    left, right = values >> half_bits, values & mask
    for key in round_keys:
        left, right = right, left ^ (mix64(right ^ key) & mask)
    return (left << half_bits) | right


def mix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64; arithmetic is modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def _key(*parts: int) -> np.uint64:
    """One 64-bit key from several integers. In Python's own numbers, which are ten times as fast for a single one."""
    state = 0
    for part in parts:
        state = (state * int(_MIX_1) + int(_GAMMA) + part) & _WORD
        state = ((state ^ state >> 30) * int(_MIX_1)) & _WORD
        state = ((state ^ state >> 27) * int(_MIX_2)) & _WORD
        state ^= state >> 31
    return np.uint64(state)


def _lay_out(counts_S: np.ndarray, offsets_S: np.ndarray, seed: int, block_shards: int, epoch: int) -> EpochLayout:
    shards_S = permute(np.arange(len(counts_S)), len(counts_S), seed, epoch, _SHARDS_KEY)
    begins_S1 = np.concatenate(([0], np.cumsum(counts_S[shards_S])))
    block_begins = np.append(begins_S1[:-1:block_shards], begins_S1[-1])
    return EpochLayout(shards_S, begins_S1, offsets_S[shards_S], block_begins, block_shards, seed, epoch)
