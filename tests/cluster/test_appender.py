"""The appender: lines in order, none lost, whatever the disk does meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from cluster.appender import Appender


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

    monkeypatch.setattr("cluster.appender.os.write", write)
    appender = Appender(retry_s=0.01)
    appender.append(tmp_path / "lines.txt", b"first\n")
    appender.append(tmp_path / "lines.txt", b"second\n")
    assert appender.close() == 0
    assert (tmp_path / "lines.txt").read_text() == "first\nsecond\n"
