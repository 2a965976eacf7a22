"""A rank that hangs, dies or is slow, as it is told, under the watchdog: OUT, what, the faulty rank, the stacks."""

import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from cluster.collectives import any_rank
from cluster.processes import join, leave
from cluster.records.clock import Clock
from cluster.watch.watchdog import Watchdog, watching
from cluster.world import find_world

out, what, faulty, stacks = sys.argv[1:]
world = find_world(os.environ)
join(world)
clock = Clock(time.time())


def farewell(reason: str) -> None:
    Path(out).write_text('{"reason": "told"}')


watchdog = Watchdog(world, clock, 3.0, lambda: Path(stacks), lambda: None, farewell)
with watching(watchdog):
    for step in range(1, 6):
        clock.enter("step", step)
        any_rank(False)
        watchdog.note(0.3 if world.rank == int(faulty) else 1.0 if step == 5 else 0.1)  # one slow step makes none
    if what == "slow":
        deadline = time.monotonic() + 60
        while not watchdog.slowness() and time.monotonic() < deadline:
            time.sleep(0.1)
        Path(out).write_text(str(round(watchdog.slowness()[world.rank], 6)))
    elif world.rank != int(faulty):
        if what == "hang":
            any_rank(False)  # waits for ever
        time.sleep(600)  # as NCCL does, which does not hear of a death
    elif what == "hang":
        with clock.spending("data_wait"):
            time.sleep(600)
    else:
        os._exit(7)
    leave()
assert dist.is_initialized() is False
