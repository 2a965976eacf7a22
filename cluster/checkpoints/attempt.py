"""The attempts of a run: each start of a run folder takes a number of its own, for ever."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from cluster.durable import sync
from nsi.errors import UserError

_NAME = re.compile(r"attempt-(\d{4,})\.json")


class TakenOver(Exception):
    """A newer attempt trains the run: an older one must not write any more."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run: which, when, on how many ranks, and the step it went on from."""

    number: int
    started: float  # seconds since 1970
    world_size: int
    launcher: str
    restored_step: int


def take_attempt(
    folder: Path, world_size: int, launcher: str, restored_step: int, started: float | None = None, after: int = 0
) -> Attempt:
    """Takes the next number by creating its file exclusively, so that two starts never share one.

    `started`: when its rank 0's process began; now, where it is not told. `after`: a number that is taken, whatever the
    folder says. Raises UserError where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = max(len(list(folder.glob("attempt-*.json"))), after) + 1
        while True:
            attempt = Attempt(number, started or time.time(), world_size, launcher, restored_step)
            try:
                _write(_path(folder, number), attempt, "x")
                sync(folder)
                return attempt
            except FileExistsError:
                number += 1
    except OSError as error:
        raise _cannot_write(folder, error) from None


def go_on_from(folder: Path, attempt: Attempt, step: int) -> Attempt:
    """The attempt, which has done no step yet, going on from another step than it was taken for.

    Raises UserError where the folder cannot be written.
    """
    path, changed = _path(folder, attempt.number), replace(attempt, restored_step=step)
    temporary = path.with_suffix(".tmp")
    try:
        _write(temporary, changed, "w")
        temporary.rename(path)
        sync(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    return changed


def read_attempts(folder: Path) -> list[Attempt]:
    """All attempts of a run, in order. One whose file was cut is left out: it never did a step."""
    return [attempt for path in sorted(folder.glob("attempt-*.json")) if (attempt := _read(path))]


def is_replaced(folder: Path, attempt: Attempt) -> bool:
    """Whether a newer attempt has begun: the older one must not write any more.

    Raises OSError where the storage gives no answer: then nobody knows.
    """
    try:
        names = os.listdir(folder)  # a glob would take a folder that cannot be read for an empty one
    except FileNotFoundError:  # it was taken away, and nobody has begun anew in its place
        return False
    numbers = [(int(match[1]), name) for name in names if (match := _NAME.fullmatch(name))]
    return any(_read(folder / name) for number, name in numbers if number > attempt.number)


def is_superseded(step: int, number: int, attempts: list[Attempt]) -> bool:
    """Whether a later attempt went on from before this step, so that what attempt `number` said of it is void."""
    return any(later.number > number and later.restored_step < step for later in attempts)


def _read(path: Path) -> Attempt | None:
    """An attempt from its file; None where that was cut."""
    try:
        return Attempt(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        return None


def _path(folder: Path, number: int) -> Path:
    return folder / f"attempt-{number:04d}.json"


def _cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder}: cannot be written ({error.strerror}); make room, or choose another --log_path")


def _write(path: Path, attempt: Attempt, mode: Literal["x", "w"]) -> None:
    with path.open(mode) as file:
        json.dump(asdict(attempt), file)
        file.flush()
        os.fsync(file.fileno())  # an audit must know where attempts went on from
