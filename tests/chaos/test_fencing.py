"""Two live attempts of one run: the older ends with its one line, and nothing that it writes or has written harms."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from launch import runfolder
from launch.runfolder import read_lines
from tests.chaos.chaos import LIFE_S, ROWS, command, loss_difference, uninterrupted
from tests.chaos.world import RankProcesses, Zygote
from tests.launch.outside import done, nsi

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux tells whose children processes are"),
]


def steps_of(run: Path, attempt: int) -> int:
    return sum(line["attempt"] == attempt for line in read_lines(run, runfolder.METRICS))


@pytest.mark.parametrize(("world", "frozen"), [(2, False), (1, True)])
def test_two_attempts_of_one_run(mother: Zygote, shards: Path, tmp_path: Path, world: int, frozen: bool) -> None:
    """The older one trains on meanwhile, or is stopped while it trains and goes on when its successor has finished."""
    run, steps = tmp_path / "run", 40
    whole = uninterrupted(mother, shards, tmp_path / "whole", steps)
    older = RankProcesses(mother, world, command(shards, run, 1, 1_000_000), tmp_path / "older", {})
    newer = None
    try:
        older.wait(LIFE_S, lambda: steps_of(run, 1) > 9)
        for rank in range(world if frozen else 0):
            assert older.send(rank, signal.SIGSTOP)
        before = steps_of(run, 1)
        newer = RankProcesses(mother, 1, command(shards, run, 2, steps), tmp_path / "newer", {})
        if not frozen:
            assert older.wait(LIFE_S), older.said()
        assert newer.wait(LIFE_S), newer.said()
        assert newer.statuses == {0: 0}, newer.said()
        if frozen:
            assert steps_of(run, 1) == before
            proof = done(nsi("audit", run))
            for rank in range(world):
                assert older.send(rank, signal.SIGCONT)
            assert older.wait(LIFE_S), older.said()
            assert done(nsi("audit", run)).splitlines()[1:3] == proof.splitlines()[1:3]
    finally:
        older.kill()
        if newer:
            newer.kill()
    assert older.left() == []
    assert set(older.statuses.values()) == {1}
    assert (tmp_path / "older.0").read_text().count("a newer attempt trains this run; this one ends") == 1
    assert f"{steps} of {ROWS} samples, none missing, none twice" in done(nsi("audit", run))
    assert loss_difference(run, whole) < 1e-5
    again = RankProcesses(mother, 2, command(shards, run, 0, steps + 6), tmp_path / "again", {})
    try:
        assert again.wait(LIFE_S), again.said()
    finally:
        again.kill()
    assert set(again.statuses.values()) == {0}, again.said()
    assert f"{steps + 6} of {ROWS} samples, none missing, none twice" in done(nsi("audit", run))
