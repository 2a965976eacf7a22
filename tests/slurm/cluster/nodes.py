"""Switches nodes on and off, and their cables."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.slurm.cluster.config import Place
from tests.slurm.cluster.processes import Process, end_trees, start

PROJECT = Path(__file__).parents[3]
NAMESPACES = ["unshare", "--uts", "--ipc", "--mount", "--net", "--pid", "--fork", "--kill-child=KILL"]


def switch_on(place: Place, nodes: Sequence[str], environment: dict[str, str]) -> None:
    """All first processes, then their cables, then the word to go on."""
    first = {}
    for node in nodes:
        command = [sys.executable, "-m", "tests.slurm.cluster.init", str(place.folder), node]
        command = [*NAMESPACES, *command] if place.namespaces else command
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        first[node] = start(place.folder, node, command, cwd=PROJECT, env=environment, **pipes)
    for node, process in first.items():
        said = process.stdout.readline().decode()
        if not said:
            raise RuntimeError(f"{node} does not start: {(place.folder / f'{node}.out').read_text()}")
        (place.own(node) / "first").write_text(said)
    if place.namespaces:
        pids = {node: first_process(place, node).pid for node in nodes}
        ip(
            *(
                f"link add {place.cable(node)} type veth "
                f"peer name eth0 address {place.hardware_address(node)} netns {pids[node]}"
                for node in nodes
            ),
            *(f"link set {place.cable(node)} master {place.bridge} up" for node in nodes),
        )
    for process in first.values():
        process.stdin.write(b"go\n")
        process.stdin.close()
        process.stdout.close()
        process.wait()


def switch_off(place: Place, node: str) -> None:
    """At once and with all that runs on it; its scratch folder stays, as a disk does."""
    left = end_trees([first_process(place, node)])
    if left:
        raise RuntimeError(f"{node} does not go off: {left}")
    if place.namespaces:
        ip(f"link delete {place.cable(node)}", check=False)  # went with the node, but the kernel takes its time


def first_process(place: Place, node: str) -> Process:
    """As the host sees it; all of the node is below."""
    pid, started = (place.own(node) / "first").read_text().split()
    return Process(int(pid), int(started))


def is_on(place: Place, node: str) -> bool:
    """Whether its first process lives."""
    return first_process(place, node).alive()


def ip(*commands: str, check: bool = True) -> bool:
    """Runs commands of `ip`; whether all went well."""
    force = [] if check else ["-force"]
    text = "".join(f"{command}\n" for command in commands)
    done = subprocess.run(["ip", *force, "-batch", "-"], input=text, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"ip: {done.stderr.strip()}")
    return done.returncode == 0
