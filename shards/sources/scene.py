"""A raw scene: three members that lie somewhere on this machine, and what its JSON must say to be usable.

Every kind of source comes down to places (a file, a stretch of an archive or of a spool, a row of an HDF5 file), so
that what writes shards need not know where scenes come from.
"""

from __future__ import annotations

import operator
import os
from typing import Any, NamedTuple

import orjson

from nsi.errors import UserError

OBJECT_KEYS = ("shape", "size", "material", "3d_coords", "index")
_FARTHEST = 1e6  # metres from the origin; scenes are 6 wide, and training has float32
_NUMBERS = frozenset({float, int})
_of_object = operator.itemgetter(*OBJECT_KEYS)
JSON_LIMIT = 16 << 20  # bytes; CLEVRTex's are 10 KB
PICTURE_LIMIT = 256 << 20  # bytes


class Place(NamedTuple):
    """Bytes of a file on this machine: a whole file, or a stretch of a larger one."""

    path: str
    offset: int
    size: int
    source: str = ""  # what a person knows the bytes from, where the file is a copy of our own


class HdfRow(NamedTuple):
    """A picture of the public NSI code's `images.h5`: a row of one of its data sets."""

    path: str
    split: str
    row: int
    size: int  # of its pixels as bytes
    glimpse: bytes = b""  # a digest over some of its lines, since all rows have the same size


class Scene(NamedTuple):
    """What has to be known of a scene before any shard is written."""

    key: str
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  # nobody asks a scene where it has some value
    json: Place | bytes
    image: Place | HdfRow
    mask: Place | None
    objects: int
    variant: str
    digest: bytes  # of the JSON's bytes
    split: str = ""  # the split that the source itself puts it in; "" where it does not say

    @property
    def size(self) -> int:
        """Bytes of its members in the source."""
        json_size = len(self.json) if isinstance(self.json, bytes) else self.json.size
        return json_size + self.image.size + (self.mask.size if self.mask else 0)

    @property
    def where(self) -> str:
        """The place of its JSON, for messages."""
        return self.key if isinstance(self.json, bytes) else describe(self.json, f"{self.key}.json")


def describe(place: Place, name: str) -> str:
    """A place for messages: the file, and which member of it where it is an archive."""
    path = place.source or place.path
    return path if os.path.basename(path) == name or path.endswith((".json", ".png")) else f"{path}: {name}"


def read_place(place: Place) -> bytes:
    """The bytes of a place. Raises UserError where they cannot be read or are fewer than they were."""
    data = bytearray(place.size)
    read_into(place, memoryview(data))
    return bytes(data)


def read_into(place: Place, buffer: memoryview) -> None:
    """Reads the bytes of a place into a buffer of its size. Raises UserError as `read_place` does."""
    try:
        file = os.open(place.path, os.O_RDONLY)
        try:
            count = os.preadv(file, [buffer], place.offset)
        finally:
            os.close(file)
    except OSError as error:
        raise UserError(
            f"{place.path}: cannot be read ({error.strerror}); restore the file or remove its scene"
        ) from None
    if count != place.size:
        raise UserError(f"{place.path}: was {place.size} bytes long and is shorter now; do not change it meanwhile")


def parse_facts(data: bytes, where: str) -> dict[str, Any]:
    """One scene's JSON, checked: the keys that we use are there and have usable values. `where` is for messages.

    Raises UserError naming the file and the key.
    """
    try:
        facts = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        reason = "it holds NaN or Infinity" if b"NaN" in data or b"Infinity" in data else error
        raise UserError(f"{where}: not a JSON file ({reason}); fetch the scene again or remove it") from None
    if not isinstance(facts, dict):
        raise UserError(f"{where}: holds no JSON object; fetch the scene again or remove it")
    _require(facts, ("image_index", "objects"), where)
    index = facts["image_index"]
    if type(index) is not int or not 0 <= index < 2**63:
        raise UserError(f"{where}: image_index is {index!r}, not a number from 0")
    if not isinstance(facts["objects"], list) or not facts["objects"]:
        raise UserError(f"{where}: has no objects; fetch the scene again or remove it")
    for place, item in enumerate(facts["objects"]):
        _check_object(item, place, where)
    if facts.get("num_objects", len(facts["objects"])) != len(facts["objects"]):
        raise UserError(f"{where}: num_objects is {facts['num_objects']!r}, but {len(facts['objects'])} are listed")
    return facts


def _check_object(item: Any, place: int, scene: str) -> None:
    try:
        shape, size, material, coords, index = _of_object(item)
    except (KeyError, TypeError):
        if not isinstance(item, dict):
            raise UserError(f"{scene}: objects[{place}] is no JSON object; fetch the scene again") from None
        _require(item, OBJECT_KEYS, f"{scene}: objects[{place}]")
        raise
    if not (type(shape) is type(size) is type(material) is str):
        raise UserError(f"{scene}: objects[{place}]: shape, size and material must be names")
    if type(coords) is not list or len(coords) != 3 or not all(map(_is_finite, coords)):
        raise UserError(f"{scene}: objects[{place}]: 3d_coords is {coords!r}, not three finite numbers")
    # Mask ids are object indices, so schema row k - 1 must be object k.
    if index != place + 1:
        raise UserError(f"{scene}: objects[{place}]: index is {index!r}, not {place + 1}, the mask cannot be matched")


def _require(record: dict[str, Any], keys: tuple[str, ...], where: object) -> None:
    for key in keys:
        if key not in record:
            raise UserError(f"{where}: the key {key!r} is missing; fetch the scene again or remove it")


def _is_finite(value: object) -> bool:
    return type(value) in _NUMBERS and -_FARTHEST <= value <= _FARTHEST  # type: ignore[operator]  # false for NaN
