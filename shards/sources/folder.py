"""Scenes in a folder on disk, at any depth."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from nsi.errors import UserError
from shards.sources.listing import Folder, is_scene_json, is_scene_picture, is_wanted


def list_folder(source: Path) -> list[Folder]:
    """What `walk_folder` finds, in the order of the paths."""
    return sorted(walk_folder(source), key=lambda folder: folder.name)


def walk_folder(source: Path) -> Iterator[Folder]:
    """Every folder below `source` that holds files of scenes, with their names.

    No file is looked at: `read_scenes` does it, in the processes that read them. Raises UserError where `source` is
    missing, unreadable or holds no scene.
    """
    if source.is_file():
        raise UserError(f"{source}: neither a folder nor an archive that is read here (.tar, .tar.gz, .tgz); unpack it")
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; give the folder that holds the scenes (clevrtexv2_full, say)")
    waiting = [str(source)]
    has_scene = False
    while waiting:
        path = waiting.pop()
        names: list[str] = []
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir():
                        waiting.append(entry.path)
                    elif is_wanted(entry.name):
                        names.append(entry.name)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None
        if any(map(is_scene_json, names)):
            has_scene = True
        elif not any(map(is_scene_picture, names)):
            continue
        yield Folder(path, dict.fromkeys(names))
    if not has_scene:
        raise UserError(f"{source}: holds no CLEVRTEX*.json; unpack an archive there or run `nsi synth {source}`")
