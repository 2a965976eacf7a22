"""One shard: its scenes read, checked, turned into a tar and an index. What a worker process does.

Each picture is read, hashed and written, and read never again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import orjson
import xxhash

from nsi.errors import UserError
from nsi.schema import Vocabulary
from shards import tar
from shards.index import JSON_SUFFIX, MASK_SUFFIX, MemberPlace, index_bytes, make_index
from shards.manifest import Shard
from shards.picture import MASK_MODES, Header, read_header
from shards.schema_json import encode_schema, label_places
from shards.sources.legacy import read_rows
from shards.sources.scene import HdfRow, Place, Scene, describe, read_into, read_place
from shards.temporary import temporary_mark
from shards.writing.cut import ShardPlan
from shards.writing.flow import TarFlow
from shards.writing.transform import Transform, encode_picture


@dataclass(frozen=True)
class Packed:
    """A shard that lies under a temporary name, not yet synced."""

    temporary: str
    index: bytes
    shard: Shard
    image_size: tuple[int, int]
    mask_size: tuple[int, int] | None
    objects: int  # most in one scene


class Job(NamedTuple):
    """What a worker has to know to pack a shard."""

    out: str
    plan: ShardPlan
    vocabulary: Vocabulary
    transform: Transform


class _Sizes(NamedTuple):
    image: tuple[int, int]
    mask: tuple[int, int] | None


def pack_shard(job: Job) -> Packed:
    """Writes the tar of a shard under a temporary name.

    Raises UserError naming the file of a scene that is damaged or differs in size, and OSError where writing fails.
    """
    plan = job.plan
    temporary = os.path.join(job.out, f"{plan.name}.{temporary_mark()}")
    places = label_places(job.vocabulary)
    samples: dict[str, dict[str, MemberPlace]] = {}
    rows = [scene.image for scene in plan.scenes if isinstance(scene.image, HdfRow)]
    pixels = read_rows(rows) if rows else iter(())
    sizes = None
    try:
        with open(temporary, "wb", buffering=0) as file:
            flow = TarFlow(file.fileno())
            for scene in plan.scenes:
                samples[scene.key], found = _pack_scene(scene, flow, pixels, places, job.transform)
                sizes = sizes or found
                if found != sizes:
                    raise UserError(f"{scene.where}: {_differs(found, sizes)}, unlike {plan.scenes[0].key}; "
                                    "shard each data set from a folder of its own")  # fmt: skip
            size, digest = flow.finish()
    except tar.Damage as error:
        _remove(temporary)
        raise UserError(f"{plan.name}: {error}; rename the scene") from None
    except BaseException:
        _remove(temporary)
        raise
    assert sizes is not None
    index = index_bytes(make_index(samples))
    shard = Shard(plan.name, len(samples), size, digest, hashlib.sha256(index).hexdigest())
    return Packed(temporary, index, shard, sizes.image, sizes.mask, max(scene.objects for scene in plan.scenes))


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _pack_scene(
    scene: Scene,
    flow: TarFlow,
    pixels: Iterator[np.ndarray],
    places: Sequence[Mapping[str, int]],
    transform: Transform,
) -> tuple[dict[str, MemberPlace], _Sizes]:
    """Appends a scene's image, mask and JSON to a tar. Returns where they lie and the pictures' sizes."""
    raw = scene.json if isinstance(scene.json, bytes) else read_place(scene.json)
    if xxhash.xxh3_128_digest(raw) != scene.digest:
        raise UserError(f"{scene.where}: changed while shards were written; run the same command again")
    facts = orjson.loads(raw)  # the survey has checked these very bytes
    image, image_size = _fill_image(scene, flow, pixels, transform)
    members = {"image": flow.end(f"{scene.key}.{_suffix(image)}")}
    mask_size = None
    if scene.mask:
        mask = flow.begin(scene.mask.size)
        read_into(scene.mask, mask)
        mask_size = _mask_size(mask, scene.mask, scene.key, None if transform.size else image_size)
        members["mask"] = flow.end(f"{scene.key}.{MASK_SUFFIX}")
    schema = encode_schema(raw, facts, scene.key, places)
    flow.begin(len(schema))[:] = schema
    members["json"] = flow.end(f"{scene.key}.{JSON_SUFFIX}")
    return members, _Sizes(image_size, mask_size)


def _fill_image(
    scene: Scene, flow: TarFlow, pixels: Iterator[np.ndarray], transform: Transform
) -> tuple[memoryview, tuple[int, int]]:
    """Puts a scene's image in place, encoded anew where that is wanted. Returns its bytes and its size in pixels."""
    place = scene.image
    if isinstance(place, Place) and transform.encoding == "keep":
        image = flow.begin(place.size)
        read_into(place, image)
        return image, _header(image, place, f"{scene.key} image").size
    picture = next(pixels) if isinstance(place, HdfRow) else read_place(place)
    if isinstance(picture, bytes):
        _header(picture, place, f"{scene.key} image")  # before it is decoded
    try:
        data = encode_picture(picture, transform)
    except (OSError, ValueError, SyntaxError) as error:
        name = _name(place, f"{scene.key} image")
        raise UserError(f"{name}: cannot be decoded ({error}); fetch the scene again or remove it") from None
    image = flow.begin(len(data))
    image[:] = data
    return image, read_header(image).size


def _suffix(image: memoryview) -> str:
    return {b"\xff\xd8": "jpg", b"RI": "webp"}.get(bytes(image[:2]), "png")


def _mask_size(data: memoryview, place: Place, key: str, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """Size of a mask that has been checked; `image_size` is what it must have, where that is known."""
    size, mode = _header(data, place, f"{key} mask")
    if mode not in MASK_MODES:
        raise UserError(
            f"{describe(place, f'{key} mask')}: the mask has mode {mode}, so its object ids are lost (a palette "
            "picture has them); fetch the scene again or remove it"
        )
    if image_size and size != image_size:
        raise UserError(
            f"{describe(place, f'{key} mask')}: the mask is {size[0]}x{size[1]}, its image "
            f"{image_size[0]}x{image_size[1]}; fetch the scene again or remove it"
        )
    return size


def _header(data: bytes | memoryview, place: Place | HdfRow, name: str) -> Header:
    try:
        return read_header(data)
    except ValueError as error:
        raise UserError(f"{_name(place, name)}: {error}; fetch the scene again or remove it") from None


def _name(place: Place | HdfRow, name: str) -> str:
    return place.path if isinstance(place, HdfRow) else describe(place, name)


def _differs(found: _Sizes, first: _Sizes) -> str:
    for what, ours, theirs in (("image", found.image, first.image), ("mask", found.mask, first.mask)):
        if ours != theirs:
            return f"its {what} is {_words(ours)}, not {_words(theirs)}"
    return "its pictures differ"


def _words(size: tuple[int, int] | None) -> str:
    return f"{size[0]}x{size[1]}" if size else "missing"
