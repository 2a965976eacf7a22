"""`nsi submit` on a real cluster: a job from the line to its end, and what the cluster refuses in one clear line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.runfolder import METRICS, read_lines
from tests.launch.outside import contents, done, nsi, refused
from tests.slurm.cluster.commands import Cluster, login_environment

SLURM = Path(__file__).parents[2] / "slurm"
TRAIN = SLURM / "train.sbatch"


@pytest.fixture
def login(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, while this process stands on its login host in a folder of its own; its site has no settings."""
    for name, value in login_environment(cluster.place).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "site.sh").touch()
    monkeypatch.setenv("NSI_SITE", str(tmp_path / "site.sh"))
    monkeypatch.chdir(tmp_path)
    return cluster


@pytest.fixture
def limited(login: Cluster) -> Iterator[Cluster]:
    """Its partition low ends jobs after ten minutes."""
    login.run(["scontrol", "update", "PartitionName=low", "MaxTime=10", "DefaultTime=2"])
    yield login
    login.run(["scontrol", "update", "PartitionName=low", "MaxTime=INFINITE", "DefaultTime=30"])


def training(shards: Path, steps: int = 4) -> list[object]:
    flags = {"--data_path": shards, "--log_path": "run", "--recipe": "demo", "--batch_size": 8, "--max_steps": steps}
    return [TRAIN, *(word for flag in flags.items() for word in flag)]


def job_number(told: str, place: int = 0) -> int:
    return int(re.findall(r"^job (\d+) ", told, re.MULTILINE)[place])


def told_error(*arguments: object) -> str:
    """The line that refuses a job, without the warnings before it: these folders lie in /tmp."""
    said = nsi("submit", *arguments)
    assert said.status == 1, said
    assert not said.out
    *warnings, last = said.err.splitlines()
    assert all("is each node's own" in line for line in warnings)
    assert last.startswith("nsi submit: ")
    return last


def test_a_training_its_figures_and_its_report(login: Cluster, tmp_path: Path, shards: Path) -> None:
    told = done(nsi("submit", "--nodes=2", "--cpus-per-task=2", "--time=10", *training(shards)))
    job = job_number(told)
    assert f"{tmp_path}/slurm-{job}.out" in told
    assert f"{tmp_path}/logs/{job}-RANK.log" in told
    assert f"squeue --job={job}" in told
    login.wait_for_state(job, "COMPLETED")
    assert (tmp_path / "logs" / f"{job}-1.log").exists()
    assert read_lines(tmp_path / "run", METRICS)
    after = done(nsi("submit", "--cpus-per-task=2", SLURM / "eval.sbatch", "run", "--split", "test"))
    login.wait_for_state(job_number(after), "COMPLETED")
    assert (tmp_path / "run" / "eval-test.json").exists()
    assert "eval-test.json" in (tmp_path / "run" / "report.html").read_text()


def test_parts_and_their_merge(login: Cluster, tmp_path: Path, scenes: Path, shards: Path) -> None:
    words = ["--array=1-2", "--cpus-per-task=2", SLURM / "shard.sbatch", scenes, "out", "--shard_samples", 10]
    told = done(nsi("submit", "--output=part-%a.out", *words))
    merge = job_number(told, 1)
    login.wait_for_state(merge, "COMPLETED")
    assert contents(tmp_path / "out") == contents(shards)
    assert (tmp_path / "part-2.out").exists()
    assert "all as they were written" in login.output(merge)


def test_the_site_says_where(login: Cluster, tmp_path: Path) -> None:
    (tmp_path / "site.sh").write_text('NSI_PARTITION="${NSI_PARTITION:-low}"\n')
    told = done(nsi("submit", "--hold", SLURM / "monitor.sbatch", "run"))
    assert login.job(job_number(told))["Partition"] == "low"
    told = done(nsi("submit", "--hold", "-p", "high", SLURM / "monitor.sbatch", "run"))
    assert login.job(job_number(told))["Partition"] == "high"


def test_a_test_submits_nothing(login: Cluster, shards: Path) -> None:
    told = done(nsi("submit", "--test-only", "--nodes=2", *training(shards)))
    assert " to start at " in told
    assert login.jobs() == []


def test_waiting_ends_as_the_job_does(login: Cluster, tmp_path: Path) -> None:
    (tmp_path / "own.sbatch").write_text("#!/bin/bash\nexit 3\n")
    said = nsi("submit", "--wait", "--parsable", "own.sbatch")
    assert (said.status, login.job(said.out.strip())["JobState"]) == (3, "FAILED")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--partition=nope"], "no partition 'nope' here; there are main (the default), low, high: give one of them"),
        (["--gpus-per-node=3"], "main has 4 nodes with at most 8 CPUs, 16000 MB and 2 GPUs each; ask for less"),
        (["--nodes=5"], "main has 4 nodes with at most 8 CPUs, 16000 MB and 2 GPUs each; ask for less"),
        (["--constraint=fast"], "--constraint fast: Invalid feature specification"),
        (["--gres=disk:1"], "--gres disk:1: Invalid generic resource"),
        (["--nodelist=node99"], "Invalid node name specified; `sinfo -N` lists the nodes"),
        (["--bogus"], "unrecognized option '--bogus'"),
        (["--time=soon"], "Invalid --time specification"),
        (["--time=2"], "--time 2: the last 120 s are for saving; give at least --time=0:03:00"),
        (["--signal=B:USR1@600", "--time=10"], "the last 600 s are for saving; give at least --time=0:11:00"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_cluster_cannot_do_is_one_line(login: Cluster, shards: Path, options: list[str], text: str) -> None:
    assert text in told_error(*options, *training(shards))
    assert login.jobs() == []


def test_a_partition_may_be_too_short(limited: Cluster, shards: Path) -> None:
    line = told_error("-p", "low", "--time=20", *training(shards))
    assert line == "nsi submit: --time 20: partition low allows 0:10:00 at most; ask for less"
    line = told_error("-p", "low", *training(shards))
    assert "no --time, and the partition's own is 0:02:00: the last 120 s are for saving; give at least" in line
    assert limited.jobs() == []


def test_a_controller_that_is_down_is_one_line(
    login: Cluster, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (login.place.folder / "slurm.conf").read_text()
    # Another controller's port, where nobody listens.
    (tmp_path / "slurm.conf").write_text(re.sub("SlurmctldPort=.*", f"SlurmctldPort={login.place.port + 99}", settings))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    assert "Slurm's controller does not answer" in told_error(*training(shards))


def test_an_unset_variable_is_one_line(login: Cluster) -> None:
    assert "is a variable unset?" in refused(nsi("submit", TRAIN, "--data_path", "", "--log_path", "run"), 2)
    assert "is a variable unset?" in refused(nsi("submit", SLURM / "eval.sbatch"), 2)
    assert "is a variable unset?" in refused(nsi("submit", SLURM / "monitor.sbatch"), 2)
    assert "is a variable unset?" in told_error(SLURM / "shard.sbatch")
    assert login.jobs() == []
