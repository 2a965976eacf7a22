"""`python -m tests.slurm.cluster up|down|status|install`: a cluster to play with, as `make cluster` does."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.slurm.cluster.bringup import clean, down, standing, up
from tests.slurm.cluster.commands import Cluster
from tests.slurm.cluster.packages import install
from tests.slurm.cluster.places import folders, owner, read_place, stays

KEEP_LOOKS_S = 0.3


def main(arguments: list[str]) -> int:
    """Does one of them; the status is 0 where there is a cluster, or none, as asked for."""
    match arguments:
        case ["up"]:
            return _up()
        case ["down"]:
            clean()
            for cluster in standing():
                down(cluster.place.folder)
                print(f"{cluster.place.folder} is gone")
        case ["status"]:
            for folder in folders():
                print(_status(folder))
        case ["install"]:
            if why := install():
                print(f"Slurm tests will be skipped: {why}", file=sys.stderr)
        case ["keep", folder]:
            _keep(Path(folder))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


def _up() -> int:
    if why := install():
        print(why, file=sys.stderr)
        return 1
    for cluster in standing():
        print("# stands since before; make cluster-down ends it")
        _tell(cluster)
        return 0
    began = time.monotonic()
    cluster = up(stays=True)
    how = "" if cluster.place.namespaces else ", all on this machine's own network: only root may cut cables"
    print(f"# {len(cluster.names)} nodes after {time.monotonic() - began:.1f} s{how}; make cluster-down ends them")
    _tell(cluster)
    return 0


def _tell(cluster: Cluster) -> None:
    print(f"export SLURM_CONF={cluster.place.folder}/slurm.conf")
    print("# then, for example:")
    print(f"#   srun -N {len(cluster.names)} hostname")
    print("#   sbatch -N 2 --gpus-per-node=2 slurm/train.sbatch --data_path SHARDS --log_path RUN")


def _status(folder: Path) -> str:
    process = owner(folder)
    if process is None:
        return f"{folder}: left by a process that died; `down` removes it"
    if not stays(folder):
        return f"{folder}: process {process.pid}'s"
    said = Cluster(read_place(folder)).nodes()
    return f"{folder}: stays, " + ", ".join(f"{node} {state}" for node, state in said.items())


def _keep(folder: Path) -> None:
    """Ends a cluster when its owner is gone, however that came to die."""
    while owner(folder):
        time.sleep(KEEP_LOOKS_S)
    clean()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
