"""Processes by id and start time, written down as they start, so that whoever comes later can end exactly those."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

PIDS = "pids"
END_S = 15.0  # far more than a SIGKILL takes
# The process writes itself down before it becomes the program: nothing can die between its start and its record.
RECORD = r"""
stat="$(</proc/$$/stat)"
fields=(${stat##*) })
echo "$$ ${fields[19]} $2" >> "$1"
shift 2
exec "$@"
"""


@dataclass(frozen=True)
class Process:
    """A process. An id is used again; together with its start time it is not."""

    pid: int
    started: int  # in the kernel's ticks
    name: str = ""

    def alive(self) -> bool:
        """A zombie is not: it may stay one for long where its parent is late."""
        return find(self.pid) == Process(self.pid, self.started)

    def send(self, number: signal.Signals) -> None:
        """A signal, unless the process has gone."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def find(pid: int) -> Process | None:
    """The process that has this id now; None where there is none, or a zombie."""
    stat = stat_fields(pid)
    return Process(pid, int(stat[19])) if stat and stat[0] not in "ZX" else None


def this_process() -> Process:
    """Ourselves."""
    found = find(os.getpid())
    assert found
    return found


def start(folder: Path, name: str, command: list[str], **options) -> subprocess.Popen:
    """Starts a daemon: in the records of `folder`, in a session of its own, and nobody's child, so nobody's zombie.

    Its first words are in `folder`/NAME.out.
    """
    with (folder / f"{name}.out").open("ab") as out:
        return subprocess.Popen(
            ["setsid", "--fork", "bash", "-c", RECORD, "bash", str(folder / PIDS), name, *command],
            **{"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, **options},
        )


def recorded(folder: Path) -> list[Process]:
    """What was started for a folder, oldest first."""
    try:
        lines = (folder / PIDS).read_text().splitlines()
    except FileNotFoundError:
        return []
    fields = [line.split() for line in lines]
    return [Process(int(each[0]), int(each[1]), each[2]) for each in fields if len(each) == 3]


def below(pid: int) -> list[Process]:
    """All processes below one that are no zombies."""
    children: dict[int, list[int]] = {}
    for each in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        if stat := stat_fields(each):
            children.setdefault(int(stat[1]), []).append(each)
    found, queue = [], [pid]
    while queue:
        more = children.get(queue.pop(), [])
        found += more
        queue += more
    return [process for each in found if (process := find(each))]


def end_trees(roots: Iterable[Process]) -> list[Process]:
    """Ends processes and all below them; returns those that could not be ended.

    A root is stopped first and goes last: what is orphaned meanwhile either stays below it or dies with its namespace.
    """
    alive = [each for each in roots if each.alive()]
    for each in alive:
        each.send(signal.SIGSTOP)
    end = time.monotonic() + END_S
    while (left := [child for each in alive for child in below(each.pid)]) and time.monotonic() < end:
        for child in left:
            child.send(signal.SIGKILL)
        time.sleep(0.005)
    for each in alive:
        each.send(signal.SIGKILL)
    while (left := [each for each in [*alive, *left] if each.alive()]) and time.monotonic() < end:
        time.sleep(0.005)
    return left


def stat_fields(pid: int) -> list[str] | None:
    """/proc/PID/stat after the name, which may hold anything: the state, the parent, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def wait_until(holds: Callable[[], object], seconds: float, otherwise: Callable[[], str]) -> None:
    """Looks again and again; says what is wrong when it takes too long."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"{otherwise()} ({seconds:g} s)")
        time.sleep(0.05)
