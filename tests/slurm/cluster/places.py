"""Which clusters this machine has: a folder each in /tmp, whose index is taken under a lock."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tests.slurm.cluster.config import Layout, Partition, Place
from tests.slurm.cluster.processes import Process, recorded

ROOT = Path("/tmp")  # not TMPDIR: the paths of sockets must be short, and clusters must know of one another
NAME = "nsi-slurm-"
MOST = 30  # clusters at once; the ports of one more would reach those where ranks meet


@contextmanager
def locked() -> Iterator[None]:
    """One of this person's processes at a time."""
    with (ROOT / f"nsi-slurm.{os.getuid()}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def folder_of(index: int) -> Path:
    """The one temporary folder of a cluster."""
    return ROOT / f"{NAME}{index}"


def folders() -> list[Path]:
    """Those of this person."""
    found = [folder_of(index) for index in range(MOST)]
    return [path for path in found if path.is_dir() and path.stat().st_uid == os.getuid()]


def write_place(place: Place) -> None:
    """So that whoever finds the folder knows all of it."""
    (place.folder / "place.json").write_text(json.dumps(asdict(place), default=str))


def read_place(folder: Path) -> Place:
    """What was written there."""
    told = json.loads((folder / "place.json").read_text())
    layout = told.pop("layout")
    partitions = tuple(Partition(**each) for each in layout.pop("partitions"))
    return Place(**{**told, "folder": folder}, layout=Layout(**layout, partitions=partitions))


def owner(folder: Path) -> Process | None:
    """The living process whose cluster it is; None means that the folder is a leftover."""
    try:
        pid, started = (folder / "owner").read_text().split()
    except FileNotFoundError:
        return None
    found = Process(int(pid), int(started))
    return found if found.alive() else None


def write_owner(folder: Path, process: Process) -> None:
    """Names the process with which the cluster ends."""
    temporary = folder / "owner.tmp"
    temporary.write_text(f"{process.pid} {process.started}")
    temporary.rename(folder / "owner")


def stays(folder: Path) -> bool:
    """Whether a cluster was started to stay: then one of its own daemons is the owner."""
    found = owner(folder)
    return found is not None and found.pid in {each.pid for each in recorded(folder)}


def ports_free(first: int, count: int) -> bool:
    """Whether nobody listens there."""
    for port in range(first, first + count):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                return False
    return True
