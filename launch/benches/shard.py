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

from launch.benches.comparison import Comparison, compared, note, stopwatch
from launch.benches.scenes import copied
from nsi.errors import UserError
from shards.sources.folder import list_folder
from shards.sources.listing import is_scene_json, places_in

COPIES = 10
ROUNDS = 3


def comparisons(data: Path | None, scenes: int) -> Iterator[Comparison]:
    """All commands in turn, each into a folder of its own; these go away at the end.

    Removed earlier, they would leave their blocks to the next command, and some disks take many times as long to write
    to a block that was freed a moment ago. Raises UserError where the disk is too small for all of them.
    """
    with contextlib.ExitStack() as closing:
        source = data or closing.enter_context(copied(scenes, COPIES))
        target = Path(closing.enter_context(tempfile.TemporaryDirectory(dir=source.parent)))
        if data:
            source = linked(data, target / "same")
        listed = list_folder(source)
        places = [place for folder in listed for place in places_in(folder).values()]
        count = sum(is_scene_json(name) for folder in listed for name in folder.members)
        _check_room(target, (3 * ROUNDS + 2) * sum(place.size for place in places))
        for place in places:
            Path(place.path).read_bytes()  # the page cache is warm for everybody
        note(f"{count} scenes, {ROUNDS} rounds")
        workers = str(os.cpu_count() or 1)
        shard = [sys.executable, "-m", "launch", "shard", str(source), "OUT", "--workers", workers]
        copy = ["cp", "-r", str(source), "OUT"]
        ours, plain, synced = [], [], []
        for number in range(ROUNDS):
            plain.append(count / _seconds(copy, target / f"plain-{number}"))
            ours.append(count / _seconds(shard, target / f"ours-{number}"))
            synced.append(count / _seconds(copy, target / f"synced-{number}", then=os.sync))
        yield compared("shard/copy-vs-cp", "scenes/s", "cp -r, which leaves the syncing to later", ours, plain)
        yield compared("shard/copy-vs-cp-synced", "scenes/s", "cp -r and sync, as we sync", ours, synced)


def linked(source: Path, out: Path) -> Path:
    """The files of scenes alone, under other names: `cp -r` of CLEVRTex itself would copy all the passes as well."""
    for folder in list_folder(source):
        into = out / Path(folder.name).relative_to(source)
        into.mkdir(parents=True, exist_ok=True)
        for place in places_in(folder).values():
            _link(os.path.realpath(place.path), into / Path(place.path).name)
    return out


def _link(source: str, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # it lies on another disk, or is somebody else's
        shutil.copyfile(source, target)


def _seconds(command: Sequence[str], target: Path, then: Callable[[], None] = lambda: None) -> float:
    os.sync()
    with stopwatch() as seconds:
        subprocess.run(
            [str(target) if word == "OUT" else word for word in command],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        then()
        return seconds()


def _check_room(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if free < needed:
        raise UserError(
            f"{target.parent}: has {free / 1e9:.0f} GB free, and the rounds need {needed / 1e9:.0f} GB for a while; "
            "give fewer --scenes, or a smaller --data"
        )
