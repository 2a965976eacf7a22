"""Goodput: buckets that add up to the wall time, whatever became of the attempts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.checkpoints.attempt import Attempt
from cluster.records.appender import Appender
from cluster.records.beat import beat_path, read_beat, write_beat
from cluster.records.clock import Clock, process_began, spent_since
from cluster.records.events import Event, EventLog
from cluster.records.goodput import BUCKETS, goodput


class Hand:
    """A clock's hand that a test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def attempt(number: int, started: float, restored: int) -> Attempt:
    return Attempt(number, started, 1, "none", restored)


def write_events(folder: Path, number: int, *events: tuple[str, int, dict[str, float]], **facts: object) -> None:
    lines = [json.dumps({"kind": k, "step": step, "seconds": seconds, "facts": facts}) for k, step, seconds in events]
    (folder / f"attempt-{number:04d}-rank-00000.jsonl").write_text("\n".join(lines) + "\n")


def beat(folder: Path, number: int, step: int, seconds: dict[str, float]) -> None:
    beat_path(folder, number).write_text(json.dumps({"time": 0.0, "step": step, "seconds": seconds}))


def test_a_clock_puts_every_second_into_one_bucket() -> None:
    hand = Hand()
    clock = Clock(0.0, hand)
    began = sum(clock.seconds().values())
    for bucket, spent in (("step", 2.0), ("data_wait", 3.0), ("step", 4.0)):
        clock.enter(bucket)  # type: ignore[arg-type]
        hand.now += spent
    with clock.spending("checkpoint"):
        hand.now += 1.0
    assert clock.place.bucket == "step"
    hand.now += 0.5
    found = clock.seconds()
    assert (found["step"], found["data_wait"], found["checkpoint"]) == (6.5, 3.0, 1.0)
    assert sum(found.values()) == pytest.approx(began + 10.5)


def test_a_process_began_before_now() -> None:
    import time

    assert 0 <= time.time() - process_began() < 3600


def test_one_attempt(tmp_path: Path) -> None:
    write_events(
        tmp_path,
        1,
        ("start", 0, {"start": 5.0}),
        ("steps", 10, {"step": 8.0, "data_wait": 2.0}),
        ("checkpoint", 10, {"checkpoint": 1.0}),
        ("stop", 10, {}),
    )
    found = goodput(tmp_path, [attempt(1, 100.0, 0)])
    assert found.wall_s == 16.0
    assert {bucket: spent for bucket, spent in found.seconds.items() if spent} == {
        "start": 5.0, "step": 8.0, "data_wait": 2.0, "checkpoint": 1.0,
    }  # fmt: skip


def test_a_killed_attempt_and_its_successor(tmp_path: Path) -> None:
    """Killed in step 15, restored at 8: of its second ten steps all, and of its first ten two, were done anew."""
    write_events(tmp_path, 1, ("start", 0, {"start": 5.0}), ("steps", 10, {"step": 10.0}))
    beat(tmp_path, 1, 14, {"start": 5.0, "step": 14.5})
    write_events(tmp_path, 2, ("start", 8, {"start": 4.0, "restore": 1.0}), ("steps", 20, {"step": 12.0}))
    found = goodput(tmp_path, [attempt(1, 100.0, 0), attempt(2, 130.0, 8)])
    assert found.wall_s == 47.0
    assert sum(found.seconds.values()) == pytest.approx(47.0)
    assert found.seconds["queue"] == pytest.approx(130 - 119.5)
    assert found.seconds["replayed"] == pytest.approx(2.0 + 4.5)
    assert found.seconds["step"] == pytest.approx(8.0 + 12.0)


def test_an_attempt_that_lives_on_beside_its_successor(tmp_path: Path) -> None:
    write_events(tmp_path, 1, ("start", 0, {"start": 5.0}), ("steps", 50, {"step": 50.0}))
    write_events(tmp_path, 2, ("start", 0, {"start": 5.0}), ("steps", 10, {"step": 10.0}))
    found = goodput(tmp_path, [attempt(1, 100.0, 0), attempt(2, 120.0, 0)])
    assert found.wall_s == 35.0  # 20 seconds of the first, 15 of the second
    assert sum(found.seconds.values()) == pytest.approx(35.0)
    assert found.seconds["replayed"] == pytest.approx(15.0)


def test_a_hang_is_the_last_standstill_alone(tmp_path: Path) -> None:
    """What was done since the last logged step was no hang."""
    write_events(
        tmp_path,
        1,
        ("start", 0, {"start": 5.0}),
        ("steps", 10, {"step": 10.0}),
        ("ended", 14, {"step": 4.0, "data_wait": 61.0}),
        bucket="data_wait",
        idle_s=60.0,
    )
    beat(tmp_path, 1, 14, {"start": 5.0, "step": 14.0, "data_wait": 62.0})
    found = goodput(tmp_path, [attempt(1, 100.0, 0)])
    assert found.wall_s == 80.0
    assert {bucket: spent for bucket, spent in found.seconds.items() if spent} == {
        "start": 5.0, "step": 14.0, "data_wait": 1.0, "hang": 60.0,
    }  # fmt: skip


def test_a_stopped_attempt_lost_nothing(tmp_path: Path) -> None:
    write_events(tmp_path, 1, ("steps", 10, {"step": 10.0}), ("stop", 10, {"checkpoint": 1.0}))
    beat(tmp_path, 1, 10, {"step": 10.5, "checkpoint": 1.0})
    write_events(tmp_path, 2, ("start", 10, {"start": 1.0}))
    found = goodput(tmp_path, [attempt(1, 0.0, 0), attempt(2, 20.0, 10)])
    assert found.seconds["replayed"] == 0
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s)


def test_nothing_at_all(tmp_path: Path) -> None:
    found = goodput(tmp_path, [])
    assert (found.wall_s, found.share("step")) == (0.0, 0.0)
    found = goodput(tmp_path, [attempt(1, 5.0, 0), attempt(2, 9.0, 0)])  # both were killed before they could speak
    assert (found.wall_s, found.seconds["queue"]) == (4.0, 4.0)
    assert set(found.seconds) == set(BUCKETS)


def test_events_carry_the_time_since_the_one_before(tmp_path: Path) -> None:
    hand = Hand()
    clock, appender = Clock(0.0, hand), Appender()
    log = EventLog(tmp_path, 1, 0, [], clock, appender)
    first = log.record(log.instant("start"))
    clock.enter("step")
    hand.now += 2.0
    second = log.record(Event("steps", 1, 0.0, 0.0))
    write_beat(beat_path(tmp_path, 1), clock)
    assert appender.close() == 0
    assert second.seconds == {"step": 2.0}
    told = read_beat(beat_path(tmp_path, 1))
    assert told is not None
    assert spent_since(first.seconds, told["seconds"]) == {"step": 2.0}
