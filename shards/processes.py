"""Worker processes for work that is cut into tasks: shared by whatever renders, reads and writes scenes."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from nsi.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


class Here(Executor):
    """An executor that does a task where and when it is submitted."""

    def submit(self, fn, /, *args, **kwargs) -> Future:
        future: Future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            if not isinstance(error, Exception):
                raise
            future.set_exception(error)
        return future


@contextlib.contextmanager
def process_pool(workers: int, where: object) -> Iterator[Executor]:
    """An executor over so many processes, or over this one where one worker is enough.

    Raises UserError, naming `where`, when a worker is killed.
    """
    if workers == 1:
        yield Here()
        return
    # A fork is there at once, with all that is imported, but it copies locks that other threads hold, for ever held.
    can_fork = sys.platform == "linux" and threading.active_count() == 1
    context = multiprocessing.get_context("fork" if can_fork else "spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker)
    try:
        for _ in range(workers):
            pool.submit(os.getpid)  # they start now, while the caller still looks for work
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            f"{where}: a worker was killed, perhaps for want of memory; give the same command again to go on, "
            "with fewer --workers if it happens again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def as_they_end(pool: Executor, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
    """The results of all tasks, as they come in; tasks not yet begun are given up when one fails.

    Processes begin while `tasks` still come, and the first result is there when all have come.
    """
    if isinstance(pool, Here):  # one at a time, so that each is told of before the next begins
        yield from map(function, list(tasks))
        return
    futures = [pool.submit(function, task) for task in tasks]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Looks for no cycles meanwhile: among very many small objects that make none it takes a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _prepare_worker() -> None:
    """Makes a worker stop with its caller, and not before."""
    # Ctrl-C reaches every process of a terminal: a worker finishes its task, and the caller stops the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A caller that is killed tells nobody, and its workers would wait for work for ever.
    threading.Thread(target=_leave_with_caller, daemon=True).start()


def _leave_with_caller() -> None:
    if caller := multiprocessing.parent_process():
        caller.join()
        os._exit(1)
