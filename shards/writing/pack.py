"""One shard: its scenes read, checked, turned into a tar and an index. What a worker process does.

Bytes are moved once: each picture is read, hashed and written, and read never again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from shards.picture import MASK_MODES, read_header
from shards.schema_json import encode_schema, label_places
from shards.sources.legacy import read_rows
from shards.sources.scene import HdfRow, Place, Scene, describe, read_place
from shards.temporary import temporary_mark
from shards.writing.cut import ShardPlan
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
    digest = hashlib.sha256()
    at, sizes = 0, None
    try:
        with open(temporary, "wb", buffering=0) as file:
            for scene, image in zip(plan.scenes, _images(plan.scenes), strict=True):
                members, found = _members(scene, image, places, job.transform)
                sizes = sizes or found
                if found != sizes:
                    raise UserError(f"{scene.where}: {_differs(found, sizes)}, unlike {plan.scenes[0].key}; "
                                    "shard each data set from a folder of its own")  # fmt: skip
                sample = samples[scene.key] = {}
                parts: list[bytes] = []
                for member, suffix, data in members:
                    parts += (tar.header(f"{scene.key}.{suffix}", len(data)), data, bytes(tar.padding(len(data))))
                    sample[member] = MemberPlace(at + tar.BLOCK, len(data), xxhash.xxh3_64_intdigest(data))
                    at += tar.BLOCK + len(data) + tar.padding(len(data))
                _write(file.fileno(), parts, digest)
            _write(file.fileno(), [tar.END], digest)
    except tar.Damage as error:
        _remove(temporary)
        raise UserError(f"{plan.name}: {error}; rename the scene") from None
    except BaseException:
        _remove(temporary)
        raise
    assert sizes is not None
    index = index_bytes(make_index(samples))
    shard = Shard(plan.name, len(samples), at + len(tar.END), digest.hexdigest(), hashlib.sha256(index).hexdigest())
    return Packed(temporary, index, shard, sizes.image, sizes.mask, max(scene.objects for scene in plan.scenes))


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _write(file: int, parts: list[bytes], digest) -> None:
    """Writes and hashes a sample, with one call to the system as a rule."""
    for part in parts:
        digest.update(part)
    written, size = os.writev(file, parts), sum(map(len, parts))
    if written < size:  # a disk that is nearly full takes a piece before it says so
        rest = memoryview(b"".join(parts))[written:]
        while rest:
            rest = rest[os.write(file, rest) :]


def _images(scenes: Sequence[Scene]) -> Iterator[Callable[[], bytes | np.ndarray]]:
    """For each scene what gives its image: bytes of a file, or pixels of an HDF5 row."""
    rows = [scene.image for scene in scenes if isinstance(scene.image, HdfRow)]
    pixels = read_rows(rows) if rows else iter(())
    for scene in scenes:
        place = scene.image
        yield (lambda: next(pixels)) if isinstance(place, HdfRow) else (lambda place=place: read_place(place))


def _members(
    scene: Scene, image: Callable[[], bytes | np.ndarray], places: Sequence[Mapping[str, int]], transform: Transform
) -> tuple[list[tuple[str, str, bytes]], _Sizes]:
    """(member, suffix in the tar, bytes) of a scene's image, mask and JSON, and the pictures' sizes."""
    raw = scene.json if isinstance(scene.json, bytes) else read_place(scene.json)
    if xxhash.xxh3_128_digest(raw) != scene.digest:
        raise UserError(f"{scene.where}: changed while shards were written; run the same command again")
    facts = orjson.loads(raw)  # the survey has checked these very bytes
    data = image()
    image_name = scene.image.path if isinstance(scene.image, HdfRow) else describe(scene.image, f"{scene.key} image")
    suffix = "png"
    if isinstance(data, bytes):
        _header(data, image_name)  # before it is decoded, if it is
        suffix = {b"\xff\xd8": "jpg", b"RI": "webp"}.get(data[:2], "png")
    if transform.encoding != "keep" or not isinstance(data, bytes):
        try:
            data = encode_picture(data, transform)
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{image_name}: cannot be decoded ({error}); fetch the scene again or remove it") from None
        suffix = "png" if transform.encoding == "keep" else transform.encoding
    image_size, _ = _header(data, image_name)
    members = [("image", suffix, data)]
    mask_size = None
    if scene.mask:
        mask = read_place(scene.mask)
        mask_size = _mask_size(mask, scene.mask, scene.key, None if transform.size else image_size)
        members.append(("mask", MASK_SUFFIX, mask))
    members.append(("json", JSON_SUFFIX, encode_schema(raw, facts, scene.key, places)))
    return members, _Sizes(image_size, mask_size)


def _mask_size(data: bytes, place: Place, key: str, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """Size of a mask that has been checked; `image_size` is what it must have, where that is known."""
    name = describe(place, f"{key} mask")
    size, mode = _header(data, name)
    if mode not in MASK_MODES:
        raise UserError(
            f"{name}: the mask has mode {mode}, so its object ids are lost (a palette picture has them); "
            "fetch the scene again or remove it"
        )
    if image_size and size != image_size:
        raise UserError(
            f"{name}: the mask is {size[0]}x{size[1]}, its image {image_size[0]}x{image_size[1]}; "
            "fetch the scene again or remove it"
        )
    return size


def _header(data: bytes, name: str) -> tuple[tuple[int, int], str]:
    try:
        return read_header(data)
    except ValueError as error:
        raise UserError(f"{name}: {error}; fetch the scene again or remove it") from None


def _differs(found: _Sizes, first: _Sizes) -> str:
    for what, ours, theirs in (("image", found.image, first.image), ("mask", found.mask, first.mask)):
        if ours != theirs:
            return f"its {what} is {_words(ours)}, not {_words(theirs)}"
    return "its pictures differ"


def _words(size: tuple[int, int] | None) -> str:
    return f"{size[0]}x{size[1]}" if size else "missing"
