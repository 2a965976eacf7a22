"""Checkpoints that any world, ZeRO stage and precision can load, and that are whole or not there.

    RUN/checkpoints/step-00001000/
        model.safetensors       the trained parameters, float32, whole
        optimizer.safetensors   Adam's two moments, as exp_avg/NAME and exp_avg_sq/NAME
        state.json              step, optimizer steps, attempt, and what the caller adds (configuration, vocabulary)
        complete.json           the success mark, written last: sha256 of each of the three

A checkpoint is written under a temporary name, synced, renamed, then marked; what had its name before is moved aside
until then (cluster/checkpoints/folder.py). One without the mark, or whose bytes do not have the marked checksums, is
passed over with a warning.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cluster.checkpoints.attempt import TakenOver
from cluster.checkpoints.folder import (
    COMPLETE,
    STATE,
    IsVoid,
    checkpoint_path,
    put_in_place,
    remove_aside,
    survey,
    temporary_path,
)
from cluster.durable import file_hash, sync
from cluster.engine.loss_scale import LossScale
from cluster.engine.state import MOMENTS, TrainingState
from nsi.errors import UserError

FORMAT = 1
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
_OWN = ("format", "step", "optimizer_steps", "loss_scale", "attempt", "saved_at")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. `facts` is the caller's: it must be plain JSON."""

    step: int
    attempt: int
    training: TrainingState
    facts: dict


def write_checkpoint(folder: Path, checkpoint: Checkpoint, is_replaced: Callable[[], bool] = lambda: False) -> Path:
    """Writes a checkpoint so that it is whole or not there; an older attempt's of the same step is replaced. Returns
    its place.

    Nothing is left of it where it cannot be written, and where another attempt has taken over meanwhile, as
    `is_replaced` says once all is written, or that attempt's checkpoint in this one's place: raises TakenOver.
    """
    target = checkpoint_path(folder, checkpoint.step)
    temporary = temporary_path(target, checkpoint.attempt)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        marks = _write_files(temporary, checkpoint)
        if is_replaced() or not put_in_place(temporary, target, checkpoint.attempt):
            raise TakenOver
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk wants its room back
        raise
    sync(folder)
    mark = target / (COMPLETE + ".tmp")
    mark.write_text(json.dumps(marks, indent=1))
    sync(mark)
    mark.rename(target / COMPLETE)
    sync(target)
    remove_aside(target, checkpoint.attempt)
    return target


def _write_files(folder: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """Writes all but the mark; returns when it lies on disk, with the sha256 of each file."""
    folder.mkdir(parents=True)
    save_file(checkpoint.training.parameters, folder / MODEL)
    moments = {f"{m}/{name}": tensor for m in MOMENTS for name, tensor in checkpoint.training.moments[m].items()}
    save_file(moments, folder / OPTIMIZER)
    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        "optimizer_steps": checkpoint.training.optimizer_steps,
        "loss_scale": checkpoint.training.loss_scale,
        "attempt": checkpoint.attempt,
        "saved_at": time.time(),
        **checkpoint.facts,
    }
    (folder / STATE).write_text(json.dumps(state, indent=1))
    names = (MODEL, OPTIMIZER, STATE)
    for name in names:
        sync(folder / name)
    sync(folder)
    return {name: file_hash(folder / name) for name in names}


def read_checkpoint(path: Path) -> Checkpoint:
    """A verified checkpoint.

    Raises UserError where it is torn, changed, or of a newer format.
    """
    verify_checkpoint(path)
    return load_checkpoint(path)


def load_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint that somebody has verified. Raises UserError where it cannot be read, or is of a newer format."""
    try:
        state = json.loads((path / STATE).read_text())
        if state["format"] != FORMAT:
            raise UserError(f"{path}: format {state['format']}, but this version reads {FORMAT}; upgrade the program")
        parameters = load_file(path / MODEL)
        loaded = load_file(path / OPTIMIZER)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); restore it, or remove it") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it, the one before it will be used") from None
    moments: dict[str, dict[str, torch.Tensor]] = {m: {} for m in MOMENTS}
    for key, tensor in loaded.items():
        moment, _, name = key.partition("/")
        moments[moment][name] = tensor
    scale = state.get("loss_scale")
    training = TrainingState(parameters, moments, state["optimizer_steps"], LossScale(*scale) if scale else None)
    facts = {k: v for k, v in state.items() if k not in _OWN}
    return Checkpoint(state["step"], state["attempt"], training, facts)


def verify_checkpoint(path: Path) -> None:
    """Raises UserError unless the checkpoint has its success mark and exactly the bytes that were marked."""
    if not path.is_dir():
        there = ", ".join(sorted(each.name for each in path.parent.glob("step-*"))) or "none"
        raise UserError(f"{path}: no such checkpoint; there are: {there}")
    try:
        marks = json.loads((path / COMPLETE).read_text())
        torn = [name for name, sha256 in marks.items() if file_hash(path / name) != sha256]
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{path}: not complete (no readable {COMPLETE} or a file is missing); remove it") from None
    if torn:
        raise UserError(f"{path}: {', '.join(torn)} changed since it was written; remove the checkpoint")


def newest_verified(
    folder: Path, warn: Callable[[str], None], is_void: IsVoid = lambda step, attempt: False
) -> Path | None:
    """The newest checkpoint that verifies, or None; `warn` is told of each newer one that does not.

    `is_void` says of a step and an attempt whether another attempt has gone on from before that step: such a
    checkpoint came late, from a node that was cut off, say, and the steps that led to it count no more.
    """
    for found in reversed(survey(folder)):
        try:
            if is_void(found.step, found.attempt):
                raise UserError(f"{found.path}: attempt {found.attempt} wrote it after another had taken over")
            verify_checkpoint(found.path)
            return found.path
        except UserError as error:
            warn(f"passed over a checkpoint: {error}")
    return None
