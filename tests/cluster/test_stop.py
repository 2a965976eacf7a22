"""Stop signals: the first is a wish, an echo of it is none, a second one ends the process at once."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.watch.stop import SIGNALS, SLURM_END, StopRequest, deadline

SCRIPT = """
import signal, sys, time
from cluster.watch.stop import ECHO_S, StopRequest
stop = StopRequest()
signal.raise_signal({first})
signal.raise_signal({first})
print(stop.reason, flush=True)
stop._heard -= 2 * ECHO_S  # as if that were long ago
signal.raise_signal({second})
print("still alive", flush=True)
"""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_the_second_signal_ends_the_process(first: signal.Signals) -> None:
    script = SCRIPT.format(first=int(first), second=int(signal.SIGTERM))
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.stdout.split() == [first.name]
    assert found.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("limit", "environ", "expected"),
    [
        (0, {}, float("inf")),
        (600, {}, 1480.0),
        (0, {SLURM_END: "1300"}, 1180.0),
        (600, {SLURM_END: "1300"}, 1180.0),  # whichever falls first
        (600, {SLURM_END: "900"}, 1480.0),  # of a job that this process was not started by
        (0, {SLURM_END: "Unknown"}, float("inf")),
    ],
)
def test_the_deadline(limit: float, environ: dict[str, str], expected: float) -> None:
    assert deadline(1000.0, limit, 120.0, environ) == expected


@pytest.mark.parametrize(("content", "for_good"), [(b"", True), (b"requeue\n", False), (b"\xff", True)])
def test_a_batch_script_says_that_it_will_queue_the_run_again(tmp_path: Path, content: bytes, for_good: bool) -> None:
    (tmp_path / "stop").write_bytes(content)
    stop = StopRequest()
    stop.look_for(tmp_path / "stop")
    assert not stop.is_overdue(-1.0)  # the grace counts from where training heeds it
    assert stop.look(math.inf)
    assert stop.is_overdue(-1.0)
    assert stop.is_for_good is for_good


def test_a_stop_file_is_for_good_and_a_deadline_is_not(tmp_path: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    by_file, by_time, by_none = StopRequest(), StopRequest(), StopRequest()
    by_none.look_for(tmp_path / "stop")
    assert not by_none.look(time.time() + 1000)
    assert by_time.look(time.time() - 1)
    (tmp_path / "stop").touch()
    for stop in (by_file, by_time):  # the first reason stays
        stop.look_for(tmp_path / "stop")
    assert by_file.look(time.time() + 1000)
    assert (by_file.reason, by_file.is_for_good) == (str(tmp_path / "stop"), True)
    assert (by_time.reason, by_time.is_for_good) == ("its time limit", False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_file_server_that_gives_no_answer_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nobody_knows = tmp_path / ("x" * 300)  # "File name too long": an error of its own kind, as EIO is
    with pytest.raises(OSError, match="too long"):
        nobody_knows.exists()
    stop = StopRequest()
    stop.look_for(nobody_knows)
    assert not stop.look(math.inf)
