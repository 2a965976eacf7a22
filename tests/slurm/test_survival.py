"""What jobs live through on a real cluster. Afterwards the audit proves every sample, and the losses are those of a run
that nothing happened to."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import faults, nodes
from tests.slurm.cluster.bringup import start_slurmctld
from tests.slurm.cluster.nodes import PROJECT
from tests.slurm.cluster.processes import wait_until
from tests.slurm.training import EVERY, SCRIPT, STEPS, attempts, losses, proven, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def truth(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the same training on one process, undisturbed."""
    run = tmp_path_factory.mktemp("truth") / "run"
    command = [sys.executable, "-m", "launch", "train", "--recipe", "demo", "--data_path", str(shards)]
    command += ["--log_path", str(run), "--max_steps", str(STEPS), "--batch_size", "8", "--log_every", "1"]
    command += ["--lr", "1e-5", "--num_workers", "1"]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    return losses(run)


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[tuple[str, float]]]:
    """Seconds from each fault to the next step that had not been done before; told at the end (`pytest -n 0 -s`)."""
    rows: list[tuple[str, float]] = []
    yield rows
    if terminal := request.config.pluginmanager.getplugin("terminalreporter"):
        terminal.write_line("")
        for what, seconds in rows:
            terminal.write_line(f"| {what} | {seconds:.1f} s |")


def test_preempted_it_saves_and_comes_back(cluster, tmp_path, shards, truth, table, capsys) -> None:
    training = start(cluster, tmp_path, shards, "--partition=low", "--nodes=4")
    training.wait_for_step(EVERY + 3)
    fault = time.monotonic()
    urgent = cluster.sbatch(
        "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1", cwd=tmp_path
    )
    cluster.wait_for_state(urgent, "COMPLETED")
    training.wait_for_start(1)
    table.append(("preempted by a job of higher priority, with a grace time", training.wait_for_next_step(fault)))
    training.wait_for_end()
    again = cluster.output(training.job).count("has ended well before, and Slurm queued it once more")
    assert cluster.job(training.job)["Restarts"] == str(1 + again)
    assert again <= (" 22." not in cluster.run(["scontrol", "--version"]).stdout)  # a fault of newer Slurms
    _, second = attempts(training.run)
    # It has saved the step at which it was asked, and not merely gone back to the last checkpoint.
    assert second["restored_step"] >= EVERY + 3
    assert not (training.run / "stopped").exists()
    assert not (training.run / "running").exists()
    proven(training, truth, capsys)


def test_near_its_time_limit_it_saves_and_comes_back_up_to_a_cap(cluster, tmp_path, shards, truth, table, capsys):
    """The signal that --signal=B:USR1@120 sends; Slurm looks at time limits too seldom for a test."""
    training = start(cluster, tmp_path, shards, "--nodes=2", environment={"NSI_MAX_RESTARTS": "1"})
    ask = ["scancel", "--batch", "--signal=USR1", str(training.job)]
    training.wait_for_step(5)
    fault = time.monotonic()
    cluster.run(ask)
    training.wait_for_start(1)
    table.append(("time limit near", training.wait_for_next_step(fault)))
    cluster.run(ask)
    cluster.wait_for_state(training.job, "FAILED")
    assert "and it has come back 1 times; set NSI_MAX_RESTARTS higher" in cluster.output(training.job)
    # The same line again goes on from there.
    again = start(cluster, tmp_path, shards, "--nodes=1")
    again.wait_for_end(restarts=0)
    assert [each["world_size"] for each in attempts(again.run)] == [2, 2, 1]
    proven(again, truth, capsys)


