"""Progress of long work: a bar with rate and time left on a terminal, plain lines every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

PLAIN_EVERY_S = 5.0


@contextlib.contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told how much is done so far."""
    if sys.stderr.isatty():
        with _bar(title, total, unit) as advance:
            yield advance
        return
    began = last = time.monotonic()

    def advance(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_EVERY_S:
            return
        last = now
        rate = done / max(1e-9, now - began)
        left = (total - done) / max(1e-9, rate)
        print(f"{title}: {done}/{total} {unit}, {rate:.0f}/s, {left:.0f} s left", file=sys.stderr, flush=True)

    yield advance


@contextlib.contextmanager
def _bar(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.speed:.0f}" if total else "")
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit), rate, TimeRemainingColumn())
    with Progress(*columns[:-2], columns[-1], console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)
