"""Training from first to last: all that is needed is made and checked on all ranks; then the trainer runs."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from cluster.checkpoints.checkpoint import Checkpoint
from cluster.collectives import share, together
from cluster.processes import device_of, join, leave
from cluster.records.appender import Appender
from cluster.records.clock import Clock, process_began
from cluster.records.events import EventLog, Sink
from cluster.records.ledger import LedgerWriter
from cluster.records.prometheus import serve
from cluster.records.sinks import Board, metrics_sink, validation_sink
from cluster.watch.stop import StopRequest, deadline
from cluster.watch.watchdog import watching
from cluster.world import World, find_world
from launch import runfolder
from launch.config import TrainConfig, check
from launch.training.choose import Choice, choose, load_chosen
from launch.training.display import training_display
from launch.training.guard import Guard
from launch.training.lookout import Lookout
from launch.training.micro_batch import micro_rows
from launch.training.prepare import Parts, begin, catch_up, prepare
from launch.training.trainer import Means, Trainer, total_steps
from nsi.errors import UserError
from shards.loading.workers import open_workers


def train(config: TrainConfig, stop: StopRequest) -> None:
    """Trains, or goes on training, until the end or until asked to stop.

    Raises UserError for anything that does not fit together, before a step is done.
    """
    clock = Clock(process_began())
    check(config)
    world = find_world(os.environ)
    device = device_of(world)
    if device.type == "cpu" and world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))  # ranks share a machine's cores
    join(world, config.watch.hang_seconds)
    guard = Guard(config, world, stop, clock)
    with contextlib.ExitStack() as closing:
        watchdog = closing.enter_context(watching(guard.watchdog()))
        choice, restored, parts = _choose_and_prepare(config, world, clock)
        micro = micro_rows(config, world, device, parts)
        endpoint = together(lambda: serve(world, config.log_path, config.watch.prometheus_port))
        # The first thing that writes to RUN.
        attempt = share(together(lambda: begin(config, world, parts, choice, clock.began)))
        assert attempt is not None
        closing.enter_context(ending_in_order(config.log_path / runfolder.RUNNING, attempt.number, world.rank))
        if attempt.restored_step != (restored.step if restored else 0):
            # Another attempt, which ends now, has saved more since the choice: that must not be done again, nor lost.
            choice, restored, parts = _choose_and_prepare(config, world, clock)
            attempt = share(together(functools.partial(catch_up, config, world, parts, attempt)))
            assert attempt is not None
        clock.enter("start", attempt.restored_step)
        appender = Appender()
        if world.rank == 0:
            guard.lookout = closing.enter_context(Lookout(config.log_path, attempt, clock, stop, appender.tell))
        closing.callback(appender.close)
        endpoint.register()
        closing.callback(endpoint.deregister)
        sinks: list[Sink] = [endpoint.sink]
        board = ledger = None
        if world.rank == 0:
            board = closing.enter_context(Board(config.log_path / runfolder.TENSORBOARD))
            total, start = total_steps(config, parts.order), attempt.restored_step
            sinks += [
                metrics_sink(config.log_path / runfolder.METRICS, attempt.number, appender),
                validation_sink(config.log_path / runfolder.VALIDATION, attempt.number, appender),
                board.show,
                closing.enter_context(training_display(total, start)),
            ]
            ledger = LedgerWriter(config.log_path / runfolder.LEDGER, attempt.number, config.optim.batch_size, appender)
        log = EventLog(config.log_path / runfolder.EVENTS, attempt.number, world.rank, sinks, clock, appender)
        guard.attempt, guard.log, guard.appender = attempt, log, appender
        workers = closing.enter_context(open_workers(config.data.num_workers, pin=device.type == "cuda"))
        until = deadline(clock.began, config.watch.time_limit * 60, config.watch.grace_seconds, os.environ)
        means = Means(world, device, parts, micro, attempt, log, board, ledger, workers, until, clock, watchdog)
        trainer = Trainer(config, means, restored.training if restored else None)
        restored = None  # its files are mapped as long as it is held, and pruned they would still take their room
        guard.saver = trainer.saver
        log.emit(log.instant("start"))
        finished = trainer.run(stop)
        leave()
    if world.rank == 0:
        _say_where(config.log_path, finished, stop)


def _choose_and_prepare(config: TrainConfig, world: World, clock: Clock) -> tuple[Choice, Checkpoint | None, Parts]:
    with clock.spending("restore"):
        choice = share(together(lambda: choose(config) if world.rank == 0 else None))
        assert choice is not None
        restored = together(lambda: load_chosen(config.log_path, choice))
    return choice, restored, together(lambda: prepare(config, world.rank == 0, world.local_rank == 0, restored))


@contextlib.contextmanager
def ending_in_order(mark: Path, attempt: int, rank: int) -> Iterator[None]:
    """Takes away the mark of an attempt that trains, if it is still ours, unless the attempt dies in the block.

    To be told that something is wrong is an end in order: queueing the job again would not mend it.
    """
    try:
        yield
    except (UserError, SystemExit):  # together() leaves by SystemExit where another rank has told it
        _take_away(mark, attempt)
        raise
    if rank == 0:  # the last to be done: it writes the checkpoint
        _take_away(mark, attempt)


def _take_away(mark: Path, attempt: int) -> None:
    with contextlib.suppress(OSError):
        if mark.read_text().split()[:1] == [str(attempt)]:
            mark.unlink()


def _say_where(run: Path, finished: bool, stop: StopRequest) -> None:
    if finished:
        print(f"{run}: done; next: nsi eval {run} --split test, then nsi report {run}")
    else:
        print(f"{run}: stopped by {stop.reason or 'another rank'}, saved; the same command goes on from there")
