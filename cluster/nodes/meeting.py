"""Where the nodes of a job meet before it begins, tell what they found, and measure what lies between them.

They meet at a store of rank 0 and not in a process group, which nobody enters while one is missing. Rank 0 waits for
all, then says who is there ("go"); from then on those measure. It is also the one that judges, and tells the others.
"""

from __future__ import annotations

import datetime
import json
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from cluster.nodes.diagnosis import silent, slow_nodes
from cluster.nodes.exchange import best_speed
from cluster.nodes.findings import Findings, from_json, to_json
from cluster.nodes.within import within
from cluster.processes import use_gpus
from cluster.world import World
from nsi.errors import UserError

WITNESSES = 3  # nodes whose marks the others look for: enough that one of them may be the odd one
REDUCE_BYTES = 32 << 20
_REPEATS = 3


@dataclass(frozen=True)
class Go:
    """What rank 0 says once all are there, or are not awaited any longer."""

    ranks: list[int]
    marks: list[str]
    seconds: float  # for measuring


def open_store(world: World, until: float) -> Any:
    """The store, made by rank 0 and reached by the others until a moment (of time.monotonic).

    Raises UserError where it cannot be.
    """
    where = f"{world.master_addr}:{world.master_port}"
    if world.rank:
        _await_listener(world, where, until)
    try:
        return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            world.master_addr, world.master_port, world.size, world.rank == 0, _left(until), wait_for_workers=False
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0]
        if world.rank == 0:
            raise UserError(f"{where}: cannot be the meeting place ({why}); set MASTER_PORT to a free port") from None
        raise UserError(f"{where}: rank 0 does not answer there ({why})") from None


