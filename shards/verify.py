"""Checks a folder of shards down to the last byte and names every fault."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
import xxhash

from nsi.errors import UserError
from nsi.schema import Vocabulary
from shards.decode import decode_image_frame, decode_mask
from shards.index import MEMBERS, build_index, parse_index
from shards.manifest import MANIFEST, Manifest, Shard, manifest_bytes, parse_manifest
from shards.processes import as_they_end
from shards.reading.dataset import index_name
from shards.reading.sample import DECODING_ERRORS
from shards.reading.storage import Storage
from shards.schema_json import SceneSchema, decode_facts, decode_schema
from shards.tokens import TokenShape, decode_tokens
from shards.writing.target import UNFINISHED


def verify(storage: Storage, pool: Executor, report: Callable[[int], None]) -> list[str]:
    """Every fault in a folder of shards, a line each; none where all is well.

    Reads each tar and index whole and once, compares checksums, counts and keys with the manifest, and decodes every
    member. `report` is told how many samples are done. Raises UserError where there is no manifest to check against.
    """
    data = storage.read(MANIFEST)
    manifest = parse_manifest(data, storage.where(MANIFEST))
    shape = manifest.features.shape if manifest.features else None
    facts = _Expected(manifest.image_size, manifest.mask_size, manifest.max_objects, manifest.vocabulary, shape)
    jobs = [_Job(storage, shard, facts) for table in manifest.splits.values() for shard in table]
    faults = _strangers(storage, manifest)
    if data != manifest_bytes(manifest):  # a space that became a line's end, say
        faults.append(f"{storage.where(MANIFEST)}: its bytes are not those that were written, though they say the same")
    keys: dict[str, str] = {}
    done = 0
    for shard, found_keys, found_faults in as_they_end(pool, _verify_shard, jobs):
        faults += found_faults
        for key in found_keys:
            if key in keys:
                faults.append(f"{storage.where(shard.name)}: sample {key} is also in {keys[key]}")
            keys[key] = shard.name
        done += shard.samples
        report(done)
    return sorted(faults)


class _Expected(NamedTuple):
    """What the manifest says of every sample."""

    image_size: tuple[int, int]
    mask_size: tuple[int, int] | None
    max_objects: int
    vocabulary: Vocabulary
    features: TokenShape | None  # in the images' place


class _Job(NamedTuple):
    storage: Storage
    shard: Shard
    expected: _Expected


def _strangers(storage: Storage, manifest: Manifest) -> list[str]:
    """Tars that the manifest does not know, and traces of a run that has not finished."""
    if not storage.is_local:
        return []
    known = {shard.name for table in manifest.splits.values() for shard in table}
    folder = storage.path("")
    faults = [f"{path}: not in the manifest" for path in folder.glob("*.tar") if path.name not in known]
    if (folder / UNFINISHED).exists():
        faults.append(f"{folder / UNFINISHED}: a run of `nsi shard` has not finished; run it again")
    return faults


def _verify_shard(job: _Job) -> tuple[Shard, list[str], list[str]]:
    """The keys of one shard, and its faults."""
    storage, shard, expected = job
    where = storage.where(shard.name)
    faults: list[str] = []
    records = data = None
    try:
        records = _read_index(storage, shard)
        if len(records) != shard.samples:
            faults.append(f"{where}: its index lists {len(records)} samples, the manifest {shard.samples}")
    except UserError as error:
        faults.append(str(error))
    try:
        data = _read(storage, shard.name)
        if xxhash.xxh3_128_hexdigest(data) != shard.xxh3_128:
            faults += _damage(where, data, records, shard)
        elif records is not None:
            faults += _misfits(where, data, records, storage)
        if records is None:  # the tar tells what it holds
            records = build_index(where, data)
    except UserError as error:
        faults.append(str(error))
    if records is None:
        return shard, [], faults
    if data is not None:
        faults += [f"{where}: {fault}" for record in records for fault in _record_faults(data, record, expected)]
    return shard, [record["key"].decode() for record in records], faults


def _record_faults(data: memoryview, record: Any, expected: _Expected) -> Iterator[str]:
    """The faults of one sample's content, where its members have their checksums."""
    if all(_is_whole(data, record, member) for member in MEMBERS):
        key = record["key"].decode()
        members = {member: bytes(_member(data, record, member)) for member in MEMBERS}
        for fault in _sample_faults(key, members, expected):
            yield f"{key} at offset {int(record['image']['offset'])}: {fault}"


