"""Two ranks under a run's guard: rank 1 hangs, and both are asked to stop: OUT, RUN."""

import os
import signal
import sys
import time

from cluster.collectives import any_rank
from cluster.processes import join
from cluster.records.clock import Clock
from cluster.watch.stop import StopRequest
from cluster.watch.watchdog import watching
from cluster.world import find_world
from launch.train import parse
from launch.training.guard import Guard

_, run = sys.argv[1:]
stop = StopRequest()
world = find_world(os.environ)
join(world)
config = parse(["--data_path", "nowhere", "--log_path", run, "--grace_seconds", "2"])
with watching(Guard(config, world, stop, Clock(time.time())).watchdog()):
    os.kill(os.getpid(), signal.SIGTERM)
    if world.rank == 1:
        time.sleep(600)
    any_rank(False)
