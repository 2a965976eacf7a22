"""A node's first process: makes itself at home, starts sshd and slurmd, and buries the orphans.

Runs as `python -m tests.slurm.cluster.init FOLDER NODE`. It says who it is, then waits for its network cable.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.slurm.cluster.config import Place
from tests.slurm.cluster.places import read_place
from tests.slurm.cluster.processes import PIDS, find

SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


def main(place: Place, node: str) -> None:
    """Does not return while the node is on."""
    me = find(int(os.readlink("/proc/self")))  # as the host counts, whose /proc is still mounted
    assert me
    with (place.folder / PIDS).open("a") as file:
        file.write(f"{me.pid} {me.started} {node}\n")
    print(me.pid, me.started, flush=True)
    if not sys.stdin.readline():
        sys.exit("the bring-up died")
    log = os.open(place.own(node) / "node.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    if place.namespaces:
        _settle(place, node)
        subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", place.folder / "ssh" / "sshd_config"])
    else:
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)  # the orphans of a step stay below us, where they are found
    subprocess.Popen(["slurmd", "-D", "-N", node])
    while True:
        try:
            os.wait()
        except ChildProcessError:
            signal.pause()


def _settle(place: Place, node: str) -> None:
    """A name, an address, and what only this node sees under paths that all nodes have."""
    socket.sethostname(node)
    for command in (
        f"ip address add {place.address(node)}/24 dev eth0",
        "ip link set eth0 up",
        "ip link set lo up",
        "mount -t proc proc /proc",
        "mount -t tmpfs tmpfs /dev/shm",
        "mount -t tmpfs tmpfs /run",
        f"mount --bind {place.own(node)}/scratch {place.scratch}",
    ):
        subprocess.run(command.split(), check=True)
    Path("/run/sshd").mkdir()
    files = {"/etc/hosts": "hosts", "/etc/resolv.conf": "resolv.conf", "/etc/ssh/ssh_config": "ssh/config"}
    for at, own in files.items():
        if os.path.exists(at):
            subprocess.run(["mount", "--bind", place.folder / own, os.path.realpath(at)], check=True)


if __name__ == "__main__":
    main(read_place(Path(sys.argv[1])), sys.argv[2])
