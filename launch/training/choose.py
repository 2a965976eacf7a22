"""Which checkpoint of a run is taken: by training rank 0's choice, the same for all ranks; else the one asked for."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.checkpoints.attempt import is_superseded, read_attempts
from cluster.checkpoints.checkpoint import (
    Checkpoint,
    load_checkpoint,
    newest_verified,
    read_checkpoint,
    verify_checkpoint,
)
from cluster.checkpoints.folder import STATE, Found, IsVoid, bring_back, checkpoint_path, look, survey
from launch import runfolder
from launch.config import TrainConfig
from nsi.errors import UsageError, UserError


@dataclass(frozen=True)
class Choice:
    """Where a run goes on, verified: a step and the attempt that wrote it, or None for the beginning."""

    step: int | None
    attempt: int = 0
    seen: frozenset[tuple[int, int]] = frozenset()  # step and attempt of all that were complete, good or void


def choose(config: TrainConfig) -> Choice:
    """The newest checkpoint of the run that verifies; warnings of newer ones go to stderr.

    One rank chooses for all, so that they agree and the bytes are hashed once. Where there is no checkpoint it verifies
    that of --checkpoint_path. Raises UserError where all that there is has been damaged: training would begin anew, and
    write over what may be the work of days.
    """
    run = config.log_path
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file; give --log_path a folder")
    folder, is_void = run / runfolder.CHECKPOINTS, _void(run)
    try:
        bring_back(folder, max((each.number for each in read_attempts(run / runfolder.ATTEMPTS)), default=0))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --log_path") from None
    notes: list[str] = []
    path = newest_verified(folder, notes.append, is_void)
    complete = [each for each in survey(folder) if each.is_complete]
    damaged = [each.path.name for each in complete if not is_void(each.step, each.attempt)]
    if path is None and damaged:
        raise UserError(
            f"{folder}: its checkpoints have been damaged ({', '.join(damaged)}), and none before them is left; "
            "put back a good copy, or remove the folder to begin at step 0"
        )
    for note in notes:
        print(f"nsi train: {note}", file=sys.stderr)
    if path is None:
        if config.checkpoint_path:
            verify_checkpoint(config.checkpoint_path)
        return Choice(None, seen=_names(complete))
    found = look(path)
    return Choice(found.step, found.attempt, _names(complete))


def saved_since(run: Path, choice: Choice) -> int | None:
    """The step of the newest checkpoint that came to the run after the choice, whoever wrote it; None for none.

    An attempt that is still there when its successor starts saves until it learns of it.
    """
    complete = [each for each in survey(run / runfolder.CHECKPOINTS) if each.is_complete]
    later = max((step for step, _ in _names(complete) - choice.seen), default=-1)
    return later if later > (-1 if choice.step is None else choice.step) else None


def load_chosen(run: Path, choice: Choice) -> Checkpoint | None:
    """The chosen checkpoint on this rank, which need not verify it; None for the run's beginning.

    Raises UserError where this node sees another folder than the rank that chose.
    """
    folder = run / runfolder.CHECKPOINTS
    if choice.step is None:
        if not choice.seen and any(each.is_complete for each in survey(folder)):
            raise _another_folder(run, "it holds checkpoints here and none there")
        return None
    path = checkpoint_path(folder, choice.step)
    found = look(path)
    if not found.is_complete or found.attempt != choice.attempt:
        raise _another_folder(run, f"{path.name} of attempt {choice.attempt}, from which it goes on, is not here")
    return load_checkpoint(path)


def trained_checkpoint(run: Path, which: str, warn: Callable[[str], None]) -> Checkpoint:
    """A run's verified checkpoint: "best" by validation, "last", or that of a step's number.

    Raises UserError where there is no such run or checkpoint, UsageError where `which` is none of these.
    """
    folder = run / runfolder.CHECKPOINTS
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder; give the --log_path of `nsi train`")
    if which not in ("best", "last") and not which.isdigit():
        raise UsageError(f"--checkpoint {which}: give best, last or the number of a step")
    newest = newest_verified(folder, warn, _void(run))
    if newest is None:
        raise UserError(f"{folder}: holds no complete checkpoint; train first, or wait for the first one")
    if which == "best":
        best = json.loads((newest / STATE).read_text())["best"]
        path = checkpoint_path(folder, int(best["step"])) if best else newest
    else:
        path = newest if which == "last" else checkpoint_path(folder, int(which))
    return load_checkpoint(path) if path == newest else read_checkpoint(path)


def _names(found: Iterable[Found]) -> frozenset[tuple[int, int]]:
    return frozenset((each.step, each.attempt) for each in found)


def _void(run: Path) -> IsVoid:
    attempts = read_attempts(run / runfolder.ATTEMPTS)
    # One that does not say whose it is has been damaged, and is not void for that.
    return lambda step, number: number >= 0 and is_superseded(step, number, attempts)


def _another_folder(run: Path, why: str) -> UserError:
    return UserError(
        f"{run}: is not the same folder on node {socket.gethostname()} as on rank 0's ({why}); "
        "give --log_path a folder that all nodes share"
    )
