"""`nsi shard` beside `cp -r` of the same files: whole commands, warm page cache."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from launch.bench import Comparison, compare, note, stopwatch
from launch.bench_scenes import copied
from shards.sources.folder import list_folder
from shards.sources.listing import is_scene_json

COPIES = 10


def comparisons(data: Path | None, scenes: int) -> Iterator[Comparison]:
    """Both copies end in a fresh folder beside each other, which is removed and synced away outside the clock."""
    with contextlib.ExitStack() as closing:
        source = data or closing.enter_context(copied(scenes, COPIES))
        listed = list_folder(source)  # which warms the cache of names; the first round warms the rest
        count = sum(is_scene_json(name) for folder in listed for name in folder.members)
        target = Path(closing.enter_context(tempfile.TemporaryDirectory(dir=source.parent))) / "out"
        workers = str(os.cpu_count() or 1)
        shard = [sys.executable, "-m", "launch", "shard", str(source), str(target), "--workers", workers]
        copy = ["cp", "-r", str(source), str(target)]
        note(f"{count} scenes")
        for command in (copy, shard):
            _rate(command, target, count)
        for name, against, other in (
            ("shard/copy-vs-cp", "cp -r, which leaves the syncing to later", _rate),
            ("shard/copy-vs-cp-synced", "cp -r and sync, which leave the files on the disk as we do", _rate_synced),
        ):
            yield compare(
                name,
                "scenes/s",
                against,
                ours=lambda: _rate(shard, target, count),
                other=lambda other=other: other(copy, target, count),
            )


def _rate(command: Sequence[str], target: Path, count: int, then: Callable[[], None] = lambda: None) -> float:
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    with stopwatch() as seconds:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        then()
        return count / seconds()


def _rate_synced(command: Sequence[str], target: Path, count: int) -> float:
    return _rate(command, target, count, os.sync)
