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
from dataclasses import dataclass

import numpy as np

BLOCK_SHARDS = 32  # shards whose samples are mixed: enough to decorrelate, few enough to keep open
_ROUNDS = 6
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHARDS_KEY, _SAMPLES_KEY = 1, 2  # two families of permutations from one seed


@dataclass(frozen=True)
class Order:
    """The order of one split. `shard_samples` are the shards' sample counts in the manifest's order."""

    shard_samples: tuple[int, ...]
    seed: int
    batch_size: int
    block_shards: int = BLOCK_SHARDS

    @property
    def samples(self) -> int:
        """n, the length of an epoch in samples."""
        return sum(self.shard_samples)

    def epoch(self, step: int) -> float:
        """How many epochs lie before a step, with the fraction."""
        return step * self.batch_size / self.samples

    def batch(self, step: int) -> np.ndarray:
        """Sample ids of a step's global batch: (G,) int64, places in the split."""
        positions_G = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        epochs_G, places_G = np.divmod(positions_G, self.samples)
        ids_G = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs_G):
            here = epochs_G == epoch
            ids_G[here] = _epoch_samples(self.shard_samples, self.seed, self.block_shards, int(epoch), places_G[here])
        return ids_G


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
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64; arithmetic is modulo 2^64."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * _MIX_1
        values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def _key(*parts: int) -> np.uint64:
    """One 64-bit key from several integers."""
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = _mix(state * _MIX_1 + _GAMMA + np.uint64(part % (1 << 64)))
    return state[0]


@functools.lru_cache(maxsize=4)
def _epoch_layout(
    shard_samples: tuple[int, ...], seed: int, block_shards: int, epoch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An epoch's shards in order (S,), where each begins in the epoch (S + 1,), and in the split (S,)."""
    counts_S = np.asarray(shard_samples, np.int64)
    shards_S = permute(np.arange(len(counts_S)), len(counts_S), seed, epoch, _SHARDS_KEY)
    begins_S1 = np.concatenate(([0], np.cumsum(counts_S[shards_S])))
    offsets_S = np.concatenate(([0], np.cumsum(counts_S)[:-1]))
    return shards_S, begins_S1, offsets_S


def _epoch_samples(
    shard_samples: tuple[int, ...], seed: int, block_shards: int, epoch: int, places: np.ndarray
) -> np.ndarray:
    """Sample ids at the given places of an epoch."""
    shards_S, begins_S1, offsets_S = _epoch_layout(shard_samples, seed, block_shards, epoch)
    block_begins = np.append(begins_S1[:-1:block_shards], begins_S1[-1])
    blocks = np.searchsorted(block_begins, places, side="right") - 1
    mixed = np.empty_like(places)
    for block in np.unique(blocks):
        here = blocks == block
        begin, end = block_begins[block], block_begins[block + 1]
        mixed[here] = begin + permute(places[here] - begin, int(end - begin), seed, epoch, _SAMPLES_KEY, int(block))
    nth = np.searchsorted(begins_S1, mixed, side="right") - 1
    return offsets_S[shards_S[nth]] + mixed - begins_S1[nth]
