"""Progress of long work: a bar with rate and time left on a terminal, plain lines every few seconds elsewhere.

Everything goes to stderr, so that what a verb prints on stdout can be piped.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

PLAIN_EVERY_S = 5.0  # at most one plain line in so many seconds

Clock = Callable[[], float]
Pace = Callable[[int], str]


@contextlib.contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told how much is done so far: `advance(done_so_far)`. A total of 0 is not known.

    What the first report counts is the starting point of the rate: scenes that were there before the run took
    no time, and the way up to the first report is starting, not working.
    """
    with _bar(title, total, unit) if sys.stderr.isatty() else _lines(title, total, unit) as advance:
        yield advance


@contextlib.contextmanager
def reading() -> Iterator[Callable[[str, int, int], None]]:
    """`progress` over one source after another: `advance(source, bytes_done, bytes_in_all)`, 0 where nobody knows."""
    with contextlib.ExitStack() as shown:
        now: tuple[str, Callable[[int], None]] | None = None

        def advance(source: str, done: int, total: int) -> None:
            nonlocal now
            if now is None or now[0] != source:
                shown.close()
                now = source, shown.enter_context(progress(f"reading {source}", total // 10**6, unit="MB"))
            now[1](done // 10**6)

        yield advance


def pace_of(total: int, unit: str, clock: Clock = time.monotonic) -> Pace:
    """A function from the work done so far to `12.3 scenes/s, 1:05 left`; empty while nothing can be said."""
    first: tuple[float, int] | None = None

    def pace(done: int) -> str:
        nonlocal first
        now = clock()
        if first is None:
            first = now, done
        seconds, worked = now - first[0], done - first[1]
        if seconds <= 0 or worked <= 0:
            return ""
        rate = worked / seconds
        left = f", {_clock_text((total - done) / rate)} left" if total else ""
        return f"{_short(rate)} {unit}/s{left}"

    return pace


@contextlib.contextmanager
def _lines(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    pace, last = pace_of(total, unit), time.monotonic()

    def advance(done: int) -> None:
        nonlocal last
        text = pace(done)
        if time.monotonic() - last < PLAIN_EVERY_S:
            return
        last = time.monotonic()
        counted = f"{title}: {done}/{total} {unit}" if total else f"{title}: {done} {unit}"
        print(f"{counted}, {text}" if text else counted, file=sys.stderr, flush=True)

    yield advance


@contextlib.contextmanager
def _bar(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    from rich.console import Console  # here, not above: a run without a terminal does not wait for it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    pace = pace_of(total, unit)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total or None, pace="")
        yield lambda done: bar.update(task, completed=done, pace=pace(done))


def _short(rate: float) -> str:
    """Three digits of a rate, more where the number is large."""
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def _clock_text(seconds: float) -> str:
    """65 seconds as 1:05, and hours before them where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
