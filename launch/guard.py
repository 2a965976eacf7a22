"""What a run's watchdog looks for besides hanging ranks, and what is still done when it ends the process."""

from __future__ import annotations

from cluster.appender import Appender
from cluster.attempt import Attempt, is_replaced
from cluster.beat import beat_path, write_beat
from cluster.checkpoint_writer import CheckpointWriter
from cluster.clock import Clock
from cluster.events import EventLog
from cluster.stop import StopRequest
from cluster.watchdog import Watchdog
from cluster.world import World
from launch import runfolder
from launch.config import TrainConfig

LAST_CHECKPOINT_S = 30.0  # what a checkpoint on its way to the disk may still take
LAST_LINES_S = 5.0
LOOK_EVERY = 5  # ticks between two looks for a newer attempt, which a shared folder has to answer


class Guard:
    """One rank's guard. All but its making happens in the watchdog's thread."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        attempt: Attempt,
        stop: StopRequest,
        clock: Clock,
        log: EventLog,
        appender: Appender,
    ) -> None:
        self._config, self._world, self._attempt = config, world, attempt
        self._stop, self._clock, self._log, self._appender = stop, clock, log, appender
        self.saver: CheckpointWriter | None = None  # once there is one
        self._ticks = 0

    def watchdog(self) -> Watchdog:
        """The watchdog that asks this guard."""
        stacks = self._config.log_path / runfolder.STACKS / f"attempt-{self._attempt.number:04d}"
        return Watchdog(self._world, self._clock, self._config.watch.hang_seconds, stacks, self._look, self._farewell)

    def _look(self) -> str | None:
        """A reason to end at once; and rank 0 leaves a sign of life."""
        run, grace_s = self._config.log_path, self._config.watch.grace_seconds
        if self._stop.is_overdue(grace_s):
            return f"asked to stop by {self._stop.reason}, and not done --grace_seconds {grace_s:g} later"
        if self._world.rank:
            return None
        write_beat(beat_path(run / runfolder.EVENTS, self._attempt.number), self._clock)
        self._ticks += 1
        if self._ticks % LOOK_EVERY == 0 and is_replaced(run / runfolder.ATTEMPTS, self._attempt):
            return f"{run}: a newer attempt trains this run; this one ends (to run both, give each its own --log_path)"
        return None

    def _farewell(self, reason: str) -> None:
        stood_still = {"bucket": self._clock.place.bucket, "idle_s": self._clock.idle_s()}
        if self.saver:
            self.saver.wait(LAST_CHECKPOINT_S)
        self._log.record(self._log.instant("ended", {"reason": reason, **stood_still}))
        self._appender.close(LAST_LINES_S)
