"""Reads raw CLEVRTex scenes from the v1 and v2 folder layouts, and says what is wrong with a broken one.

A scene is three files: its JSON, its image and its palette mask. Names come from the JSON where it has them
(v2) and from the JSON's own file name otherwise (v1):

    v2  NAME/NAME.json   NAME_0003.png   NAME_flat_0003.png
    v1  NAME.json        NAME.png        NAME_flat.png
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from nsi.errors import UserError

V2_FRAME = "0003.png"  # the frame number that the renderer appended to every v2 file
MASK_MODES = ("P", "L")
OBJECT_KEYS = ("shape", "size", "material", "3d_coords", "index")


@dataclass(frozen=True)
class SceneFiles:
    """Where the three files of one scene lie."""

    key: str
    json: Path
    image: Path
    mask: Path


@dataclass(frozen=True)
class SceneSummary:
    """What has to be known of a scene before any shard is written."""

    files: SceneFiles
    index: int
    sizes: frozenset[str]
    shapes: frozenset[str]
    materials: frozenset[str]
    objects: int
    image_size: tuple[int, int]  # width, height in pixels
    variant: str
    digest: str  # of the JSON's content


def find_scene_jsons(source: Path) -> list[Path]:
    """Every scene's JSON below a folder, in the order of their paths.

    Raises UserError where the folder is missing, unreadable or holds no scene.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; give the folder that holds the scenes (clevrtexv2_full, say)")
    unreadable: list[OSError] = []
    found = [
        Path(folder) / name
        for folder, _, names in os.walk(source, onerror=unreadable.append)
        for name in names
        if name.startswith("CLEVRTEX") and name.endswith(".json")
    ]
    if unreadable:
        raise UserError(f"{unreadable[0].filename}: cannot be read ({unreadable[0].strerror}); check its permissions")
    if not found:
        raise UserError(f"{source}: holds no CLEVRTEX*.json; unpack an archive there or run `nsi synth {source}`")
    return sorted(found)


def summarise_scene(path: Path) -> SceneSummary:
    """Reads one scene's JSON and the headers of its two pictures.

    Raises UserError, naming the file, for anything that training could not use.
    """
    facts = read_scene_json(path)
    files = _scene_files(path, facts)
    image_size, _ = _picture(files.image)
    mask_size, mask_mode = _picture(files.mask)
    if mask_mode not in MASK_MODES:
        raise UserError(
            f"{files.mask}: the mask has mode {mask_mode}, so its object ids are lost (a palette picture has them); "
            "fetch the scene again or remove its folder"
        )
    if image_size != mask_size:
        raise UserError(
            f"{files.mask}: the mask is {mask_size[0]}x{mask_size[1]}, its image {image_size[0]}x{image_size[1]}; "
            "fetch the scene again or remove its folder"
        )
    objects = facts["objects"]
    return SceneSummary(
        files=files,
        index=facts["image_index"],
        sizes=frozenset(item["size"] for item in objects),
        shapes=frozenset(item["shape"] for item in objects),
        materials=frozenset(item["material"] for item in objects),
        objects=len(objects),
        image_size=image_size,
        variant=str(facts.get("split", "full")),
        digest=hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
    )


def read_scene_json(path: Path) -> dict:
    """One scene's JSON, checked: the keys that we use are there and have usable values.

    Raises UserError naming the file and the key.
    """
    try:
        facts = json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error}); fetch the scene again or remove its folder") from None
    if not isinstance(facts, dict):
        raise UserError(f"{path}: holds no JSON object; fetch the scene again or remove its folder")
    _require(facts, ("image_index", "objects"), path)
    if not isinstance(facts["image_index"], int) or facts["image_index"] < 0:
        raise UserError(f"{path}: image_index is {facts['image_index']!r}, not a number from 0")
    if not isinstance(facts["objects"], list) or not facts["objects"]:
        raise UserError(f"{path}: has no objects; fetch the scene again or remove its folder")
    for place, item in enumerate(facts["objects"]):
        where = f"{path}: objects[{place}]"
        if not isinstance(item, dict):
            raise UserError(f"{where} is not a JSON object; fetch the scene again or remove its folder")
        _require(item, OBJECT_KEYS, where)
        if not all(isinstance(item[name], str) for name in ("shape", "size", "material")):
            raise UserError(f"{where}: shape, size and material must be names")
        coords = item["3d_coords"]
        if not isinstance(coords, list) or len(coords) != 3 or not all(_finite(value) for value in coords):
            raise UserError(f"{where}: 3d_coords is {coords!r}, not three finite numbers")
        # Mask ids are object indices, so schema row k - 1 must be object k.
        if item["index"] != place + 1:
            raise UserError(f"{where}: index is {item['index']!r}, not {place + 1}, so the mask cannot be matched")
    return facts


def read_bytes(path: Path) -> bytes:
    """A whole file. Raises UserError where it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore the file or remove its scene") from None


def check_distinct(scenes: Iterable[SceneSummary]) -> None:
    """Raises UserError where two scenes have the same key or the same index (two data sets in one folder)."""
    seen: dict[object, Path] = {}
    for scene in scenes:
        for name in (scene.files.key, scene.index):
            if name in seen:
                raise UserError(
                    f"{scene.files.json}: scene {name} is also in {seen[name]}; give each data set a folder of its own"
                )
            seen[name] = scene.files.json


def _scene_files(path: Path, facts: dict) -> SceneFiles:
    """The image and mask that belong to a JSON: the v2 names where the JSON gives them, else the v1 names."""
    key = path.stem
    image_name, mask_name = (_plain_name(facts.get(name), path) for name in ("image_filename", "mask_filename"))
    v2_image = path.with_name(f"{image_name or key + '_'}{V2_FRAME}")
    if v2_image.exists():
        return SceneFiles(key, path, v2_image, path.with_name(f"{mask_name or key + '_flat'}_{V2_FRAME}"))
    v1_image = path.with_name(f"{key}.png")
    if v1_image.exists():
        return SceneFiles(key, path, v1_image, path.with_name(f"{key}_flat.png"))
    raise UserError(f"{v2_image}: missing, and so is {v1_image.name}; fetch the scene again or remove {path}")


def _plain_name(name: object, path: Path) -> str:
    """A file name from a JSON, refused where it would lead out of the scene's folder."""
    text = name if isinstance(name, str) else ""
    if "/" in text or "\\" in text or text.startswith("."):
        raise UserError(f"{path}: the file name {text!r} would lead out of the scene's folder; remove the scene")
    return text


def _picture(path: Path) -> tuple[tuple[int, int], str]:
    """Size and mode of a picture, from its header."""
    try:
        with Image.open(path) as picture:
            return picture.size, picture.mode
    except FileNotFoundError:
        raise UserError(f"{path}: missing; fetch the scene again or remove its folder") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable picture ({error}); fetch the scene again") from None


def _require(record: dict, keys: tuple[str, ...], where: object) -> None:
    for key in keys:
        if key not in record:
            raise UserError(f"{where}: the key {key!r} is missing; fetch the scene again or remove its folder")


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
