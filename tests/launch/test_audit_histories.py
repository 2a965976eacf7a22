"""`nsi audit` over random histories: kills, restarts and world sizes pass; any one change of a ledger does not."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.checkpoints.attempt import read_attempts
from cluster.records.appender import Appender
from cluster.records.ledger import Entry, LedgerWriter, read_ledger, standing_steps
from tests.launch.ledgers import BATCH, Trained, begin, fault, proof, read_samples


@pytest.fixture(scope="module")
def digests(shards: Path) -> np.ndarray:
    return read_samples(shards)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, list[int], int, bool]]:
    """Attempts: the step each went on from, its flushes, its world size, and whether a kill tore its last line."""
    done, history = 0, []
    for _ in range(draw(st.integers(1, 4))):
        restored = draw(st.integers(0, done))
        flushes = draw(st.lists(st.integers(1, 4), max_size=4))
        done = restored + sum(flushes)
        history.append((restored, flushes, draw(st.integers(1, 4)), draw(st.booleans())))
    return history


def write_history(trained: Trained, history: list[tuple[int, list[int], int, bool]]) -> int:
    """Writes such a run and returns how many steps it did in the end."""
    for restored, flushes, world, torn in history:
        path = trained.attempt(restored, flushes, world)
        if torn:
            with path.open("ab") as file:
                file.write(b'{"first_step": 99, "steps": 2, "batch_si')
    return history[-1][0] + sum(history[-1][1])


def rewrite(entry: Entry, digests: dict[int, int], twice: bool = False) -> None:
    """Puts other entries, with the right check values, in the place of one: the given steps alone, as often as said."""
    lines = entry.path.read_bytes().splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as folder:
        appender = Appender()
        writer = LedgerWriter(Path(folder), 1, BATCH, appender)
        for _ in range(2 if twice else 1):
            for step, digest in digests.items():
                writer.write(step, [digest])
        appender.close()
        lines[entry.line - 1] = (Path(folder) / "attempt-0001.jsonl").read_bytes()
    entry.path.write_bytes(b"".join(lines))


@given(history=histories(), data=st.data())
@settings(derandomize=True, deadline=None, max_examples=80)
def test_any_history_is_proven_and_any_change_of_it_is_caught(
    history: list[tuple[int, list[int], int, bool]], data: st.DataObject, shards: Path, digests: np.ndarray
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trained = begin(Path(folder), shards, digests)
        done = write_history(trained, history)
        if not done:
            assert "its ledger has no step yet" in fault(trained.run)
            return
        assert f"steps     {done} of 9" in proof(trained.run)
        ledger = read_ledger(trained.run / "ledger")
        standing = standing_steps(ledger, read_attempts(trained.run / "attempts"))
        step = data.draw(st.integers(0, done - 1), label="step")
        entry = ledger.entries[standing.entries_N[step]]
        told = {entry.first_step + place: int(digest) for place, digest in enumerate(entry.digests_K)}
        change = data.draw(st.sampled_from(["drop", "alter", "exchange", "repeat", "flip"]), label="change")
        expected = step
        if change == "drop":
            del told[step]
            rewrite(entry, told)
        elif change == "alter":
            told[step] ^= 1 << data.draw(st.integers(0, 63), label="bit")
            rewrite(entry, told)
        elif change == "exchange":
            told[step] = int(standing.digests_N[(step + 1) % done]) if done > 1 else 0
            rewrite(entry, told)
        elif change == "repeat":
            expected = entry.first_step
            rewrite(entry, told, twice=True)
        else:
            expected = entry.first_step
            lines = entry.path.read_bytes().splitlines(keepends=True)
            line = bytearray(lines[entry.line - 1])
            line[data.draw(st.integers(0, len(line) - 2), label="byte")] ^= 1 << data.draw(
                st.integers(0, 7), label="bit"
            )
            lines[entry.line - 1] = bytes(line)
            entry.path.write_bytes(b"".join(lines))
            assert f"{entry.path.name} line {entry.line} is " in fault(trained.run)
        assert f"step {expected} (from 0) " in fault(trained.run)
