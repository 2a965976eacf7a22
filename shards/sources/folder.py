"""Scenes in a folder on disk, at any depth."""

from __future__ import annotations

import os
from pathlib import Path

from nsi.errors import UserError
from shards.sources.listing import Folder, is_scene_json, is_scene_picture, is_wanted
from shards.sources.scene import Place


def list_folder(source: Path) -> list[Folder]:
    """Every folder below `source` that holds files of scenes, with these, in the order of their paths.

    Raises UserError where `source` is missing, unreadable or holds no scene.
    """
    if source.is_file():
        raise UserError(f"{source}: neither a folder nor an archive that is read here (.tar, .tar.gz, .tgz); unpack it")
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
        if any(is_scene_json(name) or is_scene_picture(name) for name in members):
            found.append(Folder(path, members))
    if not any(is_scene_json(name) for folder in found for name in folder.members):
        raise UserError(f"{source}: holds no CLEVRTEX*.json; unpack an archive there or run `nsi synth {source}`")
    return sorted(found)
