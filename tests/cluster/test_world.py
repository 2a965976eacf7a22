"""Who am I: every launcher's variables give the right place, and half-set ones an error."""

from __future__ import annotations

import pytest

from cluster.world import World, find_world, first_host, hosts, slurm_port
from nsi.errors import UserError

LAUNCHER = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29501",
}
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "gpu[08-10]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}


def test_no_launcher_is_a_world_of_one() -> None:
    assert find_world({"PATH": "/bin"}) == World(0, 1, 0, 1, "127.0.0.1", 0, "none")


def test_the_batch_shell_is_no_step() -> None:
    """In a batch script Slurm sets these without any srun: one process, whatever the allocation's size."""
    shell = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert find_world(shell).size == 1


def test_launchers() -> None:
    assert find_world(LAUNCHER) == World(3, 8, 1, 2, "node7", 29501, "launcher")
    assert find_world({**LAUNCHER, "TORCHELASTIC_RUN_ID": "x"}).launcher == "torchrun"


def test_deepspeeds_launcher() -> None:
    """It says LOCAL_SIZE where others say LOCAL_WORLD_SIZE."""
    env = {name: value for name, value in LAUNCHER.items() if name != "LOCAL_WORLD_SIZE"}
    assert find_world({**env, "LOCAL_SIZE": "4"}).local_size == 4


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "LOCAL_WORLD_SIZE"])
def test_a_starter_that_is_not_understood_is_no_world_of_one(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}=2, but RANK and WORLD_SIZE are not set"):
        find_world({name: "2"})
    assert find_world({name: "1"}).size == 1


def test_a_launcher_inside_slurm_wins() -> None:
    assert find_world({**STEP, **LAUNCHER}).rank == 3


def test_slurm_step() -> None:
    world = find_world(STEP)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (4, 5, 1, 1)
    assert world.master_addr == "gpu08"
    assert 20000 <= world.master_port < 30000  # below the ephemeral range
    assert world.launcher == "srun"


def test_slurm_step_with_a_given_master() -> None:
    world = find_world({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "21000"})
    assert (world.master_addr, world.master_port) == ("10.0.0.1", 21000)


def test_restarts_change_the_port() -> None:
    assert slurm_port(STEP) != slurm_port({**STEP, "SLURM_RESTART_COUNT": "1"})
    assert slurm_port(STEP) != slurm_port({**STEP, "SLURM_JOB_ID": "4712"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("node1", "node1"), ("node[3-5]", "node3"),
     ("gpu[08-10,12],login", "gpu08"), ("a1,b2", "a1"), ("n[1]-ib", "n1-ib")],
)  # fmt: skip
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [("", []), ("n1", ["n1"]), ("gpu[08-10,2],login", ["gpu08", "gpu09", "gpu10", "gpu2", "login"]),
     ("r[1-2]n[3,5]-ib", ["r1n3-ib", "r1n5-ib", "r2n3-ib", "r2n5-ib"]), ("a,b[9-10]", ["a", "b9", "b10"])],
)  # fmt: skip
def test_hosts(nodelist: str, names: list[str]) -> None:
    assert hosts(nodelist) == names


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_launcher(missing: str) -> None:
    env = {name: value for name, value in LAUNCHER.items() if name != missing}
    with pytest.raises(UserError, match=f"{missing} not; start with deepspeed, torchrun"):
        find_world(env)


@pytest.mark.parametrize("change", [{"RANK": "8"}, {"RANK": "-1"}, {"LOCAL_RANK": "9"}, {"WORLD_SIZE": "0"}])
def test_an_impossible_place(change: dict[str, str]) -> None:
    with pytest.raises(UserError, match="does not lie in a world of"):
        find_world({**LAUNCHER, **change})


def test_not_a_number() -> None:
    with pytest.raises(UserError, match="RANK='first' is not a number"):
        find_world({**LAUNCHER, "RANK": "first"})


def test_slurm_without_a_rank() -> None:
    with pytest.raises(UserError, match="SLURM_PROCID not; start the processes with srun"):
        find_world({"SLURM_STEP_NUM_TASKS": "2"})


def test_environment_round_trip() -> None:
    world = find_world(LAUNCHER)
    assert find_world(world.environment()) == world
