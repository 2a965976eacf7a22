"""A wish to stop: a signal from the scheduler or a person, a stop file, a deadline. Training asks at every step.

The file is looked for by another thread, since it lies on a shared folder, which may stand still. The reason itself is
set by the main thread alone, and with it the time from which the run's grace counts."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
ECHO_S = 1.0  # Slurm may send one signal to the batch script and to its ranks, who then hear it twice
SLURM_END = "SLURM_JOB_END_TIME"  # seconds since 1970


REQUEUE = b"requeue"  # what a batch script writes into the stop file


class StopRequest:
    """Remembers the first reason to stop. A signal a second after another ends the process at once."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.is_for_good = False  # a person wants the run to end, not to be queued again
        self._found: tuple[str, bool] | None = None  # a stop file, and whether it is for good
        self._heard = 0.0
        self._since = math.inf
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._remember)

    def look(self, deadline: float) -> bool:
        """Whether there is a reason to stop by now; `deadline` in seconds since 1970."""
        if self.reason is None and time.time() >= deadline:
            self._wish("its time limit")
        if self.reason is None and self._found:
            stop_file, self.is_for_good = self._found
            self._wish(stop_file)
        return self.reason is not None

    def look_for(self, stop_file: Path) -> None:
        """Looks for a stop file, for the next `look` to heed. One rank does."""
        if self._found is None and _is_there(stop_file):
            self._found = str(stop_file), _content(stop_file) != REQUEUE

    def is_overdue(self, grace_s: float) -> bool:
        """Whether the process is still here so long after it was asked to stop."""
        return time.monotonic() - self._since > grace_s

    def _wish(self, reason: str) -> None:
        self.reason, self._since = reason, time.monotonic()

    def _remember(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self._heard:
            self._heard = now
            if self.reason is None:
                self._wish(signal.Signals(number).name)
        elif now - self._heard > ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def deadline(began: float, limit_s: float, grace_s: float, environ: Mapping[str, str]) -> float:
    """When to stop, in seconds since 1970: `grace_s` before the limit (0: none), or before Slurm ends the job."""
    slurm_end = environ.get(SLURM_END, "")
    ends = [began + limit_s] if limit_s else []
    if slurm_end.isdigit() and int(slurm_end) > began:
        ends.append(float(slurm_end))
    return min(ends, default=math.inf) - grace_s


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a file server that has no answer now is asked again
        return False


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes().strip()
    except OSError:  # a person has taken it away again
        return b""
