"""From members by name to scenes: which JSON, image and mask belong together, in both layouts of CLEVRTex.

    v2  NAME/NAME.json   NAME_0003.png   NAME_flat_0003.png
    v1  NAME.json        NAME.png        NAME_flat.png

Names come from the JSON where it has them (v2) and from the JSON's own file name otherwise (v1).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import xxhash

from nsi.errors import UserError
from shards.sources.scene import JSON_LIMIT, PICTURE_LIMIT, Place, Scene, describe, parse_facts, read_place

V2_FRAME = "0003.png"  # the frame number that the renderer appended to every v2 file
_PREFIX = "CLEVRTEX"
_PICTURE = re.compile(rf"({_PREFIX}[A-Za-z0-9]*_[A-Za-z]+_\d{{6,}})(?:_flat)?(?:_{V2_FRAME[:-4]})?\.png")
_PASSES = ("_depth_", "_albedo_", "_normal_", "_shadow_")  # rendered beside the image; nobody reads them


class Folder(NamedTuple):
    """The members of one folder, by file name: where they lie, or None for files in a folder on disk."""

    name: str
    members: Mapping[str, Place | None]


class Names(NamedTuple):
    """Names that scenes use, each with the JSON that used it first."""

    sizes: dict[str, str]
    shapes: dict[str, str]
    materials: dict[str, str]


def is_scene_json(name: str) -> bool:
    """Whether a file's name is that of a scene's JSON."""
    return name.startswith(_PREFIX) and name.endswith(".json")


def is_wanted(name: str) -> bool:
    """Whether a file may belong to a scene, by its name; the renderer's other passes do not."""
    return is_scene_json(name) or (name.endswith(".png") and not any(each in name for each in _PASSES))


def read_scenes(folders: Sequence[Folder]) -> tuple[list[Scene], Names]:
    """Every scene of some folders, checked, in the order of their names, and the names they use.

    Raises UserError, naming the file, for anything that training could not use.
    """
    scenes, names = [], Names({}, {}, {})
    for folder in folders:
        members = places_in(folder)
        _check_no_orphans(members)
        for name in sorted(filter(is_scene_json, members)):
            scenes.append(_read_scene(name, members, names))
    return scenes, names


def places_in(folder: Folder) -> dict[str, Place]:
    """The place of every member. Raises UserError for one that is no file or cannot be looked at."""
    return {name: place or _place_of(f"{folder.name}/{name}") for name, place in folder.members.items()}


def _place_of(path: str) -> Place:
    try:
        facts = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore the file or remove its scene") from None
    if not stat.S_ISREG(facts.st_mode):  # reading a pipe would wait for ever
        raise UserError(f"{path}: no plain file, though it has a scene's name; remove it")
    return Place(path, 0, facts.st_size)


def is_scene_picture(name: str) -> bool:
    """Whether a file's name is that of a scene's image or mask, in either layout."""
    return _PICTURE.fullmatch(name) is not None


def merge_names(parts: Iterable[Names]) -> Names:
    """The names of several parts; the first part's JSONs stand for those that several use."""
    merged = Names({}, {}, {})
    for part in parts:
        for all_names, names in zip(merged, part, strict=True):
            for name, where in names.items():
                all_names.setdefault(name, where)
    return merged


def _check_no_orphans(members: Mapping[str, Place]) -> None:
    """Raises UserError for a picture whose JSON is missing: a scene must not get lost in silence."""
    for name, place in members.items():
        if (match := _PICTURE.fullmatch(name)) and f"{match[1]}.json" not in members:
            raise UserError(
                f"{describe(place, name)}: its {match[1]}.json is missing; fetch the scene again or remove it"
            )


def _read_scene(name: str, members: Mapping[str, Place], names: Names) -> Scene:
    place = members[name]
    where = describe(place, name)
    if place.size > JSON_LIMIT:
        raise UserError(f"{where}: {place.size} bytes, more than any scene's JSON; fetch the scene again or remove it")
    if not _is_text(name):
        raise UserError(f"{where}: its name is no UTF-8; rename the scene")
    if "." in name.removesuffix(".json"):
        raise UserError(f"{where}: a key ends at its first dot when shards are read; rename the scene")
    data = read_place(place)
    facts = parse_facts(data, where)
    image, mask = _pictures(name.removesuffix(".json"), members, facts, where)
    sizes, shapes, materials = names
    for item in facts["objects"]:
        sizes.setdefault(item["size"], where)
        shapes.setdefault(item["shape"], where)
        materials.setdefault(item["material"], where)
    return Scene(
        name.removesuffix(".json"),
        facts["image_index"],
        place,
        image,
        mask,
        len(facts["objects"]),
        str(facts.get("split", "full")),
        xxhash.xxh3_128_digest(data),
    )


def _pictures(key: str, members: Mapping[str, Place], facts: dict, where: str) -> tuple[Place, Place]:
    """The image and mask that belong to a JSON: the v2 names where the JSON gives them, else the v1 names."""
    image_name, mask_name = (_plain_name(facts.get(name), where) for name in ("image_filename", "mask_filename"))
    v2_image, v1_image = f"{image_name or key + '_'}{V2_FRAME}", f"{key}.png"
    if v2_image in members:
        image, mask = v2_image, f"{mask_name or key + '_flat'}_{V2_FRAME}"
    elif v1_image in members:
        image, mask = v1_image, f"{key}_flat.png"
    else:
        raise UserError(f"{where}: its image {v2_image} is missing, and so is {v1_image}; fetch the scene again")
    if mask not in members:
        raise UserError(f"{where}: its mask {mask} is missing; fetch the scene again or remove it")
    for name in (image, mask):
        if members[name].size > PICTURE_LIMIT:
            raise UserError(f"{describe(members[name], name)}: {members[name].size} bytes, too large for a picture")
    return members[image], members[mask]


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of another encoding, in a folder or in an archive
        return False
    return True


def _plain_name(name: object, where: str) -> str:
    """A file name from a JSON, refused where it would lead out of the scene's folder."""
    text = name if isinstance(name, str) else ""
    if "/" in text or "\\" in text or text.startswith("."):
        raise UserError(f"{where}: the file name {text!r} would lead out of the scene's folder; remove the scene")
    return text
