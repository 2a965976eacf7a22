"""`nsi audit`: a run that was read as ordered is proven, whatever its restarts; anything else is named at its step."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import xxhash

from cluster.records.appender import Appender
from cluster.records.ledger import LedgerWriter, Skipped
from launch import cli, runfolder
from launch.audit import AuditConfig, run
from nsi.errors import UserError
from shards.coverage import batch_digest, read_digest
from shards.order import Order
from shards.reading.dataset import open_split
from tests.launch.ledgers import BATCH, Trained, begin, fault, proof, read_samples


@dataclass(frozen=True)
class WithSkipped(Trained):
    """A run that writes down one skipped row in place of each."""

    instead: Skipped

    def skipped(self, position: int) -> Skipped:
        return self.instead


@pytest.fixture(scope="module")
def digests(shards: Path) -> np.ndarray:
    return read_samples(shards)


@pytest.fixture
def trained(tmp_path: Path, shards: Path, digests: np.ndarray) -> Trained:
    return begin(tmp_path / "run", shards, digests)


def test_a_whole_run_is_proven(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    trained.attempt(0, [5, 5, 1])
    assert cli.run(["audit", str(trained.run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{trained.run}: proven: every sample was read exactly once an epoch",
        "  steps     11 of 9 samples, none missing, none twice",
        "  epochs    2 whole ones of 48 samples, and 3 samples of the next",
        "  samples   99 read, 0 skipped",
        "  attempts  1, on 1 ranks",
        "  replayed  0 steps, which later attempts did anew",
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_world_leaves_the_same_ledger(trained: Trained, tmp_path: Path, world: int) -> None:
    trained.attempt(0, [12], world)
    assert f"attempts  1, on {world} ranks" in proof(trained.run)
    alone = dataclasses.replace(trained, run=tmp_path / "alone")
    assert alone.attempt(0, [12], 1).read_bytes() == (trained.run / "ledger" / "attempt-0001.jsonl").read_bytes()


def test_kills_and_other_worlds(trained: Trained) -> None:
    torn = trained.attempt(0, [4, 4, 4], world=4)
    with torn.open("ab") as file:
        file.write(b'{"first_step": 12, "steps": 4, "ba')
    trained.attempt(8, [4, 4], world=3)
    trained.attempt(16, [], world=2)  # killed before its first step
    trained.attempt(10, [4, 2], world=1)  # the checkpoint of 16 was torn: from the one before
    text = proof(trained.run)
    assert "steps     16 of 9" in text
    assert "attempts  4, on 4, 3, 2, 1 ranks" in text
    assert "replayed  10 steps" in text
    assert "torn" not in text  # the steps that the torn line had were done anew


def test_a_kill_after_the_last_flush(trained: Trained) -> None:
    with trained.attempt(0, [4, 4]).open("ab") as file:
        file.write(b'{"first_step": 8, "ste')
    assert "steps     8 of 9" in proof(trained.run)
    assert "torn      ledger/attempt-0001.jsonl line 3" in proof(trained.run)


def test_a_write_that_failed_and_was_tried_again(trained: Trained) -> None:
    path = trained.attempt(0, [4, 4])
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:30] + second)
    assert "steps     8 of 9" in proof(trained.run)
    assert "torn" not in proof(trained.run)


def test_skipped_samples_are_counted_and_listed(trained: Trained) -> None:
    trained.attempt(0, [6, 6], world=2, skips=[3, 52, 53, 100])
    text = proof(trained.run)
    assert "samples   104 read, 4 skipped" in text
    sample = int(trained.order.batch(5)[7])
    assert f"skipped   step 5, sample {sample}: no picture" in text


def test_a_skipped_sample_that_was_read(trained: Trained) -> None:
    """The ledger says so of a row that its digest has."""
    trained.attempt(0, [6])
    appender = Appender()
    writer = LedgerWriter(trained.run / "ledger", 1, BATCH, appender)
    step = trained.order.batch(6)
    writer.write(6, [batch_digest(trained.digests_n[step], np.arange(54, 63))], [trained.skipped(55)])
    appender.close()
    assert "step 6 (from 0) did not read the samples that the order gives (ledger/attempt-0001" in fault(trained.run)


def test_a_skipped_sample_of_another_place(trained: Trained) -> None:
    wrong = dataclasses.replace(trained.skipped(55), sample=int(trained.order.batch(6)[2]))
    other = WithSkipped(trained.run, trained.order, trained.digests_n, wrong)
    other.attempt(0, [8], skips=[55])
    assert "step 6 (from 0) skipped another sample than the order has there" in fault(trained.run)


def exchanged(order: Order, step: int, row: int, other: int) -> Callable[[int], np.ndarray]:
    """The order, but two rows of one step."""

    def ids_of(each: int) -> np.ndarray:
        ids = order.batch(each)
        if each == step:
            ids[[row, other]] = ids[[other, row]]
        return ids

    return ids_of


def test_rows_in_each_others_place(trained: Trained) -> None:
    trained.attempt(0, [5, 5], world=2, ids_of=exchanged(trained.order, 7, 1, 8))
    assert "step 7 (from 0) did not read the samples that the order gives (ledger/attempt-0001.jsonl line 2)" in fault(
        trained.run
    )


def test_one_wrong_sample(trained: Trained) -> None:
    def ids_of(step: int) -> np.ndarray:
        return np.where(
            (step == 3) & (np.arange(BATCH) == 4), (trained.order.batch(step) + 1) % 48, trained.order.batch(step)
        )

    trained.attempt(0, [5, 5], ids_of=ids_of)
    assert "step 3 (from 0) did not read" in fault(trained.run)


def test_the_right_json_with_anothers_image(trained: Trained, shards: Path) -> None:
    """A reader whose image and JSON come from two samples."""
    split = open_split(shards, "train")
    victim = int(trained.order.batch(2)[0])
    text, image = bytes(split.read(victim, "json")), bytes(split.read((victim + 1) % 48, "image"))
    digests_n = trained.digests_n.copy()
    digests_n[victim] = read_digest(
        json.loads(text)["key"], xxhash.xxh3_64_intdigest(image), xxhash.xxh3_64_intdigest(text)
    )
    dataclasses.replace(trained, digests_n=digests_n).attempt(0, [5])
    assert "step 2 (from 0) did not read" in fault(trained.run)


def test_a_gap_and_an_overlap(trained: Trained) -> None:
    trained.attempt(0, [4])
    trained.attempt(6, [4])
    assert "step 4 (from 0) is not in the ledger" in fault(trained.run)
    trained.attempt(4, [2])
    appender = Appender()
    writer = LedgerWriter(trained.run / "ledger", 3, BATCH, appender)
    writer.write(5, [1])
    appender.close()
    twice = (
        "step 5 (from 0) is in the ledger twice (ledger/attempt-0003.jsonl line 1 and ledger/attempt-0003.jsonl line 2)"
    )
    assert twice in fault(trained.run)


def test_the_first_fault_is_named(trained: Trained) -> None:
    """A wrong batch before a gap, and a gap before a wrong batch."""
    trained.attempt(0, [2, 2], ids_of=exchanged(trained.order, 1, 0, 5))
    trained.attempt(5, [2], ids_of=exchanged(trained.order, 6, 0, 5))
    assert "step 1 (from 0) did not" in fault(trained.run)
    shutil.rmtree(trained.run / "ledger")
    shutil.rmtree(trained.run / "attempts")
    trained.attempt(0, [2, 2])
    trained.attempt(5, [2], ids_of=exchanged(trained.order, 6, 0, 5))
    assert "step 4 (from 0) is not in" in fault(trained.run)


def test_the_end_may_not_be_missing(trained: Trained) -> None:
    """What the run logged, or stopped at, or went on from was done: the ledger must have it."""
    path = trained.attempt(0, [3, 3])
    whole = path.read_bytes()
    path.write_bytes(whole.splitlines(keepends=True)[0])
    assert "step 3 (from 0) is not in the ledger; no later step" in fault(trained.run)
    (trained.run / runfolder.METRICS).unlink()
    assert "steps     3 of 9" in proof(trained.run)
    (trained.run / runfolder.STOPPED).write_text("6\n")
    assert "step 3 (from 0) is not in the ledger" in fault(trained.run)
    (trained.run / runfolder.STOPPED).unlink()
    trained.attempt(6, [])
    assert "step 3 (from 0) is not in the ledger" in fault(trained.run)
    path.write_bytes(whole)
    assert "steps     6 of 9" in proof(trained.run)


def test_a_flipped_byte_is_named_with_file_and_line(trained: Trained) -> None:
    path = trained.attempt(0, [3, 3, 3])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert "step 3 (from 0) is not in the ledger; ledger/attempt-0001.jsonl line 2 is damaged" in fault(trained.run)


def test_another_batch_size(trained: Trained) -> None:
    trained.attempt(0, [3])
    appender = Appender()
    writer = LedgerWriter(trained.run / "ledger", 1, BATCH + 1, appender)
    writer.write(3, [7])
    appender.close()
    assert "step 3 (from 0) was done with a batch of 10, not of 9 (ledger/" in fault(trained.run)


def test_another_seed_is_another_order(trained: Trained) -> None:
    trained.attempt(0, [3])
    path = trained.run / runfolder.CONFIG
    path.write_text(path.read_text().replace('"seed": 5', '"seed": 6'))
    assert "step 0 (from 0) did not read" in fault(trained.run)


def test_other_shards(trained: Trained, shards: Path, tmp_path: Path) -> None:
    trained.attempt(0, [3])
    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)
    path = trained.run / runfolder.CONFIG
    content = json.loads(path.read_text())
    content["data"]["path"] = str(tmp_path / "gone")
    path.write_text(json.dumps(content))
    assert "gone" in fault(trained.run)
    with contextlib.redirect_stdout(io.StringIO()):
        run(AuditConfig(trained.run, str(moved)))
    content["data"]["fingerprint"] = "0123456789abcdef"
    path.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match="moved: its fingerprint is .*, but .*run was trained on shards with 0123456789ab"
    ):
        run(AuditConfig(trained.run, str(moved)))


def test_folders_that_prove_nothing(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run (it has no config.json)" in fault(tmp_path)
    assert "ledger: missing, so nothing is proven" in fault(trained.run)
    trained.attempt(0, [])
    assert "its ledger has no step yet" in fault(trained.run)
    assert cli.run(["audit", str(trained.run)]) == 1
    assert capsys.readouterr().err.startswith(f"nsi audit: {trained.run}: its ledger has no step yet")
    (trained.run / runfolder.METRICS).write_text('{"step": 1, "attempt": 1}\n')
    assert "step 0 (from 0) is not in the ledger" in fault(trained.run)
    (trained.run / runfolder.CONFIG).write_text('{"config": {}}')
    assert "config.json: cannot be read (KeyError('data'))" in fault(trained.run)


def test_an_attempt_that_nobody_knows(trained: Trained) -> None:
    """Without its file nobody knows from where it went on, so nobody knows what is void."""
    trained.attempt(0, [3])
    trained.attempt(2, [3])
    (trained.run / "attempts" / "attempt-0002.json").write_text("{")
    assert "attempts: attempt 2 is missing or damaged" in fault(trained.run)
