"""TensorBoard's file: what it reads, and that trouble with the disk passes."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from cluster.records.events import Event
from cluster.records.sinks import Board


def scalars(folder: Path, name: str) -> dict[int, float]:
    """What TensorBoard itself finds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return {each.step: each.value for each in EventAccumulator(str(folder)).Reload().Scalars(name)}


def step(number: int) -> Event:
    return Event("steps", number, 0.0, 1.0, {"loss": number / 2, "broken": float("nan"), "faults": ["no number"]})


def test_all_steps_can_be_read_and_pictures_too(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Board(tmp_path) as board:
        for number in range(1, 101):
            board.show(step(number))
        board.show(Event("checkpoint", 100, 0.0, 1.0, {"loss": 7.0}))
        board.picture("slots", torch.zeros(3, 4, 4), 100)
    assert scalars(tmp_path, "train/loss") == {number: number / 2 for number in range(1, 101)}
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert sorted(tags["scalars"]) == ["train/broken", "train/loss"]
    assert tags["images"] == ["slots"]


def test_what_a_disk_in_trouble_did_not_take_is_written_later(tmp_path: Path) -> None:
    folder = tmp_path / "board"
    folder.write_text("in the way")
    with Board(folder) as board:
        board.show(step(1))
        troubles: list[str] = []
        while not troubles:
            troubles = board.troubles()
            time.sleep(0.01)
        folder.unlink()
        board.show(step(2))
        while not folder.is_dir() or not any(path.stat().st_size for path in folder.iterdir()):
            time.sleep(0.01)
    assert "cannot be written" in troubles[0]
    assert scalars(folder, "train/loss") == {1: 0.5, 2: 1.0}


def test_a_file_that_vanished_is_begun_anew(tmp_path: Path) -> None:
    with Board(tmp_path) as board:
        board.show(step(1))
        while not list(tmp_path.iterdir()):
            time.sleep(0.01)
        for path in tmp_path.iterdir():
            path.rename(tmp_path.with_name("gone"))
        board.show(step(2))
    assert scalars(tmp_path, "train/loss")[2] == 1.0
