"""Appends lines to files from a thread of its own: a disk that is slow or full holds up no step and loses no line.

All that waits for a file goes in one write, so that a slow disk does not fall further and further behind. Files take
turns in the order in which they were first named: a reader never finds a line without those that were given before it
to a file named earlier. Where a file cannot be written, it and those named later wait in memory and are tried again.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
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
        self._files: dict[Path, _File] = {}
        self._failed: tuple[_File, OSError] | None = None  # in the last round
        self._failing_since = 0.0
        self._troubles: list[str] = []
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="appender", daemon=True)
        self._thread.start()

    def append(self, path: Path, line: bytes) -> None:
        """Takes a line, with its newline, and returns at once."""
        with self._changed:
            if path not in self._files:
                self._files[path] = _File(path, len(self._files))
            self._files[path].give(line)
            self._changed.notify_all()

    def sync(self, path: Path) -> None:
        """Returns when all lines given so far to a file, and to those named before it, lie on disk. Raises OSError
        where they cannot."""
        with self._changed:
            last = self._files[path].turn
            goals = [(file, file.given) for file in self._files.values() if file.turn <= last]

            def error() -> OSError | None:
                return self._failed[1] if self._failed and self._failed[0].turn <= last else None

            self._changed.wait_for(lambda: error() or all(file.written >= goal for file, goal in goals))
            if found := error():
                raise found
        if path.exists():
            sync(path)
            sync(path.parent)

    def tell(self, trouble: str) -> None:
        """Takes what another thread could not do in the same storage, for `troubles`."""
        with self._changed:
            self._troubles.append(trouble)

    def troubles(self) -> list[str]:
        """What went wrong since the last call: a line each time that writing began to fail, and what `tell` took."""
        with self._changed:
            troubles, self._troubles = self._troubles, []
        return troubles

    def close(self, timeout_s: float = CLOSE_S) -> int:
        """Writes what is left, trying for so long, and returns how many lines could not be written. Where all that
        time has been tried in vain already, only once more."""
        with self._changed:
            tried_s = time.monotonic() - self._failing_since if self._failed else 0.0
            self._changed.wait_for(lambda: not self._left(), max(timeout_s - tried_s, 2 * self._retry_s))
            self._closing = True
            self._changed.notify_all()
            left = self._left()
        self._thread.join(self._retry_s + 1)
        for file in self._files.values():
            file.close()
        return left

    def _left(self) -> int:
        return sum(file.given - file.written for file in self._files.values())

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._left() or self._closing)
                if self._closing:
                    return
                # What comes from now on waits for the next round: it may belong behind a file whose turn is over.
                turns = [(file, list(file.pending)) for file in self._files.values() if file.pending]
            failed = self._take_turns(turns)
            with self._changed:
                if failed and not (self._failed and self._failed[0] is failed[0]):
                    reason = failed[1].strerror or failed[1]
                    self._troubles.append(f"{failed[0].path}: cannot be written ({reason}); its lines wait in memory")
                if failed and not self._failed:
                    self._failing_since = time.monotonic()
                self._failed = failed
                self._changed.notify_all()
                if failed:
                    self._changed.wait_for(lambda: self._closing, self._retry_s)

    def _take_turns(self, turns: list[tuple[_File, list[bytes]]]) -> tuple[_File, OSError] | None:
        """Writes file after file, until one cannot be written."""
        for file, lines in turns:
            taken, error = file.write(b"".join(lines))
            with self._changed:
                if taken or not error:
                    file.drop(taken, len(lines))
                self._changed.notify_all()
            if error:
                return file, error
        return None


class _File:
    """A file that is appended to, and what waits for it. All but `write` and `close` needs the appender's lock."""

    def __init__(self, path: Path, turn: int) -> None:
        self.path, self.turn = path, turn
        self.given = self.written = 0  # lines
        self.pending: deque[bytes] = deque()
        self._is_ours = False  # its last line
        self._descriptor: int | None = None

    def give(self, line: bytes) -> None:
        """Takes a line."""
        self.pending.append(line)
        self.given += 1

    def drop(self, taken: int, lines: int) -> None:
        """Forgets so many bytes, of at most so many lines, that have been written; of a line that a full disk took
        in part, the rest waits on."""
        for _ in range(lines):
            line = self.pending[0]
            if taken < len(line):
                self.pending[0] = line[taken:]
                return
            taken -= len(line)
            self.pending.popleft()
            self.written += 1

    def write(self, data: bytes) -> tuple[int, OSError | None]:
        """Writes what it can, and says how many bytes that was."""
        written = 0
        try:
            descriptor = self._open()
            while written < len(data):
                written += os.write(descriptor, data[written:])
        except OSError as error:
            self.close()  # the next try opens anew: what stood in the way may be the descriptor itself
            return written, error
        return written, None

    def close(self) -> None:
        """Closes the file until it is written again."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        """The file, made again where somebody has removed or replaced it."""
        if self._descriptor is not None:
            try:
                if os.path.samestat(os.stat(self.path), os.fstat(self._descriptor)):
                    return self._descriptor
            except FileNotFoundError:
                pass
            self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        size = os.fstat(self._descriptor).st_size
        if not self._is_ours and size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")  # a process before us was cut: our first line must not be glued to that
        self._is_ours = True
        return self._descriptor
