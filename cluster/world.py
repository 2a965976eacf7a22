"""Who am I? Finds rank, world size and local rank from whatever started this process.

Four cases, in this order: the variables that torchrun, accelerate and DeepSpeed's launcher set; the variables of a
Slurm step (srun's own, not the batch shell's); nothing at all, which is a world of one; anything half-set, which is
an error rather than a guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from nsi.errors import UserError

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What starters that we do not speak with say of a world of several.
_OTHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
_FIRST_PORT, _PORTS = 20_000, 10_000  # below Linux's ephemeral range, which begins at 32768


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int  # 0 in a world of one, which meets nobody
    launcher: str

    def environment(self) -> dict[str, str]:
        """The variables that torch.distributed and DeepSpeed look for."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def find_world(env: Mapping[str, str]) -> World:
    """The world that an environment describes.

    Raises UserError where a launcher's variables are incomplete or contradict each other.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        return _from_launcher(env)
    if "SLURM_STEP_NUM_TASKS" in env:
        return _from_slurm(env)
    for name in _OTHERS:
        if env.get(name, "1") != "1":
            raise UserError(
                f"environment: {name}={env[name]}, but RANK and WORLD_SIZE are not set; "
                "start with deepspeed, torchrun, accelerate launch or srun, or unset it for one process"
            )
    return World(0, 1, 0, 1, "127.0.0.1", 0, "none")


def _from_launcher(env: Mapping[str, str]) -> World:
    missing = [name for name in _LAUNCHER if name not in env]
    if missing:
        raise UserError(
            f"environment: {', '.join(name for name in _LAUNCHER if name in env)} set but {', '.join(missing)} not; "
            "start with deepspeed, torchrun, accelerate launch or srun, or unset them all for one process"
        )
    size, local_rank = _number(env, "WORLD_SIZE"), _number(env, "LOCAL_RANK")
    # torchrun and accelerate say LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE.
    local = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in env), None)
    local_size = _number(env, local) if local else size
    name = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "launcher"
    return _checked(
        World(
            _number(env, "RANK"),
            size,
            local_rank,
            local_size,
            env["MASTER_ADDR"],
            _number(env, "MASTER_PORT"),
            name,
        )
    )


def _from_slurm(env: Mapping[str, str]) -> World:
    for name in ("SLURM_PROCID", "SLURM_LOCALID"):
        if name not in env:
            raise UserError(f"environment: SLURM_STEP_NUM_TASKS set but {name} not; start the processes with srun")
    size, local_rank = _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_LOCALID")
    if size > 1 and "MASTER_ADDR" not in env and not env.get("SLURM_STEP_NODELIST"):
        raise UserError(
            "environment: neither MASTER_ADDR nor SLURM_STEP_NODELIST is set; set MASTER_ADDR to rank 0's host"
        )
    return _checked(
        World(
            _number(env, "SLURM_PROCID"),
            size,
            local_rank,
            _tasks_on_node(env, size),
            env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "")) or "127.0.0.1",
            _number(env, "MASTER_PORT") if "MASTER_PORT" in env else slurm_port(env),
            "srun",
        )
    )


def slurm_port(env: Mapping[str, str]) -> int:
    """A port that jobs side by side, and the restarts of one job, are unlikely to share."""
    job, restart = int(env.get("SLURM_JOB_ID", "0")), int(env.get("SLURM_RESTART_COUNT", "0"))
    return _FIRST_PORT + (job * 7 + restart) % _PORTS


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[03-05,9],login` has gpu03."""
    return next(iter(hosts(nodelist)), "")


def hosts(nodelist: str) -> list[str]:
    """All hosts of a Slurm node list, in order: `gpu[03-05,9],login` has gpu03, gpu04, gpu05, gpu9 and login."""
    found: list[str] = []
    for item in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", nodelist):
        names = [""]
        for place, part in enumerate(re.split(r"\[([^\]]*)\]", item)):  # text and ranges by turns
            names = [name + end for name in names for end in (_numbers(part) if place % 2 else [part])]
        found += names
    return found


def _numbers(ranges: str) -> list[str]:
    """`03-05,9` has 03, 04, 05 and 9."""
    numbers: list[str] = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        numbers += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return numbers


def _tasks_on_node(env: Mapping[str, str], size: int) -> int:
    """This node's share of a step, from a list such as `4(x2),3`."""
    counts: list[int] = []
    for item in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item):
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else size


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise UserError(f"environment: {name}={env[name]!r} is not a number; start again with a launcher") from None


def _checked(world: World) -> World:
    if not 0 <= world.rank < world.size or not 0 <= world.local_rank < world.size:
        raise UserError(
            f"environment: rank {world.rank} (local {world.local_rank}) does not lie in a world of {world.size}; "
            "unset RANK, WORLD_SIZE and LOCAL_RANK or start with a launcher"
        )
    return world
