"""Brings a cluster up and ends it. All of it lies in one folder, and every process in that folder's records."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from tests.slurm.cluster import config, places
from tests.slurm.cluster.commands import Cluster, login_environment
from tests.slurm.cluster.config import Layout, Place
from tests.slurm.cluster.nodes import NAMESPACES, PROJECT, ip, switch_on
from tests.slurm.cluster.processes import end_trees, recorded, start, this_process, wait_until

FOUR_NODES = Layout()
START_S = 20.0


def up(layout: Layout = FOUR_NODES, namespaces: bool = True, stays: bool = False) -> Cluster:
    """A cluster whose nodes are idle. It ends with this process, however that ends, unless it stays."""
    place = _claim(layout, namespaces)
    folder, cluster = place.folder, Cluster(place)
    try:
        _write_files(place)
        if not stays:
            command = [sys.executable, "-m", "tests.slurm.cluster", "keep", str(folder)]
            start(folder, "keeper", command, cwd=PROJECT).wait()
        files = [f"--{each}-file={folder}/munge.{each}" for each in ("key", "log", "pid", "seed")]
        munged = ["munged", "--foreground", "--num-threads=4", f"--socket={folder}/munge.socket", *files]
        start(folder, "munged", munged, env=login_environment(place)).wait()
        if place.namespaces:
            ip(f"address add {place.login}/24 dev {place.bridge}", f"link set {place.bridge} up")
        wait_until((folder / "munge.socket").exists, START_S, (folder / "munged.out").read_text)
        start_slurmctld(place)
        switch_on(place, place.names, login_environment(place))
        cluster.wait_for(lambda: set(cluster.nodes().values()) == {"idle"}, START_S, "all nodes idle")
        if stays:
            places.write_owner(folder, next(each for each in recorded(folder) if each.name == "munged"))
    except BaseException:
        down(folder)
        raise
    return cluster


def down(folder: Path) -> None:
    """Ends a cluster: its processes, its bridge and cables, its folder."""
    with places.locked():
        _end(folder)


def clean() -> list[Path]:
    """Ends this person's clusters whose owner is dead."""
    with places.locked():
        return _clean()


def standing() -> list[Cluster]:
    """This person's clusters that were started to stay."""
    return [Cluster(places.read_place(folder)) for folder in places.folders() if places.stays(folder)]


def start_slurmctld(place: Place) -> None:
    """Its state, should it have run before, is in the cluster's folder."""
    command = ["slurmctld", "-D", "-f", str(place.folder / "slurm.conf")]
    start(place.folder, "slurmctld", command, env=login_environment(place)).wait()


def _clean() -> list[Path]:
    dead = [folder for folder in places.folders() if places.owner(folder) is None]
    for folder in dead:
        _end(folder)
    return dead


def _end(folder: Path) -> None:
    left = end_trees(each for each in recorded(folder) if each.pid != os.getpid())
    if left:  # the records stay for whoever tries again
        raise RuntimeError(f"{folder}: these processes cannot be ended: {left}")
    if (folder / "place.json").exists():
        place = places.read_place(folder)
        if place.namespaces:
            ip(
                f"link delete {place.bridge}",
                *(f"link delete {place.cable(node)}" for node in place.names),
                check=False,
            )
    shutil.rmtree(folder, ignore_errors=True)


def _claim(layout: Layout, namespaces: bool) -> Place:
    """The first free index, with its folder, its owner and its bridge."""
    namespaces = namespaces and _may_have_namespaces()
    with places.locked():
        _clean()
        for index in range(places.MOST):
            host = socket.gethostname().partition(".")[0]
            place = Place(places.folder_of(index), index, host, namespaces, getpass.getuser(), layout)
            if not places.ports_free(place.port, layout.nodes + 1):
                continue
            try:
                place.folder.mkdir(mode=0o755)
            except FileExistsError:
                continue
            places.write_owner(place.folder, this_process())
            places.write_place(place)
            if namespaces and not ip(f"link add {place.bridge} type bridge forward_delay 0", check=False):
                shutil.rmtree(place.folder)  # the bridge is somebody else's
                continue
            return place
    raise RuntimeError(f"{places.folder_of(0)} and so on: {places.MOST} clusters already, or their ports are taken")


def _may_have_namespaces() -> bool:
    return os.getuid() == 0 and subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode == 0


def _write_files(place: Place) -> None:
    folder = place.folder
    own = [place.own(node) / each for node in place.names for each in ("spool", "scratch")]
    for each in (folder / "state", folder / "ssh", place.scratch, *own):
        each.mkdir(parents=True)
    texts = {
        "slurm.conf": config.slurm_conf(place),
        "gres.conf": config.gres_conf(place),
        "cgroup.conf": config.cgroup_conf(),
        "hosts": config.hosts(place),
        "resolv.conf": "",
        "ssh/config": config.ssh_config(place),
        "ssh/sshd_config": config.sshd_config(place),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    for number in range(place.layout.gpus):
        (folder / f"gpu{number}").symlink_to("/dev/null")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    for path in (place.key, folder / "ssh" / "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "nsi", "-f", path], check=True)
    (folder / "ssh" / "known_hosts").write_text(f"nsi {(folder / 'ssh' / 'host.pub').read_text()}")
