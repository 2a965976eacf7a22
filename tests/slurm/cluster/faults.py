"""What goes wrong on clusters, done to one; and `restore`, which makes all of it good again."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
from pathlib import Path

from tests.slurm.cluster import nodes
from tests.slurm.cluster.bringup import start_slurmctld
from tests.slurm.cluster.commands import Cluster, login_environment
from tests.slurm.cluster.processes import Process, below, end_trees, find, recorded, stat_fields, wait_until

BOOT_S = 20.0
FREEZE_S = 10.0
RESTORE_S = 60.0
DAEMONS = {"slurmd", "slurmstepd", "sshd", "sshd-session"}


def power_off(cluster: Cluster, node: str) -> None:
    """As if the plug were pulled."""
    nodes.switch_off(cluster.place, node)


def power_on(cluster: Cluster, node: str) -> None:
    """The node boots; Slurm takes it back by itself."""
    nodes.switch_on(cluster.place, [node], login_environment(cluster.place))

    def booted() -> bool:
        running = below(nodes.first_process(cluster.place, node).pid)
        return any(_name(each) == "slurmd" and _handles(each, signal.SIGHUP) for each in running)

    wait_until(booted, BOOT_S, lambda: f"{node} does not boot")


def freeze(cluster: Cluster, node: str) -> None:
    """The node hangs: its network answers, and nothing that runs on it does."""
    first = nodes.first_process(cluster.place, node)

    def all_stopped() -> bool:
        running = [each for each in [first, *below(first.pid)] if not _stopped(each)]
        for each in running:
            each.send(signal.SIGSTOP)
        return not running

    wait_until(all_stopped, FREEZE_S, lambda: f"{node} does not freeze")


def thaw(cluster: Cluster, node: str) -> None:
    """The node goes on as if no time had passed."""
    first = nodes.first_process(cluster.place, node)
    for each in [*below(first.pid), first]:
        each.send(signal.SIGCONT)


def cut(cluster: Cluster, node: str) -> None:
    """Pulls the network cable; what runs on the node runs on."""
    nodes.ip(f"link set {cluster.place.cable(node)} down")


def heal(cluster: Cluster, node: str) -> None:
    """Puts the cable back."""
    nodes.ip(f"link set {cluster.place.cable(node)} up")


def knock(cluster: Cluster, node: str) -> None:
    """Makes a node's slurmd report itself. Slurm asks a node that was down only every half minute."""
    for each in below(nodes.first_process(cluster.place, node).pid):
        if _name(each) == "slurmd" and _handles(each, signal.SIGHUP):  # one that has just begun would die of it
            each.send(signal.SIGHUP)


def restart_slurmctld(cluster: Cluster) -> None:
    """Ends the controller, which saves its state, and starts another."""
    stop_slurmctld(cluster)
    start_slurmctld(cluster.place)
    ping = ["scontrol", "ping"]
    cluster.wait_for(lambda: "is UP" in cluster.run(ping, check=False).stdout, RESTORE_S, "slurmctld answers")


def stop_slurmctld(cluster: Cluster) -> None:
    """Nobody schedules, and jobs run on."""
    running = [each for each in recorded(cluster.place.folder) if each.name == "slurmctld" and each.alive()]
    for each in running:
        each.send(signal.SIGTERM)
    wait_until(lambda: not any(each.alive() for each in running), RESTORE_S, lambda: "slurmctld does not end")


def ranks(cluster: Cluster, job: int) -> dict[int, Process]:
    """The processes of a job's newest step that srun started, by rank."""
    found: dict[int, dict[int, Process]] = {}
    for node in cluster.names:
        for process in below(nodes.first_process(cluster.place, node).pid):
            told = _environment(process)
            if told.get("SLURM_JOB_ID") == str(job) and "SLURM_STEP_ID" in told and _is_task(process):
                found.setdefault(int(told["SLURM_STEP_ID"]), {})[int(told["SLURM_PROCID"])] = process
    return found[max(found)] if found else {}


def kill_rank(cluster: Cluster, job: int, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Ends, or otherwise signals, one rank behind Slurm's back."""
    ranks(cluster, job)[rank].send(number)


def restore(cluster: Cluster) -> None:
    """No jobs, all nodes on, connected and idle, nothing in their scratch: as after the bring-up."""
    place = cluster.place
    if not any(each.name == "slurmctld" and each.alive() for each in recorded(place.folder)):
        start_slurmctld(place)
    for node in place.names:
        if not nodes.is_on(place, node):
            nodes.switch_off(place, node)
            power_on(cluster, node)
        elif any(_stopped(each) for each in below(nodes.first_process(place, node).pid)):
            thaw(cluster, node)
        if place.namespaces:
            heal(cluster, node)
    cluster.wait_for(lambda: _quiet(cluster), RESTORE_S, "no jobs and all nodes idle")
    # A node may be called idle whose slurmd does not listen yet.
    step = ["srun", "--immediate=5", f"--nodes={len(place.names)}", "true"]
    cluster.wait_for(lambda: cluster.run(step, check=False).returncode == 0, RESTORE_S, "a step runs on all nodes")
    cluster.wait_for(lambda: _quiet(cluster), RESTORE_S, "no jobs and all nodes idle")
    for path in (path for node in place.names for path in (place.own(node) / "scratch").iterdir()):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _quiet(cluster: Cluster) -> bool:
    """Whether nothing runs; helps along what does not end or return by itself, or not soon."""
    jobs = cluster.jobs()
    if jobs:
        cluster.run(["scancel", "--quiet", *{re.split("[_+]", each)[0] for each in jobs}], check=False)
    for node in cluster.names:  # also what was started past Slurm, over ssh
        running = below(nodes.first_process(cluster.place, node).pid)
        end_trees(each for each in running if _name(each) not in DAEMONS)
    states = cluster.nodes()
    for node, state in states.items():
        if state.endswith("*"):  # unheard
            knock(cluster, node)
        elif state.startswith(("down", "drain")):
            cluster.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], check=False)
    return not jobs and set(states.values()) == {"idle"}


def _stopped(process: Process) -> bool:
    stat = stat_fields(process.pid)
    return stat is None or stat[0] in "TtZX"


def _handles(process: Process, number: signal.Signals) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _name(process: Process) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        # slurmd 24 starts itself anew on SIGHUP, and goes by another name then for all but its command line.
        called = os.path.basename(Path(f"/proc/{process.pid}/cmdline").read_text().partition("\0")[0])
        return called if called in DAEMONS else Path(f"/proc/{process.pid}/comm").read_text().strip()
    return ""


def _is_task(process: Process) -> bool:
    """Whether a step's own daemon started it."""
    stat = stat_fields(process.pid)
    parent = find(int(stat[1])) if stat else None
    return parent is not None and _name(parent) == "slurmstepd"


def _environment(process: Process) -> dict[str, str]:
    try:
        text = Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in os.fsdecode(text).split("\0") if "=" in pair)