def test_a_node_loses_power_and_fewer_go_on(apart, tmp_path, shards, truth, table, capsys) -> None:
    # Somebody else keeps the node that could take the place of the lost one.
    other = apart.sbatch("--nodelist=node04", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1000", cwd=tmp_path)
    apart.wait_for_state(other, "RUNNING")
    training = start(apart, tmp_path, shards, "--nodes=2-4")
    training.wait_for_step(EVERY + 3)
    fault = time.monotonic()
    lost = apart.job(training.job)["NodeList"]
    faults.power_off(apart, "node02")
    training.wait_for_start(1)
    table.append(("a node loses power, fewer nodes go on", training.wait_for_next_step(fault)))
    training.wait_for_end(restarts=1)
    assert lost == "node[01-03]"
    assert [each["world_size"] for each in attempts(training.run)] == [3, 2]
    proven(training, truth, capsys)


@pytest.mark.long
def test_a_node_loses_power_and_others_go_on(apart, tmp_path, shards, truth, table, capsys) -> None:
    training = start(apart, tmp_path, shards, "--nodes=2", "--ntasks-per-node=2")
    training.wait_for_step(EVERY + 3)
    fault = time.monotonic()
    faults.power_off(apart, "node01")  # the one that runs the script, and rank 0
    training.wait_for_start(1)
    table.append(("a node loses power, others go on", training.wait_for_next_step(fault)))
    training.wait_for_end(restarts=1)
    assert [each["world_size"] for each in attempts(training.run)] == [4, 4]
    proven(training, truth, capsys)


def test_a_node_is_cut_off_and_lives_on(apart, tmp_path, shards, truth, table, capsys) -> None:
    """Its attempt trains on for itself, sees the same folder, and must not harm its successor."""
    training = start(apart, tmp_path, shards, "--nodes=1")
    training.wait_for_step(EVERY + 3)
    [isolated] = faults.ranks(apart, training.job).values()
    isolated.send(signal.SIGSTOP)  # or it would be done long before Slurm misses the node
    fault = time.monotonic()
    faults.cut(apart, "node01")
    training.wait_for_start(1)
    apart.wait_for(lambda: len(attempts(training.run)) == 2, 60, "the second attempt")
    isolated.send(signal.SIGCONT)
    table.append(("a node is cut off, and trains on when others do already", training.wait_for_next_step(fault)))
    apart.wait_for(lambda: not isolated.alive(), 60, "the attempt that was replaced has ended")
    faults.heal(apart, "node01")
    # Once more where Slurm takes the end of the old step for that of the new one, which has its number.
    training.wait_for_end()
    assert len(attempts(training.run)) in (2, 3)
    assert "a newer attempt trains this run" in training.story()
    # The node has let go of the job, or it would be drained should the job have come there again.
    apart.wait_for(lambda: set(apart.nodes().values()) == {"idle"}, 60, "nothing is held against the node")
    proven(training, truth, capsys)


def test_a_second_job_on_the_same_run_ends_the_first(cluster, tmp_path, shards, truth, capsys) -> None:
    """For good: else each would come back and end the other for ever."""
    first = start(cluster, tmp_path, shards, "--nodes=1")
    first.wait_for_step(EVERY + 3)
    [rank] = faults.ranks(cluster, first.job).values()
    rank.send(signal.SIGSTOP)  # or it would be done before the second begins
    second = start(cluster, tmp_path, shards, "--nodes=1")
    cluster.wait_for(lambda: len(attempts(second.run)) == 2, 60, "the second job's attempt")
    rank.send(signal.SIGCONT)
    cluster.wait_for_state(first.job, "FAILED")
    assert f"another start trains {first.run} now (2 {second.job}: attempt, job)" in cluster.output(first.job)
    second.wait_for_end(restarts=0)
    assert cluster.job(first.job)["Restarts"] == "0"
    proven(second, truth, capsys)


@pytest.mark.long
def test_slurm_itself_tells_of_the_time_limit(cluster, tmp_path, shards) -> None:
    """It looks at time limits every half minute or so."""
    # What is given behind the script's name counts twice: the last one wins.
    flags = ("--max_steps", "100000", "--batch_size", "48")
    training = start(cluster, tmp_path, shards, "--nodes=1", "--time=3", "--signal=B:USR1@150", flags=flags)
    training.wait_for_start(1, seconds=180)
    training.wait_for_next_step(time.monotonic())
    cluster.run(["scancel", str(training.job)])
    first, second = attempts(training.run)
    assert second["restored_step"] > first["restored_step"] == 0
    assert f"stopped at step {second['restored_step']}, before its end" in cluster.output(training.job)


def test_a_rank_is_killed(cluster, tmp_path, shards, truth, table, capsys) -> None:
    training = start(cluster, tmp_path, shards, "--nodes=2")
    training.wait_for_step(EVERY + 3)
    fault = time.monotonic()
    faults.kill_rank(cluster, training.job, 1)
    training.wait_for_start(1)
    table.append(("one rank is killed", training.wait_for_next_step(fault)))
    training.wait_for_end(restarts=1)
    assert "a rank died or hung" in cluster.output(training.job)
    proven(training, truth, capsys)


@pytest.mark.long
def test_nobody_notices_that_slurmctld_restarts(cluster, tmp_path, shards, truth, table, capsys) -> None:
    training = start(cluster, tmp_path, shards, "--nodes=2", "--ntasks-per-node=1", "--gpus-per-task=1")
    training.wait_for_step(5)
    fault = time.monotonic()
    faults.restart_slurmctld(cluster)
    table.append(("slurmctld restarts", training.wait_for_next_step(fault)))
    training.wait_for_end(restarts=0)
    assert len(attempts(training.run)) == 1
    proven(training, truth, capsys)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        (("--nodes=2-4", "--ntasks-per-node=2"), 8),  # Slurm leaves it to the job to count these
        (("--nodes=2", "--ntasks-per-node=2"), 4),
        (("--nodes=2-3",), 3),
        (("--ntasks=3",), 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_as_many_ranks_as_were_asked_for(cluster, tmp_path, shards, options: tuple[str, ...], ranks: int) -> None:
    rank = tmp_path / "rank"
    rank.write_text(f'#!/bin/bash\ntouch "{tmp_path}/$SLURM_PROCID-of-$SLURM_NTASKS"\n')
    rank.chmod(0o755)
    training = start(cluster, tmp_path, shards, *options, environment={"NSI_PYTHON": str(rank), "NSI_DOCTOR": "0"})
    cluster.wait_for_state(training.job, "COMPLETED")
    found = {path.name for path in tmp_path.glob("*-of-*")}
    assert found == {f"{number}-of-{ranks}" for number in range(ranks)}


def test_a_job_that_gets_nowhere_ends(cluster, tmp_path, shards) -> None:
    """Each start dies before its first checkpoint, as of a fault that comes back with every start."""
    dies = tmp_path / "dies"
    dies.write_text('#!/bin/bash\nmkdir -p "$RUN"; echo "1 $SLURM_JOB_ID" >"$RUN/running"; kill -9 $$\n')
    dies.chmod(0o755)
    environment = {"NSI_PYTHON": str(dies), "NSI_DOCTOR": "0", "RUN": str(tmp_path / "run")}
    training = start(cluster, tmp_path, shards, "--nodes=1", environment=environment)
    for restart in (1, 2, 3):
        training.wait_for_start(restart)
    cluster.wait_for_state(training.job, "FAILED")
    assert cluster.job(training.job)["Restarts"] == "3"
    assert "three restarts without a new checkpoint (newest: none)" in cluster.output(training.job)


def test_a_bad_node_is_named_and_left_out(apart, tmp_path, shards, truth, capsys) -> None:
    """It does not see the folder that the others share."""
    run = tmp_path / "run"
    run.mkdir()
    inside = ["nsenter", "--target", str(nodes.first_process(apart.place, "node02").pid), "--mount"]
    apart.run([*inside, "mount", "-t", "tmpfs", "none", str(run)])
    try:
        training = start(apart, tmp_path, shards, "--nodes=3")
        training.wait_for_start(1)
        training.wait_for_end(restarts=1)
    finally:
        apart.run([*inside, "umount", str(run)])
    assert "left out node02" in apart.output(training.job)
    assert apart.job(training.job)["ExcNodeList"] == "node02"
    assert apart.job(training.job)["NodeList"] == "node[01,03-04]"
    assert [each["world_size"] for each in attempts(run)] == [3]  # nothing was begun with the bad node
    proven(training, truth, capsys)


@pytest.mark.parametrize("launcher", ["deepspeed", "pdsh"])
def test_deepspeed_starts_it_under_srun_and_over_ssh(cluster, tmp_path, shards, launcher: str) -> None:
    options = ("--nodes=2", "--gpus-per-node=2")
    flags = ("--max_steps", "5")
    training = start(cluster, tmp_path, shards, *options, flags=flags, environment={"NSI_LAUNCHER": launcher})
    training.wait_for_end(restarts=0)
    assert [each["world_size"] for each in attempts(training.run)] == [4]
    assert sorted(losses(training.run)) == [1, 2, 3, 4, 5]


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["deepspeed", "pdsh", "torchrun"])
def test_other_launchers_save_and_come_back(cluster, tmp_path, shards, truth, capsys, launcher: str) -> None:
    training = start(
        cluster, tmp_path, shards, "--nodes=2", "--gpus-per-node=2", environment={"NSI_LAUNCHER": launcher}
    )
    training.wait_for_step(5)
    assert (training.run / "running").read_text() == f"1 {training.job}\n"  # or it would not come back if a rank died
    cluster.run(["scancel", "--batch", "--signal=USR1", str(training.job)])
    training.wait_for_start(1)
    training.wait_for_end(restarts=1)
    assert not (training.run / "stop").exists()
    assert [each["world_size"] for each in attempts(training.run)] == [4, 4]
    proven(training, truth, capsys)


def test_shards_are_staged_and_removed(cluster, tmp_path, shards, truth, capsys) -> None:
    scratch = cluster.place.scratch
    environment = {"NSI_STAGE": "1", "NSI_SCRATCH": str(scratch)}
    training = start(cluster, tmp_path, shards, "--nodes=2", "--gpus-per-node=2", environment=environment)
    training.wait_for_step(1)
    copies = {
        path.name: path.read_bytes()
        for path in (cluster.place.own("node02") / "scratch" / f"nsi-{training.job}").rglob("train-*.tar")
    }
    training.wait_for_end(restarts=0)
    assert copies
    assert all(content == (shards / name).read_bytes() for name, content in copies.items())
    assert not list((cluster.place.own("node02") / "scratch").iterdir())
    proven(training, truth, capsys)


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        (["--time=2"], {}, "s are left until the job's end, and the last 120 are for saving; ask for more with --time"),
        ([], {"NSI_LAUNCHER": "mpirun"}, "NSI_LAUNCHER=mpirun: must be srun, deepspeed, torchrun or pdsh"),
        ([], {"NSI_STAGE": "1"}, "NSI_STAGE=1, but no NSI_SCRATCH; name a folder on the nodes' own disks"),
        ([], {"NSI_SITE": "/nowhere"}, "NSI_SITE=/nowhere: no such file; copy slurm/site.example.sh there and edit it"),
        ([], {"NSI_PYTHON": "/nowhere"}, "NSI_PYTHON=/nowhere: no such program"),
    ],
    ids=["time", "launcher", "scratch", "site", "python"],
)
def test_what_is_wrong_is_said_in_one_line(cluster, tmp_path, options, environment, said) -> None:
    training = start(cluster, tmp_path, tmp_path / "none", "--nodes=1", *options, environment=environment)
    cluster.wait_for_state(training.job, "FAILED")
    [line] = [each for each in cluster.output(training.job).splitlines() if "slurmstepd" not in each]
    assert line.startswith("train.sbatch: ")
    assert said in line


