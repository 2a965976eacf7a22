"""Checkpoints: whole or not there, verified at load, the newest good one taken."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.checkpoints import checkpoint as module
from cluster.checkpoints.attempt import Attempt, TakenOver, is_superseded
from cluster.checkpoints.checkpoint import (
    COMPLETE,
    MODEL,
    OPTIMIZER,
    STATE,
    Checkpoint,
    load_checkpoint,
    newest_verified,
    read_checkpoint,
    write_checkpoint,
)
from cluster.checkpoints.folder import bring_back, clear_leftovers, prune
from cluster.checkpoints.retention import Retention
from cluster.engine.state import TrainingState
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


def test_without_hashing_a_missing_or_cut_file_is_still_told(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, make(1))
    assert load_checkpoint(path).facts == read_checkpoint(path).facts == make(1).facts
    (path / MODEL).write_bytes((path / MODEL).read_bytes()[:-1])
    with pytest.raises(UserError, match="step-00000001: damaged"):
        load_checkpoint(path)
    (path / STATE).unlink()
    with pytest.raises(UserError, match="step-00000001: cannot be read \\(No such file"):
        load_checkpoint(path)


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


@pytest.mark.parametrize("moment", ["save_file", "sync", "file_hash"])
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


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def standing(step: int, attempt: int) -> bool:
    return False


def test_pruning_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        write_checkpoint(tmp_path, make(step))
    prune(tmp_path, 2, Retention(2), frozenset({3}), standing)
    assert steps(tmp_path) == [3, 5, 6]


def test_pruning_keeps_one_of_every_so_many_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 9):
        monkeypatch.setattr(module.time, "time", lambda at=1_000_000 * 3600 + step * 1800.0: at)
        write_checkpoint(tmp_path, make(step))
        prune(tmp_path, 2, Retention(1, every_hours=1.5), frozenset(), standing)
    # Hours 1,000,000.5, 1, 1.5, ... 4; stretches of an hour and a half begin at 999,999, at 1,000,000.5, at 2, 3.5.
    assert steps(tmp_path) == [1, 4, 7, 8]


def test_what_a_successor_made_void_pushes_nothing_out(tmp_path: Path) -> None:
    """Attempt 2 went on to step 40 after attempt 3 had taken over at step 10; those are no newer ones of the run."""
    for step in (5, 10, 30, 40):
        write_checkpoint(tmp_path, make(step))  # by attempt 2
    write_checkpoint(tmp_path, replace(make(15), attempt=3))
    attempts = [Attempt(2, 0.0, 1, "none", 0), Attempt(3, 0.0, 1, "none", 10)]
    prune(tmp_path, 3, Retention(2), frozenset(), lambda step, number: is_superseded(step, number, attempts))
    assert steps(tmp_path) == [10, 15]


def test_what_older_attempts_left_is_removed_and_what_a_newer_one_has_is_not(tmp_path: Path) -> None:
    for step, attempt in ((10, 1), (20, 2), (30, 4)):
        write_checkpoint(tmp_path, replace(make(step), attempt=attempt))
    for step in (20, 30):
        (tmp_path / f"step-{step:08d}" / COMPLETE).unlink()  # not marked yet, or torn
    for attempt in (1, 3, 4):
        (tmp_path / f".step-00000040.attempt-{attempt:04d}.tmp").mkdir()
    (tmp_path / "step-00000010.bak").mkdir()  # somebody's own
    clear_leftovers(tmp_path, 3)
    names = [".step-00000040.attempt-0004.tmp", "step-00000010", "step-00000010.bak", "step-00000030"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    prune(tmp_path, 3, Retention(1), frozenset(), lambda step, number: True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[0], *names[2:]]


def test_an_older_attempt_leaves_the_checkpoint_of_a_newer_one_in_its_place(tmp_path: Path) -> None:
    """The successor came to the same step, and the older attempt has not found out yet."""
    write_checkpoint(tmp_path, replace(make(5), attempt=3))
    with pytest.raises(TakenOver):
        write_checkpoint(tmp_path, make(5))
    assert read_checkpoint(tmp_path / "step-00000005").attempt == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_what_was_moved_aside_comes_back(tmp_path: Path) -> None:
    """Whether nothing is in its place, or something that is not complete; but not for what is complete."""
    older = write_checkpoint(tmp_path / "older", replace(make(5), attempt=1))
    for there in ("nothing", "unmarked", "complete"):
        folder = tmp_path / there
        aside = folder / ".step-00000005.attempt-0002.aside"
        if there != "nothing":
            path = write_checkpoint(folder, make(5))
            if there == "unmarked":
                (path / COMPLETE).unlink()
        shutil.copytree(older, aside)
        bring_back(folder, 1)  # attempt 2 may still be at work
        assert aside.exists()
        bring_back(folder, 2)
        assert read_checkpoint(folder / "step-00000005").attempt == (2 if there == "complete" else 1)
        assert [path.name for path in folder.iterdir()] == ["step-00000005"]


def test_a_disk_that_is_full_gets_its_room_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, make(1))
    monkeypatch.setattr(module, "sync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, make(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


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
