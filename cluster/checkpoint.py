"""Checkpoints that any world, ZeRO stage and precision can load, and that are whole or not there.

    RUN/checkpoints/step-00001000/
        model.safetensors       the trained parameters, float32, whole
        optimizer.safetensors   Adam's two moments, as exp_avg/NAME and exp_avg_sq/NAME
        state.json              step, optimizer steps, attempt, and what the caller adds (configuration, vocabulary)
        complete.json           the success mark, written last: sha256 of each of the three

A checkpoint is written under a temporary name, synced, renamed, then marked. One without the mark, or whose bytes do
not have the marked checksums, is passed over with a warning.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cluster.durable import sync
from cluster.loss_scale import LossScale
from cluster.training_state import MOMENTS, TrainingState
from nsi.errors import UserError

FORMAT = 1
MODEL, OPTIMIZER, STATE, COMPLETE = "model.safetensors", "optimizer.safetensors", "state.json", "complete.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. `facts` is the caller's: it must be plain JSON."""

    step: int
    attempt: int
    training: TrainingState
    facts: dict


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def write_checkpoint(folder: Path, checkpoint: Checkpoint, is_replaced: Callable[[], bool] = lambda: False) -> Path:
    """Writes a checkpoint so that it is whole or not there; one of the same step is replaced. Returns its place.

    Nothing is left of it where `is_replaced` says, once all is written, that another attempt has taken over meanwhile.
    """
    target = checkpoint_path(folder, checkpoint.step)
    temporary = folder / f".{target.name}.attempt-{checkpoint.attempt:04d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(checkpoint.training.parameters, temporary / MODEL)
    moments = {f"{m}/{name}": tensor for m in MOMENTS for name, tensor in checkpoint.training.moments[m].items()}
    save_file(moments, temporary / OPTIMIZER)
    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        "optimizer_steps": checkpoint.training.optimizer_steps,
        "loss_scale": checkpoint.training.loss_scale,
        "attempt": checkpoint.attempt,
        **checkpoint.facts,
    }
    (temporary / STATE).write_text(json.dumps(state, indent=1))
    names = (MODEL, OPTIMIZER, STATE)
    for name in names:
        sync(temporary / name)
    marks = {name: _sha256(temporary / name) for name in names}
    if is_replaced():
        shutil.rmtree(temporary)
        return target
    if target.exists():  # torn, or written by an attempt that came to this step before
        shutil.rmtree(target)
    temporary.rename(target)
    mark = target / (COMPLETE + ".tmp")
    mark.write_text(json.dumps(marks, indent=1))
    sync(mark)
    mark.rename(target / COMPLETE)
    sync(target)
    sync(folder)
    return target


def read_checkpoint(path: Path) -> Checkpoint:
    """A verified checkpoint.

    Raises UserError where it is torn, changed, or of a newer format.
    """
    verify_checkpoint(path)
    state = json.loads((path / STATE).read_text())
    if state["format"] != FORMAT:
        raise UserError(f"{path}: format {state['format']}, but this version reads {FORMAT}; upgrade the program")
    try:
        parameters = load_file(path / MODEL)
        loaded = load_file(path / OPTIMIZER)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); remove it, the one before it will be used") from None
    moments: dict[str, dict[str, torch.Tensor]] = {m: {} for m in MOMENTS}
    for key, tensor in loaded.items():
        moment, _, name = key.partition("/")
        moments[moment][name] = tensor
    scale = state.get("loss_scale")
    training = TrainingState(parameters, moments, state["optimizer_steps"], LossScale(*scale) if scale else None)
    own = ("format", "step", "optimizer_steps", "loss_scale", "attempt")
    facts = {k: v for k, v in state.items() if k not in own}
    return Checkpoint(state["step"], state["attempt"], training, facts)


def verify_checkpoint(path: Path) -> None:
    """Raises UserError unless the checkpoint has its success mark and exactly the bytes that were marked."""
    if not path.is_dir():
        there = ", ".join(sorted(each.name for each in path.parent.glob("step-*"))) or "none"
        raise UserError(f"{path}: no such checkpoint; there are: {there}")
    try:
        marks = json.loads((path / COMPLETE).read_text())
        torn = [name for name, sha256 in marks.items() if _sha256(path / name) != sha256]
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{path}: not complete (no readable {COMPLETE} or a file is missing); remove it") from None
    if torn:
        raise UserError(f"{path}: {', '.join(torn)} changed since it was written; remove the checkpoint")


def newest_verified(
    folder: Path, warn: Callable[[str], None], is_void: Callable[[int, int], bool] = lambda step, attempt: False
) -> Path | None:
    """The newest checkpoint that verifies, or None; `warn` is told of each newer one that does not.

    `is_void` says of a step and an attempt whether another attempt has gone on from before that step: such a
    checkpoint came late, from a node that was cut off, say, and the steps that led to it count no more.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            verify_checkpoint(path)
            state = json.loads((path / STATE).read_text())
            if is_void(state["step"], state["attempt"]):
                raise UserError(f"{path}: attempt {state['attempt']} wrote it after another had taken over")
            return path
        except UserError as error:
            warn(f"passed over a checkpoint: {error}")
    return None


def prune(folder: Path, keep_last: int, keep_also: frozenset[int]) -> None:
    """Removes all complete checkpoints but the last few and those of the given steps."""
    complete = sorted(path for path in folder.glob("step-*") if (path / COMPLETE).exists())
    kept = {path.name for path in complete[-keep_last:]} | {checkpoint_path(folder, step).name for step in keep_also}
    for path in complete:
        if path.name not in kept:
            # The mark goes first: a removal cut short leaves an unmarked folder, which nobody takes.
            (path / COMPLETE).unlink()
            shutil.rmtree(path)


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time, so that steps go on meanwhile."""

    def __init__(self, folder: Path, keep_last: int, is_replaced: Callable[[], bool] = lambda: False) -> None:
        """`is_replaced` says whether another attempt has taken over: then nothing is written any more."""
        self._folder = folder
        self._keep_last = keep_last
        self._is_replaced = is_replaced
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def submit(self, checkpoint: Checkpoint, keep_also: frozenset[int]) -> None:
        """Begins to write; waits first for the one before.

        Raises UserError where that one failed, or where another attempt has taken over.
        """
        self.wait()
        if self._is_replaced():
            raise UserError(
                f"{self._folder.parent}: a newer attempt trains this run; this one ends without writing "
                "(to run both, give each a --log_path of its own)"
            )
        self._thread = threading.Thread(target=self._write, args=(checkpoint, keep_also), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Waits until what was submitted lies on disk. Raises UserError where it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise UserError(
                f"{self._folder}: the checkpoint could not be written ({reason}); "
                "make room or mend the folder and start again, the run continues from the one before"
            )

    def close(self) -> None:
        """Waits as `wait` does and raises nothing: for a run that ends for another reason already."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, checkpoint: Checkpoint, keep_also: frozenset[int]) -> None:
        try:
            write_checkpoint(self._folder, checkpoint, self._is_replaced)
            prune(self._folder, self._keep_last, keep_also)
        except Exception as error:  # safetensors has errors of its own; none may get lost in this thread
            self._error = error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
