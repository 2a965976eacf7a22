"""The watchdog on real processes: who hangs is named, who dies takes the others along, and nobody else is hurt."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.records.beat import beat_path
from tests.gloo.worlds import HERE, environment, free_port

RANKS = 3


def outcome(folder: Path, what: str, faulty: int) -> tuple[list[int], list[str]]:
    """Exit statuses and what was said on stderr, by rank."""
    return outcome_of(folder, "work_watchdog.py", RANKS, what, str(faulty), str(folder / "stacks"))


def outcome_of(
    folder: Path, worker: str, size: int, *arguments: str, own_address: str = "127.0.0.1"
) -> tuple[list[int], list[str]]:
    """`own_address`: what rank 0 knows itself by."""
    port, ranks = free_port(), []
    for rank in range(size):
        command = [sys.executable, str(HERE / worker), str(folder / f"{rank}.json"), *arguments]
        variables = {**environment(rank, size, port), "PYTHONPATH": str(HERE.parents[1])}
        if rank == 0:
            variables["MASTER_ADDR"] = own_address
        with (folder / f"{rank}.err").open("w") as log:
            ranks.append(subprocess.Popen(command, cwd=HERE.parents[1], env=variables, stderr=log))
    try:
        statuses = [rank.wait(120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return statuses, [(folder / f"{rank}.err").read_text() for rank in range(size)]


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
def test_nobody_stays_because_the_stacks_cannot_be_written(tmp_path: Path) -> None:
    """Where a rank's stacks should go, there is a pipe that nobody reads; another's folder is none."""
    (tmp_path / "stacks").mkdir()
    os.mkfifo(tmp_path / "stacks" / "rank-00001.txt")
    (tmp_path / "stacks" / "rank-00002.txt").mkdir()
    statuses, said = outcome(tmp_path, "die", 0)
    assert statuses == [7, 1, 1]
    for text in said[1:]:
        assert "; the stacks are in this log\n" in text
        assert "work_watchdog.py" in text


@pytest.mark.slow
def test_slow_ranks_are_known_and_nobody_is_hurt(tmp_path: Path) -> None:
    statuses, said = outcome(tmp_path, "slow", 2)
    assert (statuses, said) == ([0, 0, 0], ["", "", ""])
    assert [float((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)] == [1.0, 1.0, 3.0]


@pytest.mark.slow
def test_a_run_folder_that_stands_still_silences_no_watchdog(tmp_path: Path) -> None:
    """Rank 0 still tells the others how slow they are. The beat is a pipe, which nobody reads."""
    beat = beat_path(tmp_path / "run" / "events", 1)
    beat.parent.mkdir(parents=True)
    os.mkfifo(beat)
    statuses, said = outcome_of(tmp_path, "work_stalled.py", 2, str(tmp_path / "run"))
    assert (statuses, said) == ([0, 0], ["", ""])
    assert [(tmp_path / f"{rank}.json").read_text() for rank in range(2)] == ["1.0", "3.0"]


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_rank_0_is_reached_by_ipv4_where_its_name_leads_to_ipv6_first(tmp_path: Path) -> None:
    told = ("slow", "1", str(tmp_path / "stacks"))
    statuses, said = outcome_of(tmp_path, "work_watchdog.py", 2, *told, own_address="::1")
    assert (statuses, said) == ([0, 0], ["", ""])
    assert [float((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [1.0, 3.0]


@pytest.mark.slow
def test_who_never_comes_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    """A rank that died before the ranks have met; two of three wait for it."""
    port, program = free_port(), "import os; from cluster.processes import join; from cluster.world import find_world; "
    program += "join(find_world(os.environ), 3.0)"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**environment(rank, RANKS, port), "PYTHONPATH": str(HERE.parents[1])},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS - 1)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "rank 0 cannot meet the others" in said[0]
    assert "2/3 clients joined" in said[0]


@pytest.mark.slow
def test_who_does_not_stop_in_time_is_ended(tmp_path: Path) -> None:
    """Asked to stop while another rank hangs: out by force when the grace is over."""
    statuses, said = outcome_of(tmp_path, "work_guard.py", 2, str(tmp_path / "run"))
    assert statuses == [1, 1]
    for text in said:
        assert "asked to stop by SIGTERM, and not done --grace_seconds 2 later" in text
    assert {path.name for path in (tmp_path / "run" / "stacks" / "start").iterdir()} == {
        "rank-00000.txt",
        "rank-00001.txt",
    }
