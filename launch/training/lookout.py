"""Rank 0's lookout: it leaves a sign of life in the run folder, and sees there whether a person wants the run to stop
and whether a newer attempt trains it.

It has a thread of its own, since a file server may stand still for minutes. Steps and the watchdog read what was found
and wait for no file: steps would be taken for hanging, and a watchdog that falls silent for a machine that is gone.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

from cluster.checkpoints.attempt import Attempt, is_replaced
from cluster.records.beat import beat_path, write_beat
from cluster.records.clock import Clock
from cluster.watch.stop import StopRequest
from launch import runfolder

BEAT_S = 1.0
LOOK_EVERY = 5  # beats between two looks for a newer attempt, which a shared folder has to answer


class Lookout:
    """The lookout of one attempt, as long as a `with` block runs."""

    def __init__(
        self, run: Path, attempt: Attempt, clock: Clock, stop: StopRequest, tell: Callable[[str], None]
    ) -> None:
        """`tell` hears, in the lookout's thread, each time that it begins to be unknown who trains the run."""
        self.is_replaced = False  # as far as is known
        self._attempts, self._attempt = run / runfolder.ATTEMPTS, attempt
        self._beat, self._clock = beat_path(run / runfolder.EVENTS, attempt.number), clock
        self._stop, self._stop_file, self._tell = stop, run / runfolder.STOP, tell
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lookout", daemon=True)

    def __enter__(self) -> Lookout:
        self._stop.look_for(self._stop_file)  # what came before the first step counts at the first step
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()  # and nobody waits: the thread may stand still with its file server

    def _work(self) -> None:
        before = None
        for beat in itertools.count(1):
            if self._closing.wait(BEAT_S):
                return
            write_beat(self._beat, self._clock)
            self._stop.look_for(self._stop_file)
            if beat % LOOK_EVERY == 0:
                trouble = self._look()
                if trouble and not before:
                    self._tell(trouble)
                before = trouble

    def _look(self) -> str | None:
        """Looks for a newer attempt; returns what stood in the way."""
        try:
            if is_replaced(self._attempts, self._attempt):
                self.is_replaced = True
        except OSError as error:  # no reason to end, and meanwhile no checkpoint is completed without an answer
            return f"{self._attempts}: cannot be read ({error.strerror or error}); a newer attempt would not be seen"
        return None
