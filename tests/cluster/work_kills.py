"""Kills a child before each of its calls that change a folder, and looks at what a start finds there afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from cluster.checkpoints.attempt import Attempt, is_superseded
from cluster.checkpoints.checkpoint import MODEL, Checkpoint, newest_verified, read_checkpoint, write_checkpoint
from cluster.checkpoints.folder import COMPLETE, IsVoid, bring_back, checkpoint_path, clear_leftovers, prune
from cluster.checkpoints.retention import Retention
from cluster.engine.state import MOMENTS, TrainingState

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"}
KINDS = ("fresh", "unmarked", "damaged", "void", "standing", "orphaned")
ATTEMPTS = [Attempt(1, 0.0, 1, "none", 0), Attempt(2, 0.0, 1, "none", 20)]


def make(step: int, attempt: int) -> Checkpoint:
    tensors = {"a": torch.full((5,), float(step + attempt))}
    moments = {moment: {"a": torch.zeros(5)} for moment in MOMENTS}
    return Checkpoint(step, attempt, TrainingState(tensors, moments, step), {})


def is_void(step: int, attempt: int) -> bool:
    """Attempt 2 went on from step 20."""
    return is_superseded(step, attempt, ATTEMPTS)


def is_not(step: int, attempt: int) -> bool:
    """As if attempt 2 had gone on from step 30 and written it once more."""
    return False


def before(folder: Path, kind: str) -> None:
    """What attempt 1 left, of which step 20 is the last that counts; "standing": step 30."""
    for step in (10, 20, 30):
        path = write_checkpoint(folder, make(step, 1))
    if kind == "fresh":
        shutil.rmtree(path)
    elif kind == "unmarked":
        (path / COMPLETE).unlink()
    elif kind == "damaged":
        (path / MODEL).write_bytes(b"edited")
    elif kind == "orphaned":  # attempt 1 itself was killed while it replaced step 20
        checkpoint_path(folder, 20).rename(folder / ".step-00000020.attempt-0001.aside")
    (folder / ".step-00000040.attempt-0001.tmp").mkdir()


def act(folder: Path, void: IsVoid, say: Callable[[int], None]) -> None:
    """Attempt 2 begins, and writes steps 30 and 40."""
    bring_back(folder, 1)
    clear_leftovers(folder, 2)
    for step in (30, 40):
        write_checkpoint(folder, make(step, 2))
        say(step)
        prune(folder, 2, Retention(2), frozenset(), void)


def killed_at(number: int, folder: Path, void: IsVoid) -> list[int] | None:
    """The steps that `act` said to have written before it was killed at its call of that number, None if it came to its
    end before."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        calls = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal calls
            if event in CHANGES:
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(hook)
            act(folder, void, lambda step: os.write(writing, bytes([step])) and None)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as said:
        steps = said.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return None if status == 0 else list(steps)


def look(folder: Path, void: IsVoid, safe: int, number: int) -> None:
    """As the next start does: the newest that counts is the last that was safe, or the next if that was complete."""
    bring_back(folder, 2)
    newest = newest_verified(folder, lambda text: None, void)
    assert newest is not None, number
    found = read_checkpoint(newest)
    assert safe <= found.step <= {20: 30, 30: 40, 40: 40}[safe], (number, safe, found.step)
    assert found.attempt == 2 or found.step == 20 or void is is_not
    assert torch.equal(found.training.parameters["a"], make(found.step, found.attempt).training.parameters["a"])
    clear_leftovers(folder, 3)
    assert newest_verified(folder, lambda text: None, void) == newest
    write_checkpoint(folder, make(50, 3))
    prune(folder, 3, Retention(2), frozenset(), void)
    assert sorted(path.name for path in folder.iterdir()) == [newest.name, "step-00000050"], number


torch.set_num_threads(1)
out, root = Path(sys.argv[1]), Path(sys.argv[2])
kills: dict[str, int] = {}
for kind in KINDS:
    number, void = 0, is_not if kind == "standing" else is_void
    before(root / kind, kind)
    while True:
        number += 1
        folder = Path(shutil.copytree(root / kind, root / f"{kind}-{number}"))
        written = killed_at(number, folder, void)
        if written is None:
            break
        look(folder, void, max([30 if kind == "standing" else 20, *written]), number)
        shutil.rmtree(folder)
    kills[kind] = number - 1
out.write_text(json.dumps(kills))
