"""The members of archives that scenes are made of: checked one by one as they come, put together by folder."""

from __future__ import annotations

import posixpath
import re
from typing import NamedTuple

from shards.sources.listing import Folder, is_scene_json, is_scene_picture, is_wanted
from shards.sources.scene import JSON_LIMIT, PICTURE_LIMIT, Place
from shards.tar import BLOCK, Damage, Member

_NEVER_IN_NAMES = re.compile(r"[\x00-\x1f\x7f\\]")


class _Found(NamedTuple):
    place: Place
    archive: str
    offset: int


class Members:
    """What has been found so far, over all archives of one data set."""

    def __init__(self) -> None:
        self.scenes = 0  # JSONs so far
        self._folders: dict[str, dict[str, _Found]] = {}  # by folder inside the archive, then by file name

    def add(self, archive: str, name: str, offset: int, place: Place) -> None:
        """A member: the archive and offset that it stands at, for messages, and where its bytes can be read.

        Raises Damage where it is there already.
        """
        folder, base = posixpath.split(name)
        found = _Found(place, archive, offset)
        first = self._folders.setdefault(folder, {}).setdefault(base, found)
        if first is not found:
            where = f"offset {first.offset}" + (f" of {first.archive}" if first.archive != archive else "")
            raise Damage(f"{name} at offset {offset} is the same member as at {where}")
        self.scenes += is_scene_json(base)

    def folders(self) -> list[Folder]:
        """Those that hold files of scenes, in the order of their paths, named by the first archive that has them."""
        folders = []
        for folder, members in sorted(self._folders.items()):
            if any(is_scene_json(base) or is_scene_picture(base) for base in members):
                archive = next(iter(members.values())).archive
                places = {base: found.place for base, found in members.items()}
                folders.append(Folder(f"{archive}/{folder}" if folder else archive, places))
        return folders


def wanted_name(member: Member) -> str | None:
    """The name of a member that may belong to a scene, without `./`; None for one that does not.

    Raises Damage for what no archive of scenes has and a careless reader could be led astray by.
    """
    at = f"at offset {member.offset - BLOCK}"
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts or _NEVER_IN_NAMES.search(member.name):
        raise Damage(f"the name {member.name!r} {at} leads out of the archive's folder")
    if member.kind == "link":
        raise Damage(f"{member.name} {at} is a link")
    base = parts[-1]
    if not is_wanted(base):
        return None
    if member.kind != "file":
        raise Damage(f"{member.name} {at} is no plain file")
    if member.size > (JSON_LIMIT if is_scene_json(base) else PICTURE_LIMIT):
        what = "any scene's JSON" if is_scene_json(base) else "any picture"
        raise Damage(f"{member.name} {at} has {member.size} bytes, more than {what}")
    return posixpath.normpath(member.name)