def test_asked_to_stop_before_training_began_it_comes_back(cluster, tmp_path, shards) -> None:
    training = start(cluster, tmp_path, shards, "--nodes=1")
    cluster.wait_for(lambda: (training.run / "doctor").is_dir(), 60, "the nodes are being examined")
    cluster.run(["scancel", "--batch", "--signal=USR1", str(training.job)])
    training.wait_for_end(restarts=1)
    assert "asked to stop before training began; back to the queue" in cluster.output(training.job)


@pytest.mark.long
def test_asked_to_stop_while_nobody_schedules_it_comes_back(cluster, tmp_path, shards, truth, capsys) -> None:
    training = start(cluster, tmp_path, shards, "--nodes=2")
    training.wait_for_step(5)
    faults.stop_slurmctld(cluster)
    (training.run / "stop").write_text("requeue")
    wait_until((training.run / "stopped").exists, 60, training.story)
    time.sleep(3)  # in which the script finds nobody
    start_slurmctld(cluster.place)
    training.wait_for_end(restarts=1)
    proven(training, truth, capsys)


def test_cancelled_it_ends_for_good(cluster, tmp_path, shards) -> None:
    training = start(cluster, tmp_path, shards, "--nodes=2", flags=("--max_steps", "100000"))
    saved = training.run / "checkpoints" / f"step-{EVERY:08d}" / "complete.json"
    cluster.wait_for(saved.exists, 90, "the first checkpoint")
    cluster.run(["scancel", str(training.job)])
    cluster.wait_for_state(training.job, "CANCELLED")
    cluster.wait_for(lambda: set(cluster.nodes().values()) == {"idle"}, 60, "its processes are gone")
    record = cluster.job(training.job)  # and not back in the queue, though the ranks may have had the time to save
    assert (record["JobState"], record["Restarts"]) == ("CANCELLED", "0")


