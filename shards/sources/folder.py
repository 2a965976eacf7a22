"""Scenes in a folder on disk, at any depth."""

from __future__ import annotations

import os
from pathlib import Path

from nsi.errors import UserError
from shards.sources.listing import Folder, is_scene_json, is_wanted
from shards.sources.scene import Place


def list_folder(source: Path) -> list[Folder]:
    """Every folder below `source` that holds a scene's JSON, with its files, in the order of their paths.

    Raises UserError where `source` is missing, unreadable or holds no scene.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; give the folder that holds the scenes (clevrtexv2_full, say)")
    found: list[Folder] = []
    waiting = [str(source)]
    while waiting:
        path = waiting.pop()
        members: dict[str, Place] = {}
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir():
                        waiting.append(entry.path)
                    elif is_wanted(entry.name):
                        members[entry.name] = Place(entry.path, 0, entry.stat().st_size)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None
        if any(map(is_scene_json, members)):
            found.append(Folder(path, members))
    if not found:
        raise UserError(f"{source}: holds no CLEVRTEX*.json; unpack an archive there or run `nsi synth {source}`")
    return sorted(found)
