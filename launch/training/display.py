"""What a person sees while training: a bar with rate and time left on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from cluster.records.events import Event, Sink

_ALWAYS = ("validation", "bad_samples", "storage", "straggler")  # shown besides steps, each time
PLAIN_EVERY_S = 5.0  # at most one plain line in so many seconds


@contextlib.contextmanager
def training_display(total: int, start: int) -> Iterator[Sink]:
    """A sink that shows logged steps, validations and damage on stderr."""
    if sys.stderr.isatty():
        with _bar(total, start) as sink:
            yield sink
    else:
        yield _lines(total, start)


def describe(event: Event) -> str:
    """A logged step, a validation or damage in a few words."""
    facts = event.facts
    if event.kind == "steps":
        left_out = f"  LEFT OUT: {facts['nonfinite_steps']} steps, not finite" if facts["nonfinite_steps"] else ""
        return (
            f"epoch {facts['epoch']:.2f}  loss {facts['loss']:.4f} (contrastive {facts['contrastive']:.4f}, "
            f"reconstruction {facts['reconstruction']:.4f})  {facts['images_per_second']:.0f} images/s{left_out}"
        )
    if event.kind == "bad_samples":
        return f"damaged scenes passed over: {facts['count']}, the last: {facts['faults'][-1]}"
    if event.kind == "storage":
        return facts["text"]
    if event.kind == "straggler":
        return f"rank {facts['rank']} is slow: {facts['times']:.1f} times the median rank's time for its part of a step"
    times = facts["R@5"] / facts["chance_R@5"]
    return (
        f"validation: R@5 {facts['R@5']:.3f} of {facts['gallery']} ({times:.1f} times chance)  loss {facts['loss']:.4f}"
    )


def _lines(total: int, start: int) -> Sink:
    began, last = 0.0, -PLAIN_EVERY_S

    def show(event: Event) -> None:
        nonlocal began, last
        now = time.monotonic()
        if event.kind == "start":
            began = now
        if event.kind not in ("steps", *_ALWAYS):
            return
        # Validations, damage, steps that were left out, the first and the last line are always shown.
        plain = event.kind == "steps" and not event.facts["nonfinite_steps"]
        if plain and event.step < total and now - last < PLAIN_EVERY_S:
            return
        last = now
        left = (now - began) / max(1, event.step - start) * (total - event.step)
        print(f"step {event.step}/{total}  {describe(event)}  {_clock(left)} left", file=sys.stderr, flush=True)

    return show


@contextlib.contextmanager
def _bar(total: int, start: int) -> Iterator[Sink]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=start)

        def show(event: Event) -> None:
            if event.kind == "steps":
                bar.update(task, completed=event.step, description=describe(event))
            if event.kind in _ALWAYS or event.facts.get("nonfinite_steps"):
                bar.console.print(f"step {event.step}/{total}  {describe(event)}")

        yield show


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
