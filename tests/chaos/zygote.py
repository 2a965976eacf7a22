"""Imports all of training once, then forks a real rank for each request: own process, session, environment and files.

A start costs seconds of imports, and a chaos run has hundreds. A forked rank runs `nsi train` unchanged; it may be
told to end itself at a delicate call (`Cut`), for which the functions of the os module are wrapped in it alone.

Requests and answers are JSON lines on stdin and stdout:

    {"start": {"environment": {...}, "arguments": [...], "log": "FILE", "cut": {...} or null}}  ->  {"pid": 123}
    {"poll": [123, 124]}  ->  {"123": -9}       what ended since it was last asked for, with its status
"""

from __future__ import annotations

import functools
import gc
import importlib
import io
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

IMPORTS = (
    *("deepspeed", "safetensors.torch", "torch.utils.tensorboard", "tyro", "timm", "rich.progress"),
    *("launch.cli", "launch.train", "launch.training.run"),
)
# Between these a file or a name is half-way: what writes them calls them by these names.
DELICATE = ("rename", "replace", "fsync", "unlink", "rmdir", "write")


def main() -> None:
    """Serves until stdin ends; then no rank is left."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what imports print is no answer
    import torch

    torch.set_num_threads(1)
    for name in IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads; a fork would lose all but one"
    print(json.dumps({"ready": os.getpid()}), file=answers)
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if not pid:
                answers.close()
                be_a_rank(**request["start"])
            running.add(pid)
            answer: dict[str, Any] = {"pid": pid}
        else:
            answer = {}
            for pid in running & set(request["poll"]):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    running.remove(pid)
                    answer[str(pid)] = os.waitstatus_to_exitcode(status)
        print(json.dumps(answer), file=answers)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def be_a_rank(environment: dict[str, str], arguments: list[str], log: str, cut: dict[str, Any] | None) -> None:
    """What a forked process does: it never returns."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((null, 0), (file, 1), (file, 2)):
        os.dup2(descriptor, place)
    sys.argv = ["nsi", *arguments]
    if cut:
        cut_at(**cut)
    from launch.cli import main as command_line

    command_line(arguments)


def cut_at(number: int, below: str, note: str) -> None:
    """Has this process kill itself at its `number`-th delicate call for a path below a folder, not done or, of a
    write, half done. It writes before to the file `note` which call that was."""
    calls = itertools.count(1)  # several threads call

    def is_it(name: str, path: Any, folder: int | None = None) -> bool:
        place = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
        if folder is not None:  # shutil.rmtree goes through folders by their descriptors
            place = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), place)
        if not str(place).startswith(below) or next(calls) != number:
            return False
        Path(note).write_text(f"{name} {str(place)[len(below) :].strip('/')}")
        return True

    def watched(original: Callable, name: str) -> Callable:
        @functools.wraps(original)
        def call(path: Any, *others: Any, **options: Any) -> Any:
            if is_it(name, path, options.get("dir_fd")):
                if name == "write":
                    original(path, others[0][: len(others[0]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(path, *others, **options)

        return call

    for name in DELICATE:
        setattr(os, name, watched(getattr(os, name), name))
    open_file = io.open

    def create(path: Any, mode: str = "r", *others: Any, **options: Any) -> Any:
        opened = open_file(path, mode, *others, **options)
        if "x" in mode and is_it("create", path):  # an attempt has taken its number, and not said a word
            os.kill(os.getpid(), signal.SIGKILL)
        return opened

    io.open = create


if __name__ == "__main__":
    main()
