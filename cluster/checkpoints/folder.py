"""The folder of a run's checkpoints: what lies in it, what a kill may leave there, and what may go.

    step-00001000/                         a checkpoint, if it has its success mark
    .step-00001000.attempt-0002.tmp/       attempt 2 is writing it
    .step-00001000.attempt-0002.aside/     what attempt 2 found in its place, until its own is complete

A kill at any moment leaves one of these. What was moved aside comes back unless something complete has taken its
place; the rest is removed by a later attempt. No attempt touches what belongs to a newer one.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.checkpoints.retention import Retention, kept_steps

STATE, COMPLETE = "state.json", "complete.json"
_NAME = re.compile(r"step-\d{8,}")
_HIDDEN = re.compile(r"\.(step-\d{8,})\.attempt-(\d+)\.(tmp|aside)")

IsVoid = Callable[[int, int], bool]  # of a step and an attempt, whether another one has gone on from before that step


@dataclass(frozen=True)
class Found:
    """A checkpoint in the folder, as it says of itself."""

    path: Path
    step: int
    attempt: int  # -1 where its state cannot be read
    saved_at: float  # seconds since 1970
    is_complete: bool  # it has its mark; its bytes may have changed since


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def temporary_path(target: Path, attempt: int) -> Path:
    """Where an attempt writes it."""
    return target.with_name(f".{target.name}.attempt-{attempt:04d}.tmp")


def survey(folder: Path) -> list[Found]:
    """All checkpoints, complete or not, by step."""
    found = [look(path) for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda each: each.step)


def look(path: Path) -> Found:
    """What a checkpoint says of itself."""
    attempt, saved_at = -1, 0.0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads((path / STATE).read_text())
        attempt = int(state["attempt"])
        saved_at = float(state.get("saved_at") or (path / STATE).stat().st_mtime)  # older ones do not say it
    step = int(re.findall(r"step-(\d+)", path.name)[0])
    return Found(path, step, attempt, saved_at, (path / COMPLETE).exists())


def put_in_place(temporary: Path, target: Path, attempt: int) -> bool:
    """Gives a written checkpoint its name; what had it is moved aside, for `remove_aside`. False where that is a newer
    attempt's, which stays."""
    aside = _aside_path(target, attempt)
    _bring_back(aside, target, attempt)  # of a write that failed halfway
    if target.exists():
        if look(target).attempt > attempt:
            return False
        target.rename(aside)
        if look(aside).attempt > attempt:  # it came between the look and the move
            aside.rename(target)
            return False
    temporary.rename(target)  # fails where something else has come meanwhile
    return True


def remove_aside(target: Path, attempt: int) -> None:
    """Removes what was moved aside, once the checkpoint in its place is complete."""
    _remove([_aside_path(target, attempt)])


def bring_back(folder: Path, attempt: int) -> None:
    """Gives checkpoints their names back that attempts up to this one moved aside and did not replace."""
    for path, target, number, kind in _hidden(folder):
        if kind == "aside" and number <= attempt:
            with contextlib.suppress(FileNotFoundError):  # another start was quicker
                _bring_back(path, target, attempt)


def clear_leftovers(folder: Path, attempt: int) -> None:
    """Removes what attempts up to this one left unfinished; not to be called while this one writes."""
    bring_back(folder, attempt)
    unfinished = [path for path, _, number, kind in _hidden(folder) if kind == "tmp" and number <= attempt]
    unmarked = [each.path for each in survey(folder) if not each.is_complete and each.attempt <= attempt]
    _remove([*unfinished, *unmarked])


def prune(folder: Path, attempt: int, retention: Retention, also: frozenset[int], is_void: IsVoid) -> None:
    """Removes the checkpoints that need not be kept, and leftovers; those of void steps count as none and go too."""
    clear_leftovers(folder, attempt)
    complete = [each for each in survey(folder) if each.is_complete]
    standing = [each for each in complete if not is_void(each.step, each.attempt)]
    kept = kept_steps([(each.step, each.saved_at) for each in standing], also, retention)
    stays = {each.path for each in standing if each.step in kept}
    _remove([each.path for each in complete if each.path not in stays and each.attempt <= attempt])


def _aside_path(target: Path, attempt: int) -> Path:
    return target.with_name(f".{target.name}.attempt-{attempt:04d}.aside")


def _hidden(folder: Path) -> list[tuple[Path, Path, int, str]]:
    """What attempts work on: where it lies, the checkpoint that it belongs to, the attempt's number, and the kind."""
    found = ((path, _HIDDEN.fullmatch(path.name)) for path in folder.glob(".step-*"))
    return [(path, folder / match[1], int(match[2]), match[3]) for path, match in found if match]


def _bring_back(aside: Path, target: Path, attempt: int) -> None:
    """Back to its place, unless there is something complete, or a newer attempt's, or it is not complete itself."""
    if not aside.exists():
        return
    if not (aside / COMPLETE).exists() or (target / COMPLETE).exists():
        _remove([aside])
    elif not target.exists() or look(target).attempt <= attempt:
        _remove([target])
        aside.rename(target)


def _remove(paths: Iterable[Path]) -> None:
    """Removes folders, if they are there; all that can be, before OSError is raised for one that cannot."""
    trouble: OSError | None = None
    for path in paths:
        try:
            # The mark goes first: a removal cut short leaves an unmarked folder, which nobody takes.
            (path / COMPLETE).unlink(missing_ok=True)
            if path.exists():
                shutil.rmtree(path)
        except OSError as error:
            trouble = trouble or error
    if trouble:
        raise trouble
