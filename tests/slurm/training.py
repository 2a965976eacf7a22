"""A training on the cluster by slurm/train.sbatch, and what must hold of it whatever happened on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.cli import run as nsi
from launch.runfolder import METRICS, read_lines, standing_lines
from tests.slurm.cluster.commands import ENDS, Cluster
from tests.slurm.cluster.nodes import PROJECT

SCRIPT = PROJECT / "slurm" / "train.sbatch"
STEPS, EVERY = 120, 10


@dataclass(frozen=True)
class Training:
    """A job that trains."""

    cluster: Cluster
    job: int
    run: Path

    @property
    def step(self) -> int:
        """How far it has come."""
        return max((line["step"] for line in read_lines(self.run, METRICS)), default=0)

    def wait_for_step(self, step: int, seconds: float = 90) -> None:
        """Until so many steps are done and logged."""
        self.cluster.wait_for(lambda: self.step >= step or self.is_over(), seconds, f"step {step} of job {self.job}")
        assert self.step >= step, self.story()

    def wait_for_next_step(self, since: float) -> float:
        """Until a step is done that had not been done before; returns how long after `since` that was."""
        self.wait_for_step(self.step + 1)
        return time.monotonic() - since

    def wait_for_start(self, restart: int, seconds: float = 60) -> None:
        """Until the job runs for the so-manieth time after its first."""
        self._wait(lambda record: record["JobState"] == "RUNNING" and record["Restarts"] == str(restart), seconds)

    def is_over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.cluster.state(self.job) in ENDS

    def wait_for_end(self, restarts: int | None = None, seconds: float = 120) -> None:
        """Until it is COMPLETED, after so many restarts if told."""
        self._wait(lambda record: record["JobState"] in ENDS, seconds)
        record = self.cluster.job(self.job)
        assert record["JobState"] == "COMPLETED", self.story()
        assert restarts is None or record["Restarts"] == str(restarts), self.story()

    def _wait(self, holds: Callable[[dict[str, str]], bool], seconds: float) -> None:
        """Until something holds of the job's record. The job need not wait two minutes whenever it is queued again."""
        released = 0.0

        def look() -> bool:
            nonlocal released
            record = self.cluster.job(self.job)
            back = record["JobState"] == "PENDING" and record["Restarts"] != "0"
            if back and time.monotonic() - released > 6:
                # Not at once: nodes refuse for a second what they have just been told to end.
                self.cluster.run(["scontrol", "update", f"JobId={self.job}", "StartTime=now+2"], check=False)
                released = time.monotonic()
            return holds(record)

        try:
            self.cluster.wait_for(look, seconds, f"job {self.job}")
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None

    def story(self) -> str:
        """What the script and the ranks said."""
        logs = sorted((self.run.parent / "logs").glob(f"{self.job}-*.log"))
        said = [f"{path.name}: {path.read_text(errors='replace')[-2000:]}" for path in logs]
        return "\n".join([self.cluster.output(self.job), *said])


def start(
    cluster: Cluster,
    folder: Path,
    shards: Path,
    *options: str,
    flags: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> Training:
    """Submits a training; `options` are Slurm's, `flags` those of `nsi train`."""
    run = folder / "run"
    arguments = ["--recipe", "demo", "--data_path", shards, "--log_path", run, "--max_steps", STEPS, "--batch_size", 8]
    # At this rate trainings that round otherwise stay together.
    arguments += ["--checkpoint_every", EVERY, "--log_every", 1, "--lr", 1e-5, "--num_workers", 1, *flags]
    job = cluster.sbatch(*options, SCRIPT, *map(str, arguments), cwd=folder, environment=environment)
    return Training(cluster, job, run)


def losses(run: Path) -> dict[int, float]:
    """The loss of each step that counts."""
    return {line["step"]: line["loss"] for line in standing_lines(run, METRICS)}


def proven(training: Training, truth: dict[int, float], capsys: pytest.CaptureFixture[str]) -> None:
    """Every sample was read exactly once an epoch, and each step's loss is that of the run that nothing befell."""
    assert nsi(["audit", str(training.run)]) == 0, capsys.readouterr().err
    found = losses(training.run)
    assert found.keys() == truth.keys()
    assert found == pytest.approx(truth, rel=1e-5)


def attempts(run: Path) -> list[dict]:
    """The run's starts."""
    return [json.loads(path.read_text()) for path in sorted((run / "attempts").glob("*.json"))]
