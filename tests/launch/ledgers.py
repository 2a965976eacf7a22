"""Runs made by hand for the audit's tests: a folder, attempts, and a ledger of what each step read."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import xxhash

from cluster.checkpoints.attempt import take_attempt
from cluster.records.appender import Appender
from cluster.records.ledger import LedgerWriter, Skipped
from launch import runfolder
from launch.audit import AuditConfig, run
from nsi.errors import UserError
from shards.coverage import batch_digest, read_digest
from shards.order import Order, rank_rows
from shards.reading.dataset import open_split

BATCH, SEED = 9, 5  # 48 train scenes: an epoch ends within a batch


@dataclass(frozen=True)
class Trained:
    """A run folder in the making, with what a training would know."""

    run: Path
    order: Order
    digests_n: np.ndarray  # of each sample, read and digested one by one

    def attempt(
        self,
        restored: int,
        flushes: Sequence[int],
        world: int = 1,
        skips: Sequence[int] = (),
        ids_of: Callable[[int], np.ndarray] | None = None,
    ) -> Path:
        """An attempt that did so many steps a flush. `skips` are positions; `ids_of` is what it really read."""
        number = take_attempt(self.run / runfolder.ATTEMPTS, world, "none", restored).number
        appender = Appender()
        writer = LedgerWriter(self.run / runfolder.LEDGER, number, BATCH, appender)
        step = restored
        for count in flushes:
            steps = range(step, step + count)
            read = [self._batch((ids_of or self.order.batch)(each), each, world, skips) for each in steps]
            writer.write(step, read, [self.skipped(at) for at in sorted(skips) if at // BATCH in steps])
            step += count
            with (self.run / runfolder.METRICS).open("a") as file:
                file.write(json.dumps({"step": step, "attempt": number}) + "\n")
        appender.close()
        return self.run / runfolder.LEDGER / f"attempt-{number:04d}.jsonl"

    def _batch(self, ids: np.ndarray, step: int, world: int, skips: Sequence[int]) -> int:
        """Each rank sums up its rows; the sums are added up as int64, which wraps around."""
        positions = np.arange(step * BATCH, (step + 1) * BATCH)
        sums = []
        for rank in range(world):
            rows = rank_rows(BATCH, rank, world)
            kept = ~np.isin(positions[rows], list(skips))
            sums.append(batch_digest(self.digests_n[ids[rows]][kept], positions[rows][kept]))
        return int(np.array(sums, np.uint64).view(np.int64).sum())

    def skipped(self, position: int) -> Skipped:
        sample = int(self.order.ids(np.array([position]))[0])
        return Skipped(position, sample, f"train-{sample // 10:06d}.tar", f"scene_{sample}", "no picture")


def read_samples(shards: Path) -> np.ndarray:
    """The digest of every train sample, from the bytes that a reader gets."""
    split = open_split(shards, "train")

    def digest(sample: int) -> int:
        image, text = (bytes(split.read(sample, member)) for member in ("image", "json"))
        checksums = (xxhash.xxh3_64_intdigest(data) for data in (image, text))
        return read_digest(json.loads(text)["key"], *checksums)

    return np.array([digest(sample) for sample in range(len(split))], np.uint64)


def begin(folder: Path, shards: Path, digests: np.ndarray) -> Trained:
    """A run folder as it is before its first attempt."""
    split = open_split(shards, "train")
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "config": {"optim": {"seed": SEED, "batch_size": BATCH}},
        "data": {"path": str(shards), "fingerprint": split.manifest.fingerprint},
    }
    (folder / runfolder.CONFIG).write_text(json.dumps(content))
    return Trained(folder, Order(split.shard_samples, SEED, BATCH), digests)


def proof(folder: Path) -> str:
    """What an audit prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(AuditConfig(folder))
    return printed.getvalue()


def fault(folder: Path) -> str:
    """What an audit finds wrong."""
    with pytest.raises(UserError) as caught:
        run(AuditConfig(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)
