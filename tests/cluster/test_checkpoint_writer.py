"""The thread that writes checkpoints: no step waits for the disk, and what was not written is told."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.checkpoints.attempt import is_replaced, take_attempt
from cluster.checkpoints.checkpoint import STATE, Checkpoint, read_checkpoint, write_checkpoint
from cluster.checkpoints.retention import Retention
from cluster.checkpoints.writer import CheckpointWriter
from cluster.engine.state import MOMENTS, TrainingState
from nsi.errors import UserError


def make(step: int) -> Checkpoint:
    def tensors() -> dict[str, torch.Tensor]:
        return {"a.weight": torch.full((3, 4), float(step))}

    return Checkpoint(step, 2, TrainingState(tensors(), {moment: tensors() for moment in MOMENTS}, step), {})


class Disk:
    """A disk that stands still until told to go on."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self) -> None:
        self.reached.release()
        assert self.go_on.acquire(timeout=60)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def test_a_slow_disk_holds_up_nobody_and_the_newest_gets_there(tmp_path: Path) -> None:
    disk = Disk()
    writer = CheckpointWriter(tmp_path, Retention(9), before=disk)
    writer.submit(make(1), frozenset())
    assert disk.reached.acquire(timeout=60)  # 1 is on its way from here on
    for step in (2, 3, 4):
        writer.submit(make(step), frozenset())  # and would stand still here if it waited
    told = writer.troubles()
    assert [f"the checkpoint of step {step} was left out" in text for step, text in zip((2, 3), told, strict=True)]
    assert not writer.wait(0.0)
    for _ in range(2):
        disk.go_on.release()
    writer.finish()
    assert names(tmp_path) == ["step-00000001", "step-00000004"]
    assert (writer.saved(), writer.saved()) == ([1, 4], [])
    assert writer.troubles() == []


def test_the_best_is_never_left_out(tmp_path: Path) -> None:
    disk = Disk()
    writer = CheckpointWriter(tmp_path, Retention(1), before=disk)
    writer.submit(make(1), frozenset())
    assert disk.reached.acquire(timeout=60)
    writer.submit(make(2), frozenset({2}))
    writer.submit(make(3), frozenset({2}))
    writer.submit(make(4), frozenset({2}))  # none of them stands still
    [told] = writer.troubles()
    assert "the checkpoint of step 3 was left out" in told
    for _ in range(3):
        disk.go_on.release()
    writer.finish()
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_the_writer_works_in_the_background(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, Retention(1))
    for step in (1, 2, 3):
        writer.submit(make(step), frozenset({1}))
    writer.wait()
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000001", "step-00000003"]


def test_a_failed_write_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "file", Retention(1))
    (tmp_path / "file").write_text("in the way")
    writer.submit(make(1), frozenset())
    assert not writer.wait()
    (trouble,) = writer.troubles()
    assert "the checkpoint could not be written" in trouble
    assert writer.troubles() == []  # told once
    (tmp_path / "file").unlink()
    writer.finish(pauses_s=(0.0,))  # tries again
    assert read_checkpoint(tmp_path / "file" / "step-00000001").step == 1


def test_the_last_checkpoint_must_get_there(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "file", Retention(1))
    (tmp_path / "file").write_text("in the way")
    writer.submit(make(1), frozenset())
    with pytest.raises(UserError, match="could not be written .*; make room or mend the folder and start again"):
        writer.finish(pauses_s=(0.0, 0.0))


def test_no_checkpoint_without_its_ledger(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    writer = CheckpointWriter(tmp_path, Retention(1), before=full)
    writer.submit(make(1), frozenset())
    assert not writer.wait()
    assert not list(tmp_path.glob("step-*"))


def test_a_replaced_attempt_writes_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, make(5))
    before = (tmp_path / "step-00000005" / STATE).stat().st_mtime_ns
    writer = CheckpointWriter(tmp_path, Retention(1), is_replaced=lambda: True)
    writer.submit(make(5), frozenset())  # nobody waits here to learn of it
    assert not writer.wait()
    for call in (writer.finish, lambda: writer.submit(make(6), frozenset())):
        with pytest.raises(UserError, match="a newer attempt trains this run"):
            call()
    assert (tmp_path / "step-00000005" / STATE).stat().st_mtime_ns == before
    assert (names(tmp_path), writer.saved(), writer.troubles()) == (["step-00000005"], [], [])


def test_while_nobody_knows_who_trains_the_run_no_checkpoint_is_completed(tmp_path: Path) -> None:
    """And the run goes on; what becomes known then counts."""
    attempts, checkpoints = tmp_path / "attempts", tmp_path / "checkpoints"
    attempt = take_attempt(attempts, 1, "none", 0)
    unreadable = attempts / "attempt-0002.json"
    unreadable.mkdir()  # an error of its own kind, which needs no broken disk
    writer = CheckpointWriter(checkpoints, Retention(9), is_replaced=lambda: is_replaced(attempts, attempt))
    for step in (1, 2):
        writer.submit(make(step), frozenset())
        assert not writer.wait()
        (trouble,) = writer.troubles()
        assert "the checkpoint could not be written (Is a directory)" in trouble
    assert names(checkpoints) == []
    unreadable.rmdir()
    writer.finish(pauses_s=(0.0,))
    assert names(checkpoints) == ["step-00000002"]
    unreadable.mkdir()
    writer.submit(make(3), frozenset())
    assert not writer.wait()
    unreadable.rmdir()
    take_attempt(attempts, 1, "none", 2)
    with pytest.raises(UserError, match="a newer attempt trains this run"):
        writer.finish(pauses_s=(0.0,))
    assert names(checkpoints) == ["step-00000002"]


def test_an_attempt_that_is_replaced_while_it_writes_leaves_what_its_successor_wrote(tmp_path: Path) -> None:
    """It was the newest when it began, and another is when the bytes lie on the disk."""
    answers = iter([False, True])
    writer = CheckpointWriter(tmp_path, Retention(1), is_replaced=lambda: next(answers))
    write_checkpoint(tmp_path, replace(make(5), attempt=3))
    writer.submit(make(5), frozenset())
    with pytest.raises(UserError, match="a newer attempt trains this run"):
        writer.finish()
    assert writer.saved() == []
    assert read_checkpoint(tmp_path / "step-00000005").attempt == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