def test_without_its_folders_it_says_so(cluster, tmp_path) -> None:
    job = cluster.sbatch("--nodes=1", SCRIPT, "--recipe", "demo", cwd=tmp_path)
    cluster.wait_for_state(job, "FAILED")
    assert cluster.output(job) == "train.sbatch: give --data_path SHARDS --log_path RUN behind the script's name\n"


def test_what_is_not_there_ends_the_job(cluster, tmp_path) -> None:
    """Neither shards nor, on nodes without internet, the weights."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    training = start(
        cluster, tmp_path, tmp_path / "none", "--nodes=2", flags=("--backbone", "vit_tiny_patch16_224"),
        environment=offline,
    )  # fmt: skip
    cluster.wait_for_state(training.job, "FAILED")
    said = cluster.output(training.job)
    assert "BAD   data" in said
    assert str(tmp_path / "none") in said
    assert "BAD   weights    --backbone vit_tiny_patch16_224: its weights are not in" in said
    assert cluster.job(training.job)["Restarts"] == "0"


def test_a_host_that_pdsh_would_not_find_is_named(apart, tmp_path, shards) -> None:
    """A node by a name that rank 0's node cannot resolve."""
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    inside = ["nsenter", "--target", str(nodes.first_process(apart.place, "node01").pid), "--mount", "--pid"]
    apart.run([*inside, "mount", "--bind", str(tmp_path / "hosts"), "/etc/hosts"])
    try:
        environment = {"NSI_LAUNCHER": "pdsh", "NSI_DOCTOR": "0"}
        training = start(apart, tmp_path, shards, "--nodelist=node[01-02]", environment=environment)
        apart.wait_for_state(training.job, "FAILED")
    finally:
        apart.run([*inside, "umount", "/etc/hosts"])
    [line] = [each for each in apart.output(training.job).splitlines() if each.startswith("train.sbatch: ")]
    hostfile = training.run / "slurm" / f"{training.job}.hostfile"
    assert line == f"train.sbatch: {hostfile}: node01 knows no host node01; pdsh cannot reach it"
