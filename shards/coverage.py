"""What was really read, as numbers that add up: a digest for each sample read, and one for each batch.

A sample that was read leaves 64 bits over the key found in its JSON and the checksums of its image's and its JSON's
bytes. A batch's digest is the sum modulo 2^64 of its samples' digests, each bound to its position in the endless
sequence (step * G + row) first. A sum, so that the partial sums of any number of ranks add up to the same by one
all-reduce (of int64, which wraps around alike); bound to positions, so that two samples in each other's place show.
The digests tell mistakes apart, not forgeries. Golden values in the tests freeze them, since ledgers outlive versions.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable

import numpy as np
import xxhash

from shards.order import Order, mix64

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_POSITIONS_AT_ONCE = 1 << 17  # a few megabytes, which stay in a processor's cache
_EPOCHS_AT_ONCE = 8  # an order's epochs are drawn one by one, so that many small ones at once would gain nothing
_CHECKSUMS = np.dtype([("image", "<u8"), ("json", "<u8")])


def read_digest(key: str, image_xxh3: int, json_xxh3: int) -> int:
    """The digest of one sample: its key as its JSON says, and the xxh3-64 of its image and JSON bytes as read."""
    checksums = image_xxh3.to_bytes(8, "little") + json_xxh3.to_bytes(8, "little")
    return xxhash.xxh3_64_intdigest(
        checksums + key.encode()
    )  # two of fixed length first, so that nothing runs together


def split_digests(keys_n: np.ndarray, image_xxh3s_n: np.ndarray, json_xxh3s_n: np.ndarray) -> np.ndarray:
    """`read_digest` of n samples, (n,) uint64, from the columns of their index: keys as bytes, checksums as uint64."""
    checksums = np.empty(len(keys_n), _CHECKSUMS)
    checksums["image"], checksums["json"] = image_xxh3s_n, json_xxh3s_n
    pairs = checksums.view("V16").tolist()
    digests = [xxhash.xxh3_64_intdigest(pair + key) for pair, key in zip(pairs, keys_n.tolist(), strict=True)]
    return np.array(digests, np.uint64)


def placed(digests_R: np.ndarray, positions_R: np.ndarray) -> np.ndarray:
    """Digests (uint64) bound to their positions (int64 from 0) in the endless sequence: uint64; any one shape."""
    # Mixed twice: the same digest at another position, or two digests exchanged, give unrelated numbers.
    return mix64(digests_R ^ mix64((positions_R.astype(np.uint64) + np.uint64(1)) * _GAMMA))


def batch_digest(digests_R: np.ndarray, positions_R: np.ndarray) -> int:
    """The digest of a batch, or a rank's part of it, in [0, 2^64): digests (R,) uint64, positions (R,) int64."""
    return int(placed(digests_R, positions_R).sum(dtype=np.uint64))


def first_fault(
    order: Order,
    digests_n: np.ndarray,
    read_N: np.ndarray,
    skipped_K: np.ndarray,
    skipped_samples_K: np.ndarray,
    report: Callable[[int], None],
) -> tuple[int, str] | None:
    """The first of the steps 0 to N - 1 that did not read what the order gives, and in words what is wrong with it.

    `digests_n` are `split_digests` of the split, `read_N` the steps' batch digests (both uint64), `skipped_K` the
    sorted positions of rows that were not read and `skipped_samples_K` their sample ids (both int64). `report` is told
    how many steps are done. The order itself is counted too: no sample may come twice within an epoch.
    """
    size, seen_n = order.batch_size, np.zeros(order.samples, np.int32)
    steps_at_once = max(1, min(_POSITIONS_AT_ONCE, _EPOCHS_AT_ONCE * order.samples) // size)
    for first in range(0, len(read_N), steps_at_once):
        stop = min(first + steps_at_once, len(read_N))
        positions_P = np.arange(first * size, stop * size, dtype=np.int64)
        ids_P = order.ids(positions_P)
        placed_P = placed(digests_n[ids_P], positions_P)
        here = slice(*np.searchsorted(skipped_K, (first * size, stop * size)))
        rows = skipped_K[here] - first * size
        placed_P[rows] = 0
        sums = placed_P.reshape(-1, size).sum(axis=1, dtype=np.uint64)
        wrong = {
            "has a sample that comes twice in its epoch": np.flatnonzero(_repeats(seen_n, ids_P, first * size)) // size,
            "skipped another sample than the order has there": rows[ids_P[rows] != skipped_samples_K[here]] // size,
            "did not read the samples that the order gives": np.flatnonzero(sums != read_N[first:stop]),
        }
        faults = [(first + int(steps[0]), what) for what, steps in wrong.items() if len(steps)]
        if faults:
            return min(faults, key=operator.itemgetter(0))
        report(stop)
    return None


def _repeats(seen_n: np.ndarray, ids_P: np.ndarray, begin: int) -> np.ndarray:
    """Which samples of the positions from `begin` on come twice in their epoch; `seen_n` counts on in the epoch."""
    samples = len(seen_n)
    repeats_P = np.empty(len(ids_P), bool)
    for start, end in itertools.pairwise((0, *range(-begin % samples, len(ids_P), samples), len(ids_P))):
        if (begin + start) % samples == 0:
            seen_n[:] = 0
        np.add.at(seen_n, ids_P[start:end], 1)
        repeats_P[start:end] = seen_n[ids_P[start:end]] > 1
    return repeats_P
