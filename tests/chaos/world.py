"""Real worlds of ranks, forked by the zygote; only processes that were started here are ever signalled."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.gloo.worlds import environment, free_port

ROOT = Path(__file__).parents[2]


class Zygote:
    """The process that ranks are forked from."""

    def __init__(self, log: Path, within: Sequence[str] = ()) -> None:
        """`within`: a command that runs the command after it in its own process, elsewhere."""
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [*within, sys.executable, "-m", "tests.chaos.zygote"],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self._ask(None)
        self.pid = self._process.pid

    def start(self, **request: Any) -> int:
        """Forks a rank (see zygote.py) and returns its process id."""
        return self._ask({"start": request})["pid"]

    def poll(self, pids: Sequence[int]) -> dict[int, int]:
        """Exit statuses of those that ended since they were last asked for."""
        return {int(pid): status for pid, status in self._ask({"poll": list(pids)}).items()}

    def close(self) -> None:
        """Ends it and all that it forked."""
        self._process.communicate()

    def _ask(self, request: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        if request:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the zygote ended; its log says why"
        return json.loads(answer)


@contextlib.contextmanager
def zygote(folder: Path, within: Sequence[str] = ()) -> Iterator[Zygote]:
    """A zygote for as long as the block lasts."""
    made = Zygote(folder / "zygote.log", within)
    try:
        yield made
    finally:
        made.close()


class RankProcesses:
    """The ranks of one attempt."""

    def __init__(
        self, mother: Zygote, size: int, arguments: Sequence[str], log: Path, cuts: dict[int, dict[str, Any]]
    ) -> None:
        """`log`: rank r writes what it says to the file with `.r` added. `cuts`: zygote.cut_at's, by rank."""
        self._mother, self.log, self.size = mother, log, size
        self.statuses: dict[int, int] = {}  # by rank, of those that ended
        port = free_port()
        self._pids = [
            mother.start(
                environment={**environment(rank, size, port), "DS_ACCELERATOR": "cpu"},
                arguments=list(arguments),
                log=f"{log}.{rank}",
                cut=cuts.get(rank),
            )
            for rank in range(size)
        ]

    def look(self) -> bool:
        """Whether any rank still lives."""
        ended = self._mother.poll(self._pids)
        self.statuses |= {rank: ended[pid] for rank, pid in enumerate(self._pids) if pid in ended}
        return len(self.statuses) < self.size

    def send(self, rank: int, number: int) -> bool:
        """Signals a rank, unless it is gone. A rank that has not been waited for keeps its process id."""
        self.look()
        if rank in self.statuses:
            return False
        os.kill(self._pids[rank], number)
        return True

    def wait(self, limit_s: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Waits until all are gone, `until` says so or the time is over; returns whether all are gone."""
        end = time.monotonic() + limit_s
        while self.look():
            if until() or time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def kill(self) -> None:
        """Kills those that are left."""
        for rank in range(self.size):
            self.send(rank, signal.SIGKILL)
        assert self.wait(10)

    def left(self) -> list[int]:
        """Processes that live on in a session of one of the ranks: their data workers, say."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) in self._pids and fields[0] != "Z":
                    found.append(int(stat.parent.name))
        return found

    def said(self) -> str:
        """The ends of all ranks' logs."""
        logs = [Path(f"{self.log}.{rank}") for rank in range(self.size)]
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-800:]}" for log in logs if log.exists())