def _await_listener(world: World, where: str, until: float) -> None:
    """Until rank 0 listens. The store would wait too, up to three times as long as told."""
    while True:
        try:
            socket.create_connection((world.master_addr, world.master_port), max(0.1, until - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(f"{where}: rank 0 is not there ({error.strerror or error})") from None
            time.sleep(0.1)


def come(store: Any, world: World, mine: Findings, until: float, end: float) -> Go:
    """Tells what this node found, and waits until all have come; rank 0 waits until a moment and no longer, and gives
    all the time to measure that is left before the end.

    Raises UserError where this node is not among those that rank 0 heard of in time.
    """
    store.set(f"local/{world.rank}", to_json(mine))
    if world.rank == 0:
        ranks = _present(store, "local", range(world.size), until)
        marks = [mark for rank in ranks[: 2 * WITNESSES] if (mark := _read(store, "local", rank).mark)]
        go = Go(ranks, marks[:WITNESSES], max(1.0, end - time.monotonic() - 1))
        store.set("go", json.dumps(vars(go)))
        return go
    store.wait(["go"], _left(until))
    go = Go(**json.loads(store.get("go")))
    if world.rank not in go.ranks:
        raise UserError("came too late; give more --seconds")
    return go


def measure(
    store: Any,
    world: World,
    go: Go,
    mine: Findings,
    door: socket.socket,
    look: Callable[[Sequence[str]], tuple[bool, ...]],
) -> Findings:
    """The same findings, with what can be found out together alone. For that moment at which all have heard "go"."""
    mine, began = replace(mine, clock=time.time()), time.monotonic()
    if len(go.ranks) > 1:
        mine = _exchange(store, go, mine, door, go.seconds / 3)
        on_gpu, size = _agree(store, world, go, mine, began + go.seconds * (0.6 if world.rank else 0.5))
        if size:
            mine = _reduce(store, world, mine, on_gpu, size, began + go.seconds * 0.8)
    # Last, since a node that does not find the marks waits for them, and the others would wait for it.
    seen, troubles = within(go.seconds / 5, {"log_path": lambda: look(go.marks)})
    mine = replace(mine, marks_seen=seen.get("log_path", ()), troubles={**mine.troubles, **troubles})
    store.set(f"done/{world.rank}", to_json(mine))
    return mine


def hear(store: Any, go: Go, until: float) -> list[Findings]:
    """For rank 0: what all found; of those that fell silent, what they had found before."""
    done = _present(store, "done", go.ranks, until)
    return [_read(store, "done", rank) if rank in done else silent(_read(store, "local", rank)) for rank in go.ranks]


def tell(store: Any, go: Go, status: int, until: float) -> None:
    """For rank 0: tells the status, and waits a moment until the others have heard it, since the store goes with it."""
    store.set("status", str(status))
    _present(store, "heard", [rank for rank in go.ranks if rank], min(until, time.monotonic() + 3))


def be_told(store: Any, world: World, until: float) -> int:
    """The status that rank 0 tells."""
    store.wait(["status"], _left(until))
    status = int(store.get("status"))
    store.set(f"heard/{world.rank}", "")
    return status


def _exchange(store: Any, go: Go, mine: Findings, door: socket.socket, seconds: float) -> Findings:
    def address_of(rank: int) -> tuple[str, int]:
        their = _read(store, "local", rank)
        if not their.address:
            raise OSError("it has no address")
        return their.address, their.port

    return replace(mine, pair_speed=best_speed(door, mine.rank, go.ranks, address_of, seconds))


def _agree(store: Any, world: World, go: Go, mine: Findings, until: float) -> tuple[bool, int]:
    """Whether to reduce on GPUs, and how many bytes: 0 where a node is missing, or slow, whose figure it would be."""
    well = "interface" not in mine.troubles
    store.set(f"speed/{world.rank}", json.dumps([mine.pair_speed, bool(mine.gpus) and use_gpus(), well]))
    if world.rank == 0:
        heard = _present(store, "speed", go.ranks, until)
        told = [json.loads(store.get(f"speed/{rank}")) for rank in heard]
        speeds = [speed for speed, _, _ in told]
        well = len(heard) == world.size and all(speeds) and not slow_nodes(speeds) and all(each for _, _, each in told)
        size = min(REDUCE_BYTES, int(min(speeds))) // 4 * 4 if well else 0  # about a second each, if it is slow
        store.set("reduce", json.dumps([all(has for _, has, _ in told), size]))
    store.wait(["reduce"], _left(until))
    on_gpu, size = json.loads(store.get("reduce"))
    return on_gpu, size


def _reduce(store: Any, world: World, mine: Findings, on_gpu: bool, size: int, until: float) -> Findings:
    seconds = until - time.monotonic()
    done, troubles = within(seconds, {"network": lambda: _reduce_speed(store, world, on_gpu, size, seconds)})
    backend = "nccl" if on_gpu else "gloo"
    told = {check: f"the all-reduce by {backend} failed: {text}; see NSI_INTERFACE" for check, text in troubles.items()}
    return replace(mine, backend=backend, reduce_speed=done.get("network"), troubles={**mine.troubles, **told})


def _reduce_speed(store: Any, world: World, on_gpu: bool, size: int, seconds: float) -> float:
    """Bytes of an all-reduce by the seconds that it takes; the best of a few, after one that makes the connections."""
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("group", store),  # pyright: ignore[reportPrivateImportUsage]
        rank=world.rank,
        world_size=world.size,
        timeout=datetime.timedelta(seconds=max(1.0, seconds)),
    )
    tensor, times = torch.zeros(size // 4, device=device), []
    for _ in range(1 + _REPEATS):
        began = time.monotonic()
        dist.all_reduce(tensor)
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append(time.monotonic() - began)
    return size / min(times[1:])


def _present(store: Any, what: str, ranks: Sequence[int], until: float) -> list[int]:
    """Of some ranks those that have told something before a moment."""
    if not ranks:
        return []
    try:
        store.wait([f"{what}/{rank}" for rank in ranks], _left(until))
        return list(ranks)
    except dist.DistStoreError:
        return [rank for rank in ranks if store.check([f"{what}/{rank}"])]


def _read(store: Any, what: str, rank: int) -> Findings:
    return from_json(store.get(f"{what}/{rank}"))


def _left(until: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=max(0.1, until - time.monotonic()))
