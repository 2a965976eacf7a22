"""The appender: lines in order, none lost, whatever the disk does meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from cluster.records.appender import Appender


def test_lines_of_several_files_keep_their_order(tmp_path: Path) -> None:
    appender = Appender()
    for number in range(200):
        appender.append(tmp_path / "deep" / f"{number % 3}.txt", f"{number}\n".encode())
    appender.sync(tmp_path / "deep" / "0.txt")
    assert appender.close() == 0
    for rest in range(3):
        lines = (tmp_path / "deep" / f"{rest}.txt").read_text().split()
        assert lines == [str(number) for number in range(rest, 200, 3)]


def test_a_file_that_vanished_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    appender = Appender()
    appender.append(path, b"one\n")
    appender.sync(path)
    path.unlink()
    appender.append(path, b"two\n")
    assert appender.close() == 0
    assert path.read_text() == "two\n"


def test_what_waits_is_written_when_there_is_room_again(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("in the way")
    path = tmp_path / "folder" / "lines.txt"
    appender = Appender(retry_s=0.01)
    began = time.monotonic()
    appender.append(path, b"one\n")
    appender.append(path, b"two\n")
    assert time.monotonic() - began < 5  # nobody waited
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        appender.sync(path)
    (tmp_path / "folder").unlink()
    assert appender.close() == 0
    assert path.read_text() == "one\ntwo\n"
    assert len(appender.troubles()) == 1


def test_lines_that_cannot_be_written_are_counted(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("in the way")
    appender = Appender(retry_s=0.01)
    for _ in range(3):
        appender.append(tmp_path / "folder" / "lines.txt", b"line\n")
    assert appender.close(timeout_s=0.1) == 3


def test_a_short_write_is_finished_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that becomes full in the middle of a line, and has room again later."""
    real, told = os.write, iter([3, OSError(28, "No space left on device")])

    def write(file: int, data: bytes) -> int:
        now = next(told, None)
        if isinstance(now, OSError):
            raise now
        return real(file, data if now is None else data[:now])

    monkeypatch.setattr("cluster.records.appender.os.write", write)
    appender = Appender(retry_s=0.01)
    appender.append(tmp_path / "lines.txt", b"first\n")
    appender.append(tmp_path / "lines.txt", b"second\n")
    assert appender.close() == 0
    assert (tmp_path / "lines.txt").read_text() == "first\nsecond\n"


def test_a_later_line_never_comes_before_an_earlier_one_of_a_file_named_first(tmp_path: Path) -> None:
    """Whatever the moment of a look: what the metrics tell, the ledger has."""
    ledger, metrics = tmp_path / "ledger.txt", tmp_path / "metrics.txt"
    appender = Appender()
    appender.append(ledger, b"")
    looks = number = 0
    while looks < 20:
        number += 1
        appender.append(ledger, f"{number}\n".encode())
        appender.append(metrics, f"{number}\n".encode())
        if number % 50 == 0 and metrics.exists():
            told = len(metrics.read_text().split())
            assert len(ledger.read_text().split()) >= told
            looks += 1
    assert appender.close() == 0


def test_lines_that_wait_go_in_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are by then: on a slow disk they do not become more and more."""
    (tmp_path / "folder").write_text("in the way")
    appender = Appender(retry_s=0.01)
    for number in range(100):
        for name in ("a", "b"):
            appender.append(tmp_path / "folder" / name, f"{number}\n".encode())
    real, writes = os.write, []
    monkeypatch.setattr("cluster.records.appender.os.write", lambda file, data: writes.append(data) or real(file, data))
    (tmp_path / "folder").unlink()
    assert appender.close() == 0
    assert [len(data.split()) for data in writes] == [100, 100]


def test_a_file_in_trouble_holds_up_those_named_after_it_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("in the way")
    first, last = tmp_path / "first.txt", tmp_path / "last.txt"
    appender = Appender(retry_s=0.01)
    for path in (first, tmp_path / "folder" / "second.txt", last):
        appender.append(path, b"line\n")
    appender.sync(first)
    assert first.read_text() == "line\n"
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        appender.sync(last)
    assert not last.exists()
    appender.append(first, b"another\n")
    appender.sync(first)
    (tmp_path / "folder").unlink()
    assert appender.close() == 0
    assert last.read_text() == "line\n"


def test_a_line_that_a_process_before_left_torn_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("one\ntw")
    for line in (b"three\n", b"four\n"):
        appender = Appender()
        appender.append(path, line)
        assert appender.close() == 0
    assert path.read_text() == "one\ntw\nthree\nfour\n"


def test_the_end_does_not_wait_for_a_disk_that_has_failed_long_enough(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("in the way")
    path = tmp_path / "folder" / "lines.txt"
    appender = Appender(retry_s=0.01)
    appender.append(path, b"line\n")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        appender.sync(path)
    appender._failing_since -= 3600
    began = time.monotonic()
    assert appender.close(timeout_s=3600) == 1
    assert time.monotonic() - began < 600
