"""The watchdog on real processes: who hangs is named, who dies takes the others along, and nobody else is hurt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gloo.worlds import HERE, environment, free_port

RANKS = 3


def outcome(folder: Path, what: str, faulty: int) -> tuple[list[int], list[str]]:
    """Exit statuses and what was said on stderr, by rank."""
    port, ranks = free_port(), []
    for rank in range(RANKS):
        command = [sys.executable, str(HERE / "work_watchdog.py"), str(folder / f"{rank}.json"), what, str(faulty)]
        with (folder / f"{rank}.err").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    [*command, str(folder / "stacks")],
                    cwd=HERE.parents[1],
                    env={**environment(rank, RANKS, port), "PYTHONPATH": str(HERE.parents[1])},
                    stderr=log,
                )
            )
    try:
        statuses = [rank.wait(120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return statuses, [(folder / f"{rank}.err").read_text() for rank in range(RANKS)]


@pytest.mark.slow
def test_who_hangs_is_named_with_the_collective_of_the_others(tmp_path: Path) -> None:
    statuses, said = outcome(tmp_path, "hang", 1)
    assert statuses == [1, 1, 1]
    for text in said:
        assert "nsi train: rank 1 (" in text
        assert "s after step 5, in data_wait" in text
        assert "the others wait in all_reduce at cluster/collectives.py:" in text
        assert "(any_rank)" in text
    assert sorted(path.name for path in (tmp_path / "stacks").iterdir()) == [
        f"rank-0000{rank}.txt" for rank in range(3)
    ]
    assert "work_watchdog.py" in (tmp_path / "stacks" / "rank-00001.txt").read_text()
    assert json.loads((tmp_path / "0.json").read_text()) == {"reason": "told"}


@pytest.mark.slow
@pytest.mark.parametrize("faulty", [0, 2])
def test_who_dies_takes_along_those_who_would_not_notice(tmp_path: Path, faulty: int) -> None:
    statuses, said = outcome(tmp_path, "die", faulty)
    assert statuses == [7 if rank == faulty else 1 for rank in range(RANKS)]
    for rank in set(range(RANKS)) - {faulty}:
        assert f"rank {faulty}" in said[rank]
        assert "died or gave up" in said[rank]


@pytest.mark.slow
def test_slow_ranks_are_known_and_nobody_is_hurt(tmp_path: Path) -> None:
    statuses, said = outcome(tmp_path, "slow", 2)
    assert (statuses, said) == ([0, 0, 0], ["", "", ""])
    assert [float((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)] == [1.0, 1.0, 3.0]
