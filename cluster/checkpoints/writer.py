"""Writes checkpoints in a thread of its own, so that steps go on meanwhile, however slow the disk is.

One is being written and others may wait in memory: the newest, and the best so far. Where the disk is slower than
checkpoints come, what waits gives way to the newer, which says all that it said.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cluster.checkpoints.attempt import TakenOver
from cluster.checkpoints.checkpoint import Checkpoint, write_checkpoint
from cluster.checkpoints.folder import IsVoid, prune
from cluster.checkpoints.retention import Retention
from nsi.errors import UserError


class _Work(NamedTuple):
    checkpoint: Checkpoint
    keep_also: frozenset[int]


class CheckpointWriter:
    """The writer of one attempt. Its methods are called by one thread, `wait` by any."""

    def __init__(
        self,
        folder: Path,
        retention: Retention,
        is_replaced: Callable[[], bool] = lambda: False,
        before: Callable[[], None] = lambda: None,
        is_void: IsVoid = lambda step, attempt: False,
    ) -> None:
        """`is_replaced` says whether another attempt has taken over: then nothing is written any more. `before` is
        called before each checkpoint. Both are called in the background; where one raises OSError, that checkpoint is
        not written."""
        self._folder = folder
        self._retention = retention
        self._is_replaced = is_replaced
        self._before = before
        self._is_void = is_void
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None  # while there is something to write
        self._waiting: list[_Work] = []
        self._newest: _Work | None = None  # until it lies on disk
        self._troubles: list[str] = []
        self._saved: list[int] = []
        self._is_over = False  # another attempt has taken over

    def submit(self, checkpoint: Checkpoint, keep_also: frozenset[int]) -> None:
        """Takes a checkpoint and returns at once. One that is not written is told of by `troubles`: the run can go on,
        and the checkpoints before it stay.

        `keep_also`: steps to keep whatever becomes of the others, be they on disk or still waiting. Raises UserError
        where the checkpoint before found that another attempt has taken over.
        """
        self._refuse_if_over()
        with self._changed:
            for old in [each for each in self._waiting if each.checkpoint.step not in keep_also]:
                self._waiting.remove(old)
                self._troubles.append(
                    f"{self._folder}: the checkpoint of step {old.checkpoint.step} was left out, since the disk still "
                    f"wrote an older one when that of step {checkpoint.step} came"
                )
            self._newest = _Work(checkpoint, keep_also)
            self._waiting.append(self._newest)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint")
                self._thread.start()

    def troubles(self) -> list[str]:
        """Which checkpoints were not written since the last call, and why."""
        with self._changed:
            troubles, self._troubles = self._troubles, []
        return troubles

    def saved(self) -> list[int]:
        """Whose steps' checkpoints have been written since the last call."""
        with self._changed:
            saved, self._saved = self._saved, []
        return saved

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing is being written any more, and returns whether the newest checkpoint lies on disk."""
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None, timeout_s)
            return self._newest is None

    def finish(self, pauses_s: Sequence[float] = (1.0, 4.0, 15.0)) -> None:
        """Waits for the newest checkpoint and tries again, after so many pauses, where it could not be written.

        Raises UserError where it never could, and where another attempt has taken over.
        """
        for pause_s in pauses_s:
            if self.wait():
                return
            self._refuse_if_over()
            time.sleep(pause_s)
            assert self._newest is not None
            self.submit(*self._newest)
        if not self.wait():
            self._refuse_if_over()
            raise UserError(
                f"{self._troubles[-1]}; make room or mend the folder and start again, the run goes on from the one "
                "before"
            )

    def close(self) -> None:
        """Waits as `wait` does: for a run that ends for another reason already."""
        self.wait()

    def _refuse_if_over(self) -> None:
        if self._is_over:
            raise UserError(
                f"{self._folder.parent}: a newer attempt trains this run; this one ends without writing "
                "(to run both, give each a --log_path of its own)"
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                work = self._waiting.pop(0) if self._waiting and not self._is_over else None
                if work is None:
                    self._thread = None
                self._changed.notify_all()
            if work is None:
                return
            trouble = self._write(work)
            with self._changed:
                if trouble:
                    self._troubles.append(trouble)

    def _write(self, work: _Work) -> str | None:
        """Writes one, and removes what is not kept; returns what went wrong."""
        failed = "the checkpoint could not be written"
        try:
            self._before()
            if self._is_replaced():
                raise TakenOver
            write_checkpoint(self._folder, work.checkpoint, self._is_replaced)
            with self._changed:
                self._saved.append(work.checkpoint.step)
                if self._newest is work:
                    self._newest = None
            failed = "older checkpoints could not be removed"
            if not self._is_replaced():
                prune(self._folder, work.checkpoint.attempt, self._retention, work.keep_also, self._is_void)
        except TakenOver:
            self._is_over = True
        except Exception as error:  # safetensors has errors of its own; none may get lost in this thread
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            return f"{self._folder}: {failed} ({reason})"
        return None
