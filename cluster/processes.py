"""The process group: joined before training, left in order afterwards."""

from __future__ import annotations

import datetime
import os
import time

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from cluster.world import World
from nsi.errors import UserError

# The watchdog ends a rank that waits, long before.
COLLECTIVE = datetime.timedelta(minutes=30)


def use_gpus() -> bool:
    """Whether to train on GPUs: where there are any, unless DS_ACCELERATOR=cpu, DeepSpeed's own switch, says no."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def device_of(world: World) -> torch.device:
    """The device this rank trains on: its own GPU where there are GPUs, else the CPU."""
    if not use_gpus():
        return torch.device("cpu")
    return torch.device("cuda", world.local_rank % torch.cuda.device_count())


def join(world: World, meet_s: float = 600.0) -> None:
    """Joins the process group of a world, gloo on CPUs and NCCL on GPUs.

    A world of one meets itself in memory: it needs no port and no launcher. Raises UserError where the ranks do not
    meet within `meet_s` (the port taken, rank 0's host unreachable, a rank that died before it came).
    """
    os.environ.update(world.environment())
    on_gpu = use_gpus()
    if on_gpu:
        torch.cuda.set_device(device_of(world))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if world.size == 1:
        memory = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=memory, rank=0, world_size=1, timeout=COLLECTIVE)
        return
    try:
        meeting = datetime.timedelta(seconds=meet_s)
        store, rank, size = next(iter(rendezvous("env://", timeout=meeting)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise UserError(
            f"rank {world.rank} cannot meet the others at {world.master_addr}:{world.master_port} "
            f"({str(error).splitlines()[0]}); set MASTER_PORT to a free port, MASTER_ADDR to rank 0's host, and see "
            "in their logs whether all ranks live"
        ) from None


def leave() -> None:
    """Leaves the process group once everybody is done.

    The pause keeps gloo's threads from being torn down while they still answer a peer (pytorch issue 190489).
    """
    dist.barrier()
    time.sleep(0.2)
    dist.destroy_process_group()
