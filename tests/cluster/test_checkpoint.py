"""Checkpoints: whole or not there, verified at load, the newest good one taken."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster import checkpoint as module
from cluster.attempt import Attempt, is_superseded
from cluster.checkpoint import (
    COMPLETE,
    MODEL,
    OPTIMIZER,
    STATE,
    Checkpoint,
    CheckpointWriter,
    newest_verified,
    prune,
    read_checkpoint,
    write_checkpoint,
)
from cluster.training_state import TrainingState
from nsi.errors import UserError


def make(step: int) -> Checkpoint:
    torch.manual_seed(step)
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.randn(1)}
    moments = {moment: {name: torch.randn_like(t) for name, t in tensors.items()} for moment in module.MOMENTS}
    return Checkpoint(step, 2, TrainingState(tensors, moments, step), {"seed": 5, "best": {"step": 3}})


def test_round_trip(tmp_path: Path) -> None:
    wrote = make(7)
    read = read_checkpoint(write_checkpoint(tmp_path, wrote))
    assert (read.step, read.attempt, read.facts, read.training.optimizer_steps) == (7, 2, wrote.facts, 7)
    for name, tensor in wrote.training.parameters.items():
        assert torch.equal(read.training.parameters[name], tensor)
        for moment in module.MOMENTS:
            assert torch.equal(read.training.moments[moment][name], wrote.training.moments[moment][name])


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE])
def test_one_changed_byte_is_found(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path, make(1))
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} changed since it was written"):
        read_checkpoint(path)


def test_the_newest_good_one_is_taken(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path, make(step))
    (tmp_path / "step-00000040" / COMPLETE).unlink()
    (tmp_path / "step-00000030" / MODEL).unlink()
    warnings: list[str] = []
    assert newest_verified(tmp_path, warnings.append) == tmp_path / "step-00000020"
    assert len(warnings) == 2
    assert "step-00000040: not complete" in warnings[0]


def test_none_at_all(tmp_path: Path) -> None:
    assert newest_verified(tmp_path / "missing", print) is None


@pytest.mark.parametrize("moment", ["save_file", "sync", "_sha256"])
def test_a_write_cut_anywhere_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    write_checkpoint(tmp_path, make(1))
    monkeypatch.setattr(module, moment, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, make(2))
    monkeypatch.undo()
    assert newest_verified(tmp_path, print) == tmp_path / "step-00000001"
    write_checkpoint(tmp_path, make(2))  # what was left behind is no hindrance
    assert newest_verified(tmp_path, print) == tmp_path / "step-00000002"


def test_a_torn_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, make(1))
    (path / COMPLETE).unlink()
    (path / MODEL).write_bytes(b"torn")
    assert read_checkpoint(write_checkpoint(tmp_path, make(1))).step == 1


def test_pruning_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        write_checkpoint(tmp_path, make(step))
    prune(tmp_path, 2, frozenset({3}))
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("step-*")) == [3, 5, 6]


def test_the_writer_works_in_the_background(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 1)
    for step in (1, 2, 3):
        writer.submit(make(step), frozenset({1}))
    writer.wait()
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000001", "step-00000003"]


def test_a_failed_write_is_told(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "file", 1)
    (tmp_path / "file").write_text("in the way")
    writer.submit(make(1), frozenset())
    with pytest.raises(UserError, match="could not be written"):
        writer.wait()
    writer.wait()  # told once


def test_a_replaced_attempt_writes_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, make(5))
    before = (tmp_path / "step-00000005" / STATE).stat().st_mtime_ns
    writer = CheckpointWriter(tmp_path, 1, is_replaced=lambda: True)
    with pytest.raises(UserError, match="a newer attempt trains this run"):
        writer.submit(make(5), frozenset())
    assert (tmp_path / "step-00000005" / STATE).stat().st_mtime_ns == before


def test_an_attempt_that_is_replaced_while_it_writes_leaves_what_its_successor_wrote(tmp_path: Path) -> None:
    """It was the newest when it began, and another is when the bytes lie on the disk."""
    answers = iter([False, True])
    writer = CheckpointWriter(tmp_path, 1, is_replaced=lambda: next(answers))
    write_checkpoint(tmp_path, replace(make(5), attempt=3))
    writer.submit(make(5), frozenset())
    writer.wait()
    assert read_checkpoint(tmp_path / "step-00000005").attempt == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_a_checkpoint_that_came_after_a_successor_is_passed_over(tmp_path: Path) -> None:
    """Attempt 2 wrote step 20 after attempt 3 had gone on from step 10: its steps 11 to 20 count no more."""
    attempts = [Attempt(number, 0.0, 1, "none", step) for number, step in ((1, 0), (2, 0), (3, 10))]
    for step in (10, 20):
        write_checkpoint(tmp_path, make(step))  # by attempt 2
    warnings: list[str] = []
    found = newest_verified(tmp_path, warnings.append, lambda step, number: is_superseded(step, number, attempts))
    assert found == tmp_path / "step-00000010"
    assert "step-00000020: attempt 2 wrote it after another had taken over" in warnings[0]
    assert newest_verified(tmp_path, print) == tmp_path / "step-00000020"


def test_no_such_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, make(5))
    with pytest.raises(UserError, match=r"step-00000007: no such checkpoint; there are: step-00000005"):
        read_checkpoint(tmp_path / "step-00000007")


def test_a_newer_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORMAT", 2)
    path = write_checkpoint(tmp_path, make(1))
    monkeypatch.undo()
    with pytest.raises(UserError, match="format 2, but this version reads 1"):
        read_checkpoint(path)


def test_a_copied_checkpoint_is_whole(tmp_path: Path) -> None:
    copy = shutil.copytree(write_checkpoint(tmp_path / "a", make(1)), tmp_path / "b")
    assert read_checkpoint(copy).step == 1
