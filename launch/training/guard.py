"""What a run's watchdog looks for besides hanging ranks, and what is still done when it ends the process."""

from __future__ import annotations

from pathlib import Path

from cluster.checkpoints.attempt import Attempt
from cluster.checkpoints.writer import CheckpointWriter
from cluster.records.appender import Appender
from cluster.records.clock import Clock
from cluster.records.events import EventLog
from cluster.watch.stop import StopRequest
from cluster.watch.watchdog import Watchdog
from cluster.world import World
from launch import runfolder
from launch.config import TrainConfig
from launch.training.lookout import Lookout

LAST_CHECKPOINT_S = 30.0  # what a checkpoint on its way to the disk may still take
LAST_LINES_S = 5.0


class Guard:
    """One rank's guard. All but its making happens in the watchdog's thread."""

    def __init__(self, config: TrainConfig, world: World, stop: StopRequest, clock: Clock) -> None:
        self._config, self._world, self._stop, self._clock = config, world, stop, clock
        # Each once there is one.
        self.attempt: Attempt | None = None
        self.log: EventLog | None = None
        self.appender: Appender | None = None
        self.saver: CheckpointWriter | None = None
        self.lookout: Lookout | None = None  # rank 0's

    def watchdog(self) -> Watchdog:
        """The watchdog that asks this guard."""
        hang_s = self._config.watch.hang_seconds
        return Watchdog(self._world, self._clock, hang_s, self._stacks, self._look, self._farewell)

    def _stacks(self) -> Path:
        """Where the ranks' stacks go."""
        name = f"attempt-{self.attempt.number:04d}" if self.attempt else "start"
        return self._config.log_path / runfolder.STACKS / name

    def _look(self) -> str | None:
        """A reason to end at once. It touches no file: see the lookout."""
        run, grace_s = self._config.log_path, self._config.watch.grace_seconds
        if self._stop.is_overdue(grace_s):
            return f"asked to stop by {self._stop.reason}, and not done --grace_seconds {grace_s:g} later"
        if self.lookout and self.lookout.is_replaced:
            return f"{run}: a newer attempt trains this run; this one ends (to run both, give each its own --log_path)"
        return None

    def _farewell(self, reason: str) -> None:
        stood_still = {"bucket": self._clock.place.bucket, "idle_s": self._clock.idle_s()}
        if self.saver:
            self.saver.wait(LAST_CHECKPOINT_S)
        if self.log and self.appender:
            self.log.record(self.log.instant("ended", {"reason": reason, **stood_still}))
            self.appender.close(LAST_LINES_S)
