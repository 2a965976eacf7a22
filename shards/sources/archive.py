"""Scenes in an uncompressed tar on this disk, used where they lie.

The headers are walked once. Of the 93 GB of the published archive 87 are passes that nobody reads: they cost a seek
each.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nsi.errors import UserError
from shards import tar
from shards.sources.listing import Folder
from shards.sources.members import Members, wanted_name
from shards.sources.scene import Place


def is_archive(path: Path) -> bool:
    """Whether a source is an uncompressed archive, by its name."""
    return path.name.endswith(".tar")


def list_archives(paths: Sequence[Path]) -> list[Folder]:
    """Every folder inside some archives that holds files of scenes, with these, in the order of their paths.

    The archives are parts of one data set: a folder may go on in the next. Raises UserError where one cannot be read,
    is cut or damaged, or holds what no archive of scenes has (links, names that lead out of it, a member twice), and
    where none holds a scene.
    """
    members = Members()
    for path in paths:
        try:
            _list(path, members)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check its name and permissions") from None
        except tar.Damage as error:
            raise UserError(f"{path}: {error}; fetch the archive again from where it was published") from None
    if not members.scenes:
        raise UserError(f"{', '.join(map(str, paths))}: holds no CLEVRTEX*.json; give an archive of CLEVRTex")
    return members.folders()


def _list(path: Path, members: Members) -> None:
    # Unbuffered, so that a header costs its own 512 bytes and not a buffer full of the picture behind it.
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size

        def skip(count: int) -> None:
            file.seek(min(file.tell() + count, size))

        for member in tar.walk(file, skip):
            if member.offset + member.size > size:
                raise tar.Damage(f"it ends at offset {size} in the middle of {member.name}, so it was cut")
            if name := wanted_name(member):
                place = Place(str(path), member.offset, member.size)
                members.add(str(path), name, member.offset - tar.BLOCK, place)
