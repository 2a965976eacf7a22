"""Appends lines to files from a thread of its own: a disk that is slow or full holds up no step and loses no line.

Lines reach the disk in the order in which they were given, whatever their files, so that a reader never finds a later
record without an earlier one. Where a file cannot be written, all wait in memory and are tried again.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from pathlib import Path

from cluster.durable import sync

RETRY_S = 1.0
CLOSE_S = 10.0  # what a disk may take for the last lines of a run


class Appender:
    """Files that lines are appended to. Its methods may be called from any thread."""

    def __init__(self, retry_s: float = RETRY_S) -> None:
        self._retry_s = retry_s
        self._changed = threading.Condition()
        self._pending: deque[tuple[Path, bytes]] = deque()
        self._error: OSError | None = None  # of the last try
        self._troubles: list[str] = []
        self._closing = False
        self._files: dict[Path, int] = {}
        self._thread = threading.Thread(target=self._work, name="appender", daemon=True)
        self._thread.start()

    def append(self, path: Path, line: bytes) -> None:
        """Takes a line, with its newline, and returns at once."""
        with self._changed:
            self._pending.append((path, line))
            self._changed.notify_all()

    def sync(self, path: Path) -> None:
        """Returns when all lines given so far lie on disk. Raises OSError where they cannot."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending or self._error)
            if self._error:
                raise self._error
        if path.exists():
            sync(path)
            sync(path.parent)

    def troubles(self) -> list[str]:
        """What went wrong since the last call: a line each time that writing began to fail."""
        with self._changed:
            troubles, self._troubles = self._troubles, []
        return troubles

    def close(self, timeout_s: float = CLOSE_S) -> int:
        """Writes what is left, trying for so long, and returns how many lines could not be written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending, timeout_s)
            self._closing = True
            self._changed.notify_all()
            left = len(self._pending)
        self._thread.join(self._retry_s + 1)
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        return left

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if self._closing:
                    return
                path, lines = self._pending[0][0], []
                for other, line in self._pending:  # what goes to one file goes in one write
                    if other != path:
                        break
                    lines.append(line)
            try:
                self._write(path, lines)
            except OSError as error:
                with self._changed:
                    if not self._error:
                        reason = error.strerror or error
                        self._troubles.append(f"{path}: cannot be written ({reason}); its lines wait in memory")
                    self._error = error
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closing, self._retry_s)
            else:
                with self._changed:
                    self._error = None
                    self._changed.notify_all()

    def _write(self, path: Path, lines: list[bytes]) -> None:
        """Writes whole lines; what a full disk took of them is not written again."""
        file = self._open(path)
        data, written = b"".join(lines), 0
        try:
            while written < len(data):
                written += os.write(file, data[written:])
        finally:
            with self._changed:
                for line in lines:
                    taken, written = min(written, len(line)), written - min(written, len(line))
                    if taken < len(line):
                        self._pending[0] = path, line[taken:]
                        break
                    self._pending.popleft()

    def _open(self, path: Path) -> int:
        """The file, made again where somebody has removed or replaced it."""
        file = self._files.get(path)
        if file is not None:
            try:
                there = os.stat(path)
                if os.path.samestat(there, os.fstat(file)):
                    return file
            except FileNotFoundError:
                pass
            os.close(self._files.pop(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._files[path] = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self._files[path]
