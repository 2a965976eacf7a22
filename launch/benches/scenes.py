"""Scenes for benchmarks: rendered for the purpose, and where many are wanted the same ones under many names."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launch.benches.comparison import note
from launch.progress import progress
from shards.synthetic.write import VARIANT, scene_folder, scene_name, write_scenes


@contextlib.contextmanager
def rendered(scenes: int) -> Iterator[Path]:
    """A folder of so many scenes of CLEVRTex's size, which goes away again."""
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "scenes"
        with progress("rendering", scenes, unit="scenes") as advance:
            write_scenes(source, scenes, 0, (320, 240), os.cpu_count() or 1, advance)
        yield source


@contextlib.contextmanager
def copied(scenes: int, times: int) -> Iterator[Path]:
    """A folder of `scenes` scenes, each `times` times under indices of its own."""
    with rendered(scenes) as source:
        note(f"copying each scene {times} times")
        out = source.with_name("copied")
        for copy in range(times):
            for index in range(scenes):
                _copy(source, index, out, copy * scenes + index)
        yield out / VARIANT


def _copy(source: Path, index: int, out: Path, as_index: int) -> None:
    old, new = scene_name(index), scene_name(as_index)
    target = scene_folder(out, as_index)
    target.mkdir(parents=True)
    for path in scene_folder(source, index).iterdir():
        data = path.read_bytes()
        if path.suffix == ".json":
            facts = json.loads(data.replace(old.encode(), new.encode()))
            data = json.dumps({**facts, "image_index": as_index}).encode()
        (target / path.name.replace(old, new)).write_bytes(data)
