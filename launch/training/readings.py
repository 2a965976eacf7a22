"""What each step really read, on its way from the batches of all ranks into the ledger."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cluster.collectives import collect, sum_over_ranks
from cluster.records.ledger import LedgerWriter, Skipped
from nsi.batch import Batch
from nsi.errors import UserError
from shards.coverage import batch_digest
from shards.order import rank_rows

_HALF, _WHOLE = 1 << 63, 1 << 64


class Readings:
    """The readings of this rank's rows since the last flush. Flushes are done by all ranks together."""

    def __init__(
        self, batch_size: int, rank: int, world: int, limit: int, device: torch.device, ledger: LedgerWriter | None
    ) -> None:
        """`limit`: how many damaged scenes all ranks together may skip. `ledger` is rank 0's, None on the others."""
        self._batch_size, self._limit, self._device, self._ledger = batch_size, limit, device, ledger
        self._first_row = rank_rows(batch_size, rank, world).start
        self._digests: list[int] = []
        self._skipped: list[Skipped] = []
        self._skipped_before = 0

    def add(self, step: int, batch: Batch) -> None:
        """Notes what a step's batch holds; steps follow one another, counted from 0."""
        first = step * self._batch_size + self._first_row
        rows = [row for row, key in enumerate(batch.keys) if key]
        digests = np.array([batch.digests[row] for row in rows], np.uint64)
        self._digests.append(batch_digest(digests, first + np.array(rows, np.int64)))
        self._skipped += [
            Skipped(first + fault.row, fault.sample, fault.shard, fault.key, fault.text) for fault in batch.faults
        ]

    def flush(self, steps_done: int) -> Sequence[Skipped]:
        """Writes what was read since the last time, and returns what all ranks skipped meanwhile.

        Raises UserError, on every rank, where more was skipped than may be.
        """
        if not self._digests:
            return []
        own = [digest - _WHOLE if digest >= _HALF else digest for digest in self._digests]
        # Digests add up modulo 2^64, as int64 does: the sum over the ranks does not depend on how many there are.
        total = sum_over_ranks(torch.tensor([*own, len(self._skipped)], device=self._device)).tolist()
        skipped = [each for part in collect(self._skipped) for each in part] if total[-1] else []
        if self._ledger:
            self._ledger.write(steps_done - len(own), total[:-1], skipped)
        self._digests, self._skipped = [], []
        self._skipped_before += len(skipped)
        if self._skipped_before > self._limit:
            raise UserError(
                f"{self._skipped_before} damaged scenes, more than --bad_sample_limit {self._limit}; "
                f"the last: {skipped[-1].fault}"
            )
        return skipped
