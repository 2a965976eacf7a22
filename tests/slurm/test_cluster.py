"""The cluster that other tests stand on is real: its nodes are apart, die, return, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import faults, packages, places
from tests.slurm.cluster.bringup import clean, down, up
from tests.slurm.cluster.commands import Cluster
from tests.slurm.cluster.config import Layout
from tests.slurm.cluster.nodes import PROJECT
from tests.slurm.cluster.processes import Process, below, recorded, start, wait_until

TWO = Layout(nodes=2)


@pytest.fixture
def second() -> Iterator[Cluster]:
    """Another cluster on the same machine."""
    cluster = up(TWO)
    yield cluster
    down(cluster.place.folder)


def interfaces() -> list[str]:
    return os.listdir("/sys/class/net")


def sleeper(cluster: Cluster, tmp_path: Path, *options: str) -> int:
    """A job with a step on each node that would take very long, and that SIGTERM does not end."""
    script = """trap '' TERM; srun bash -c "trap '' TERM; exec sleep 1000"; sleep 1000"""
    command = ["--wrap", script, "--requeue", "--output", str(tmp_path / "%j.out"), *options]
    job = cluster.sbatch(*command, cwd=tmp_path)
    cluster.wait_for_state(job, "RUNNING")
    return job


def test_four_nodes_are_idle(cluster: Cluster) -> None:
    assert len(cluster.names) == 4
    assert set(cluster.nodes().values()) == {"idle"}


def test_a_step_runs_on_every_node(cluster: Cluster) -> None:
    said = cluster.run(["srun", "--nodes=4", "printenv", "SLURMD_NODENAME"]).stdout
    assert sorted(said.split()) == list(cluster.names)


def test_a_node_has_its_own_name_and_address(apart: Cluster) -> None:
    said = apart.run(["srun", "--nodes=4", "--label", "sh", "-c", "hostname; ip -4 address show eth0"]).stdout
    for number, node in enumerate(apart.names):
        mine = [line.partition(": ")[2] for line in said.splitlines() if line.startswith(f"{number}:")]
        assert mine[0] == node
        assert f"inet {apart.place.address(node)}/24 " in "\n".join(mine)


def test_a_node_has_its_own_memory_and_scratch(apart: Cluster) -> None:
    everywhere, scratch = ["srun", "--nodes=4", "sh", "-c"], str(apart.place.scratch)
    apart.run([*everywhere, 'touch "/dev/shm/of-$(hostname)" "$0/of-$(hostname)"', scratch])
    seen = apart.run([*everywhere, 'echo $(hostname) /dev/shm/of-* "$0"/of-*', scratch]).stdout
    assert sorted(seen.splitlines()) == [f"{node} /dev/shm/of-{node} {scratch}/of-{node}" for node in apart.names]


def test_a_node_that_boots_anew_is_reached_at_once(apart: Cluster) -> None:
    """Others still have its hardware address, and would ask for another only after more seconds than these."""
    first, *_, last = apart.names
    call = f"timeout 3 bash -c '</dev/tcp/{apart.place.address(last)}/{apart.place.port + len(apart.names)}'"
    apart.run(["srun", f"--nodelist={first}", "bash", "-c", call])
    faults.power_off(apart, last)
    faults.power_on(apart, last)
    apart.run(["srun", f"--nodelist={first}", "bash", "-c", call])


def test_gpus_are_given_out_by_number(cluster: Cluster) -> None:
    said = cluster.run(["srun", "--nodes=2", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES"]).stdout
    assert said.split() == ["0,1", "0,1"]
    refused = cluster.run(["srun", "--nodes=1", "--gpus-per-node=3", "true"], check=False)
    assert refused.returncode != 0


@pytest.mark.slow
@pytest.mark.long
def test_a_job_of_a_higher_partition_sends_a_lower_one_back(cluster: Cluster, tmp_path: Path) -> None:
    low = sleeper(cluster, tmp_path, "--partition=low", "--nodes=4", "--exclusive")
    high = cluster.sbatch("--partition=high", "--nodes=4", "--exclusive", "--wrap", "srun true", cwd=tmp_path)
    cluster.wait_for_state(high, "COMPLETED")
    cluster.start_now(low)
    record = cluster.wait_for_state(low, "RUNNING")
    assert record["Restarts"] == "1"


@pytest.mark.slow
@pytest.mark.long
def test_a_node_without_power_is_down_and_its_job_requeued(cluster: Cluster, tmp_path: Path) -> None:
    job = sleeper(cluster, tmp_path, "--nodes=2", f"--nodelist={','.join(cluster.names[:2])}")
    faults.power_off(cluster, cluster.names[1])
    cluster.wait_for(lambda: cluster.nodes()[cluster.names[1]] == "down*", 40, "the node is down")
    cluster.wait_for(lambda: cluster.job(job)["Restarts"] == "1", 40, "the job is requeued")
    faults.power_on(cluster, cluster.names[1])
    cluster.start_now(job)
    cluster.wait_for_state(job, "RUNNING")


@pytest.mark.slow
@pytest.mark.long
def test_a_node_that_is_cut_off_comes_back_when_healed(apart: Cluster) -> None:
    node, other = apart.names[3], apart.names[0]
    ssh = ["ssh", "-F", str(apart.place.folder / "ssh" / "config"), "-o", "ConnectTimeout=1"]
    assert apart.run([*ssh, other, f"ssh -o ConnectTimeout=1 {node} hostname"]).stdout.strip() == node
    faults.cut(apart, node)
    assert apart.run([*ssh, node, "true"], check=False).returncode != 0
    assert apart.run([*ssh, other, f"ssh -o ConnectTimeout=1 {node} true"], check=False).returncode != 0
    apart.wait_for(lambda: apart.nodes()[node] == "down*", 40, "the node is down")
    faults.heal(apart, node)
    faults.knock(apart, node)
    apart.wait_for(lambda: apart.nodes()[node] == "idle", 40, "the node is back")


def test_a_frozen_node_goes_on_when_thawed(cluster: Cluster, tmp_path: Path) -> None:
    ticks = tmp_path / "ticks"
    ticker = f"while true; do date >> {ticks}; sleep 0.05; done"
    cluster.sbatch("--nodes=1", f"--nodelist={cluster.names[2]}", "--wrap", ticker, "--output=/dev/null", cwd=tmp_path)
    cluster.wait_for(ticks.exists, 20, "the job runs")
    faults.freeze(cluster, cluster.names[2])
    frozen = ticks.stat().st_size
    time.sleep(0.3)  # six ticks
    assert ticks.stat().st_size == frozen
    faults.thaw(cluster, cluster.names[2])
    cluster.wait_for(lambda: ticks.stat().st_size > frozen, 20, "the job goes on")


def test_a_rank_is_found_and_killed(cluster: Cluster, tmp_path: Path) -> None:
    job = sleeper(cluster, tmp_path, "--nodes=2", "--ntasks=4")
    cluster.wait_for(lambda: sorted(faults.ranks(cluster, job)) == [0, 1, 2, 3], 20, "four ranks")
    faults.kill_rank(cluster, job, 2, signal.SIGKILL)
    cluster.wait_for(lambda: sorted(faults.ranks(cluster, job)) == [0, 1, 3], 20, "three ranks")


def test_a_job_outlives_the_controller(cluster: Cluster, tmp_path: Path) -> None:
    script = f"touch {tmp_path}/runs; while [ ! -e {tmp_path}/go ]; do sleep 0.1; done"
    job = cluster.sbatch("--nodes=1", "--wrap", script, "--output=/dev/null", cwd=tmp_path)
    cluster.wait_for((tmp_path / "runs").exists, 20, "the job runs")
    faults.restart_slurmctld(cluster)
    (tmp_path / "go").touch()
    assert cluster.wait_for_state(job, "COMPLETED")["Restarts"] == "0"


def test_pdsh_reaches_the_nodes_over_ssh(apart: Cluster) -> None:
    said = apart.run(["pdsh", "-w", f"{apart.names[0]},{apart.names[1]}", "hostname"]).stdout
    assert sorted(said.splitlines()) == ["node01: node01", "node02: node02"]


def test_restoring_ends_jobs_strays_and_files(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.names[0]
    job = sleeper(cluster, tmp_path, "--nodes=4")
    cluster.run(["scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test"])
    (cluster.place.own(node) / "scratch" / "left").touch()
    faults.power_off(cluster, cluster.names[3])
    faults.restore(cluster)
    assert cluster.state(job) == "CANCELLED"
    assert set(cluster.nodes().values()) == {"idle"}
    assert not list((cluster.place.own(node) / "scratch").iterdir())


def test_a_second_cluster_stands_beside_the_first(cluster: Cluster, second: Cluster) -> None:
    assert second.place.folder != cluster.place.folder
    said = second.run(["srun", "--nodes=2", "printenv", "SLURM_CLUSTER_NAME"]).stdout
    assert set(said.split()) == {f"nsi{second.place.index}"}
    assert set(cluster.nodes().values()) == {"idle"}


@pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "ports"])
def test_nothing_is_left_of_a_cluster(cluster: Cluster, namespaces: bool, tmp_path: Path) -> None:
    began = time.monotonic()
    other = up(TWO, namespaces=namespaces)
    took = time.monotonic() - began
    other.sbatch("--nodes=2", "--wrap", f"touch {tmp_path}/runs; srun sleep 1000", "--output=/dev/null", cwd=tmp_path)
    other.wait_for((tmp_path / "runs").exists, 20, "a job runs")
    roots = recorded(other.place.folder)
    everything = [*roots, *(each for root in roots for each in below(root.pid))]
    assert len({each.pid for each in everything}) > 8
    down(other.place.folder)
    assert [each for each in everything if each.alive()] == []
    assert not other.place.folder.exists()
    assert other.place.bridge not in interfaces()
    assert took < 10


def test_without_namespaces_a_node_is_a_port(cluster: Cluster, tmp_path: Path) -> None:
    other = up(TWO, namespaces=False)
    try:
        said = other.run(["srun", "--nodes=2", "--gpus-per-node=1", "printenv", "SLURMD_NODENAME"]).stdout
        assert sorted(said.split()) == list(other.names)
        job = sleeper(other, tmp_path, "--nodes=2")
        other.wait_for(lambda: len(faults.ranks(other, job)) == 2, 20, "two ranks")
        faults.power_off(other, other.names[1])
        assert len(faults.ranks(other, job)) == 1
        faults.restore(other)
    finally:
        down(other.place.folder)


def test_a_cluster_ends_with_its_owner(cluster: Cluster) -> None:
    code = "from tests.slurm.cluster.bringup import *; print(up(Layout(nodes=1)).place.folder, flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout
        folder = Path(owner.stdout.readline().decode().strip())
        assert folder.exists()
        owner.kill()
    wait_until(lambda: not folder.exists(), 20, lambda: f"{folder} stays")


@pytest.mark.parametrize("step", ["_write_files", "start_slurmctld", "switch_on", "Cluster.wait_for"])
def test_a_killed_bring_up_is_cleaned(step: str, cluster: Cluster) -> None:
    code = f"""if True:
        import os, signal
        from tests.slurm.cluster import bringup
        def die(first, *rest):
            print(getattr(first, "place", first).folder, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        bringup.{step} = die
        bringup.up(bringup.FOUR_NODES, stays=True)
    """
    died = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    folder = Path(died.stdout.strip())
    place, roots = places.read_place(folder), recorded(folder)
    everything = [*roots, *(each for root in roots for each in below(root.pid))]
    assert everything or step == "_write_files"
    assert not cluster.place.namespaces or place.bridge in interfaces()
    clean()
    assert [each for each in everything if each.alive()] == []
    assert not folder.exists()
    assert place.bridge not in interfaces()
    assert cluster.place.folder.exists(), "a living cluster was cleaned away"


def test_a_pid_that_is_used_again_is_left_alone(tmp_path: Path) -> None:
    start(tmp_path, "sleep", ["sleep", "1000"]).wait()
    wait_until(lambda: recorded(tmp_path), 10, lambda: "no record")
    [process] = recorded(tmp_path)
    assert process.alive()
    Process(process.pid, process.started - 1).send(signal.SIGKILL)
    assert process.alive()
    process.send(signal.SIGKILL)
    wait_until(lambda: not process.alive(), 10, lambda: "it lives")


def test_what_is_missing_is_told_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages, "PATH", str(tmp_path))
    told = packages.install()
    assert "no apt-get here" in told
    assert all(package in told for package in packages.NEEDED.values())