def _read_index(storage: Storage, shard: Shard) -> np.ndarray:
    """The records of a shard's index. Raises UserError where it is missing or not the one that was written."""
    name = index_name(shard.name)
    data = storage.read(name)
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise UserError(f"{storage.where(name)}: is not the index that was written (sha256 differs from the manifest)")
    return parse_index(data, storage.where(name))


def _read(storage: Storage, name: str) -> memoryview:
    """A whole shard. Raises UserError where it cannot be read."""
    if not storage.is_local:
        return memoryview(storage.read(name))
    path = storage.path(name)
    try:  # read, not mapped: of a disk that fails a map tells nothing, it ends the process
        return memoryview(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _damage(where: str, data: memoryview, records: np.ndarray | None, shard: Shard) -> list[str]:
    """Where a tar differs from what was written: its members, as far as they tell, else the bytes between them."""
    faults = [f"{where}: its bytes are not those that were written (xxh3-128 differs from the manifest)"]
    if len(data) != shard.bytes:
        faults.append(f"{where}: has {len(data)} bytes, the manifest says {shard.bytes}")
    if records is None:
        return faults
    broken = [
        f"{where}: {member} of {record['key'].decode()} at offset {int(record[member]['offset'])} "
        "does not have its checksum"
        for record in records
        for member in MEMBERS
        if not _is_whole(data, record, member)
    ]
    if not broken and len(data) == shard.bytes:
        faults.append(f"{where}: all samples are whole, so a header or the padding between them is damaged")
    return faults + broken


def _misfits(where: str, data: memoryview, records: np.ndarray, storage: Storage) -> list[str]:
    try:
        fits = np.array_equal(build_index(where, data), records)
    except UserError as error:
        return [str(error)]
    return [] if fits else [f"{where}: its index does not fit it"]


def _is_whole(data: memoryview, record: Any, member: str) -> bool:
    """Whether a member has its checksum; one that a sample does not have (no mask, say) has none to have."""
    place = record[member]
    return not place["size"] or xxhash.xxh3_64_intdigest(_member(data, record, member)) == place["xxh3"]


def _member(data: memoryview, record: Any, member: str) -> memoryview:
    offset, size = int(record[member]["offset"]), int(record[member]["size"])
    return data[offset : offset + size]


def _sample_faults(key: str, members: dict[str, bytes], expected: _Expected) -> Iterator[str]:
    try:
        if expected.features:
            tokens = decode_tokens(members["image"], expected.features)
            if tokens.key != key:
                yield f"the features are those of {tokens.key}"
        else:
            yield from _size_fault("image", decode_image_frame(members["image"]), expected.image_size)
    except DECODING_ERRORS as error:
        yield f"the {'features' if expected.features else 'image'} cannot be decoded ({error})"
    try:
        schema, facts = decode_schema(members["json"]), decode_facts(members["json"])
    except DECODING_ERRORS as error:
        yield f"the schema cannot be read ({error})"
        return
    if schema.key != key:
        yield f"the schema is that of {schema.key}"
    if len(schema.primitives) > expected.max_objects:
        yield f"has {len(schema.primitives)} objects, the manifest says at most {expected.max_objects}"
    if not _in_vocabulary(schema, facts, expected.vocabulary):
        yield "has an id that the vocabulary lacks, or one that its own names contradict"
    if not members["mask"]:
        if expected.mask_size:
            yield "has no mask"
        return
    try:
        mask_HW = decode_mask(members["mask"])
    except DECODING_ERRORS as error:
        yield f"the mask cannot be decoded ({error})"
        return
    yield from _size_fault("mask", mask_HW, expected.mask_size)
    if int(mask_HW.max(initial=0)) > len(schema.primitives):
        yield f"the mask has object {int(mask_HW.max())}, the schema only {len(schema.primitives)}"


def _size_fault(what: str, pixels: np.ndarray, size: tuple[int, int] | None) -> Iterator[str]:
    height, width = pixels.shape[:2]
    if size and (width, height) != size:
        yield f"the {what} is {width}x{height}, not {size[0]}x{size[1]}"


def _in_vocabulary(schema: SceneSchema, facts: dict[str, Any], vocabulary: Vocabulary) -> bool:
    try:
        named = [vocabulary.encode(o["size"], o["shape"], o["material"]) for o in facts["objects"]]
    except (UserError, KeyError, TypeError):
        return False
    return named == [(p.size, p.shape, p.material) for p in schema.primitives]
