"""What a person does on the cluster's login host: submits, looks, waits."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.cluster.config import Place
from tests.slurm.cluster.processes import wait_until

ENDS = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "PREEMPTED", "TIMEOUT"}


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up."""

    place: Place

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes'."""
        return self.place.names

    def run(
        self,
        command: list[str],
        *,
        cwd: Path | None = None,
        seconds: float = 60,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A command on the login host. A failure tells what the command said."""
        whole = {**login_environment(self.place), **(environment or {})}
        done = subprocess.run(command, cwd=cwd, env=whole, capture_output=True, text=True, timeout=seconds)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def sbatch(
        self, *arguments: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> int:
        """Submits, and returns the job's id."""
        command = ["sbatch", "--parsable", *map(str, arguments)]
        return int(self.run(command, cwd=cwd, environment=environment).stdout.split(";")[0])

    def job(self, job: int | str) -> dict[str, str]:
        """Slurm's record of a job, which it keeps for an hour: JobState, Restarts, NodeList, ..."""
        said = self.run(["scontrol", "show", "job", "--oneliner", str(job)]).stdout.splitlines()[0]
        return dict(re.findall(r"(\S+?)=(.*?)(?= [\w/:]+=|\s*$)", said))

    def state(self, job: int | str) -> str:
        """One word."""
        return self.job(job)["JobState"]

    def output(self, job: int | str) -> str:
        """What the script wrote so far."""
        path = Path(self.job(job)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, holds: Callable[[], object], seconds: float, what: str) -> None:
        """Until something holds; tells what the cluster looks like when it takes too long."""
        wait_until(holds, seconds, lambda: f"{what}: not so\n{self.scene()}")

    def wait_for_state(self, job: int | str, *states: str, seconds: float = 60) -> dict[str, str]:
        """Until a job is in one of these states. One that ended otherwise is not waited for."""
        self.wait_for(lambda: self.state(job) in {*states, *ENDS}, seconds, f"job {job} {' or '.join(states)}")
        record = self.job(job)
        assert record["JobState"] in states, f"{record}\n{self.output(job)}\n{self.scene()}"
        return record

    def start_now(self, job: int | str, seconds: float = 30) -> None:
        """Lets go of a job that goes back to the queue, and that Slurm would hold there for two minutes."""
        # A second later, since a node refuses a job that it began to end in this same second.
        update = ["scontrol", "update", f"JobId={job}", "StartTime=now+1"]
        # It may still be completing, and refuses until it is pending.
        self.wait_for(
            lambda: self.state(job) == "PENDING" and self.run(update, check=False).returncode == 0,
            seconds,
            f"job {job} back in the queue",
        )

    def nodes(self) -> dict[str, str]:
        """What Slurm says of each node: idle, mixed, allocated, down*, ..."""
        said = self.run(["sinfo", "--noheader", "--Node", "--format=%N %T"], check=False).stdout
        return dict(line.split() for line in said.splitlines())

    def jobs(self) -> list[str]:
        """Those that have not ended."""
        return self.run(["squeue", "--noheader", "--format=%i"]).stdout.split()

    def scene(self) -> str:
        """For a person who looks at a failure."""
        shown = [self.run([each], check=False).stdout for each in ("squeue", "sinfo")]
        log = self.place.log.read_text() if self.place.log.exists() else "slurmctld wrote nothing"
        return "\n".join([*shown, *log.splitlines()[-25:]])


def login_environment(place: Place) -> dict[str, str]:
    """A shell's on the login host. Of a job that we may run in ourselves nothing goes along."""
    slurms = re.compile("(SLURM|SBATCH|SRUN|SALLOC|SQUEUE|SINFO)_")
    return {
        **{key: value for key, value in os.environ.items() if not slurms.match(key)},
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",  # where the daemons are
        "SLURM_CONF": str(place.folder / "slurm.conf"),
        "PDSH_RCMD_TYPE": "ssh",
        "PDSH_SSH_ARGS_APPEND": f"-F {place.folder}/ssh/config",
    }
