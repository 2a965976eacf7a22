"""The lookout: it beats, learns of a newer attempt, tells what it cannot see, and nobody waits for it."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.checkpoints.attempt import Attempt, take_attempt
from cluster.records.appender import Appender
from cluster.records.beat import beat_path, read_beat, write_beat
from cluster.records.clock import Clock
from cluster.watch.stop import StopRequest
from launch.training import lookout
from launch.training.lookout import Lookout


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "BEAT_S", 0.01)


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return take_attempt(tmp_path / "attempts", 1, "none", 0)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_attempt_learns_that_it_was_replaced(tmp_path: Path, attempt: Attempt) -> None:
    beat = beat_path(tmp_path / "events", attempt.number)
    with Lookout(tmp_path, attempt, Clock(time.time()), StopRequest(), lambda text: None) as watching:
        wait_for(lambda: read_beat(beat))
        assert not watching.is_replaced
        take_attempt(tmp_path / "attempts", 1, "none", 0)
        wait_for(lambda: watching.is_replaced)


def test_what_cannot_be_seen_is_told_once_and_ends_nothing(tmp_path: Path, attempt: Attempt) -> None:
    unreadable = tmp_path / "attempts" / "attempt-0002.json"
    unreadable.mkdir()
    beat, appender, told = beat_path(tmp_path / "events", attempt.number), Appender(), []
    with Lookout(tmp_path, attempt, Clock(time.time()), StopRequest(), appender.tell) as watching:
        wait_for(lambda: told.extend(appender.troubles()) or told)
        beat.unlink()
        for _ in range(2 * lookout.LOOK_EVERY):  # as many beats, and two looks
            wait_for(beat.exists)
            beat.unlink()
        assert not watching.is_replaced
        unreadable.rmdir()
        take_attempt(tmp_path / "attempts", 1, "none", 0)
        wait_for(lambda: watching.is_replaced)
    (text,) = [*told, *appender.troubles()]
    assert text.startswith(f"{tmp_path / 'attempts'}: cannot be read (Is a directory)")
    appender.close()


def test_a_stop_file_is_seen_at_the_start_and_later(tmp_path: Path, attempt: Attempt) -> None:
    at_the_start, later = StopRequest(), StopRequest()
    with Lookout(tmp_path, attempt, Clock(time.time()), later, lambda text: None):
        wait_for(lambda: read_beat(beat_path(tmp_path / "events", attempt.number)))
        assert not later.look(math.inf)
        (tmp_path / "stop").touch()
        wait_for(lambda: later.look(math.inf))
        assert not later.is_overdue(60)
    with Lookout(tmp_path, attempt, Clock(time.time()), at_the_start, lambda text: None):
        assert at_the_start.look(math.inf)
    assert (at_the_start.reason, later.reason) == (str(tmp_path / "stop"),) * 2


def test_nobody_waits_for_a_storage_that_stands_still(tmp_path: Path, attempt: Attempt) -> None:
    beat = beat_path(tmp_path / "events", attempt.number)
    beat.parent.mkdir()
    os.mkfifo(beat)  # to open it is to wait until somebody reads
    with Lookout(tmp_path, attempt, Clock(time.time()), StopRequest(), lambda text: None):
        (thread,) = [each for each in threading.enumerate() if each.name == "lookout"]
        wait_for(lambda: sys._current_frames()[thread.ident].f_code is write_beat.__code__)
    assert thread.is_alive()
    assert thread.daemon
    os.close(os.open(beat, os.O_RDONLY))  # the storage goes on, and the lookout sees that it is over
    thread.join(60)
    assert not thread.is_alive()
