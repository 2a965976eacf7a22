"""Where ranks are, as they tell it, and what follows from it: who hangs, who is slow. Pure functions over beats."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType

PROJECT = Path(__file__).parents[2]
_ROOMS = tuple(f"{PROJECT / room}/" for room in ("launch", "nsi", "shards", "cluster"))
_COLLECTIVES = "distributed_c10d.py"  # the file of torch that has all of them
_BEFORE_STEPS = 3  # a rank may take so many times as long to start as to do a step


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself once a second."""

    rank: int
    node: str
    step: int  # done
    bucket: str
    moves: int  # how often its main thread has gone from one thing to the next
    idle_s: float  # since the last move
    at: str  # the line of this program that its main thread is in
    collective: str  # the collective that it waits in, "" where in none
    own_s: float = 0.0  # of a step, before it meets the others: the last ones' median; 0 where nothing is known yet

    @property
    def name(self) -> str:
        """The rank and its machine, for messages."""
        return f"rank {self.rank} ({self.node})"


def where_is(frame: FrameType | None) -> tuple[str, str]:
    """The innermost line of this program on a stack, and the collective that it waits in, "" where in none."""
    at, collective = "", ""
    for code, line in _outwards(frame):
        if code.co_filename.endswith(_COLLECTIVES):
            collective = code.co_name  # the outermost is the one that was called
        elif code.co_filename.startswith(_ROOMS):
            at = f"{Path(code.co_filename).relative_to(PROJECT)}:{line} ({code.co_name})"
            break
    return at, collective


def hang(beats: Sequence[Beat], patience_s: float) -> str | None:
    """In words who stands still and where, if any rank has done so for too long.

    Where one hangs, the others soon wait for it: to blame are those that wait in no collective, and among them those
    that have come least far. (With NCCL nobody is seen in a collective: it is the GPU that waits.)
    """
    if not any(beat.idle_s > _patience(beat, patience_s) for beat in beats):
        return None
    free = [beat for beat in beats if not beat.collective] or list(beats)
    to_blame = [beat for beat in free if beat.moves == min(each.moves for each in free)]
    waiting = [beat for beat in beats if beat not in to_blame and beat.collective]
    first = to_blame[0]
    names = ", ".join(beat.name for beat in to_blame[:4]) + (", ..." if to_blame[4:] else "")
    where = f"in {first.collective} at {first.at}" if first.collective else f"at {first.at or 'an unknown place'}"
    text = f"{names} stood still for {first.idle_s:.0f} s after step {first.step}, in {first.bucket}, {where}"
    if waiting:
        text += f"; the others wait in {waiting[0].collective} at {waiting[0].at}"
    return text


def slowness(beats: Sequence[Beat]) -> dict[int, float]:
    """By rank: its own part of a step as a multiple of the median rank's; empty until all ranks have done steps."""
    if len(beats) < 2 or not all(beat.own_s > 0 for beat in beats):
        return {}
    median = statistics.median_low([beat.own_s for beat in beats])
    return {beat.rank: beat.own_s / median for beat in beats}


def _patience(beat: Beat, patience_s: float) -> float:
    return patience_s * (_BEFORE_STEPS if beat.bucket in ("start", "restore") else 1)


def _outwards(frame: FrameType | None) -> Iterator[tuple[CodeType, int]]:
    while frame is not None:
        yield frame.f_code, frame.f_lineno
        frame = frame.f_back
