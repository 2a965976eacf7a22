"""Checks a folder of shards down to the last byte and names every fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from nsi.errors import UserError
from nsi.schema import Vocabulary
from shards.decode import decode_image, decode_mask, decode_schema
from shards.index import MEMBERS, build_index, index_path, read_index
from shards.manifest import Manifest, Shard, read_manifest
from shards.write import UNFINISHED, file_sha256


def verify(folder: Path, workers: int, report: Callable[[int], None]) -> list[str]:
    """Every fault in a folder of shards, a line each; none where all is well.

    Reads each tar and index whole, compares checksums, counts and keys with the manifest, and decodes every member.
    `report` is told how many samples are done. Raises UserError where there is no manifest to check against.
    """
    manifest = read_manifest(folder)
    listed = [shard for shards in manifest.splits.values() for shard in shards]
    faults: list[str] = _strangers(folder, listed)
    keys: dict[str, str] = {}
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        tasks = {pool.submit(_verify_shard, folder, shard, manifest): shard for shard in listed}
        for task in as_completed(tasks):
            shard = tasks[task]
            found_keys, found_faults = task.result()
            faults += found_faults
            for key in found_keys:
                if key in keys:
                    faults.append(f"{folder / shard.name}: sample {key} is also in {keys[key]}")
                keys[key] = shard.name
            done += shard.samples
            report(done)
    return sorted(faults)


def _strangers(folder: Path, listed: list[Shard]) -> list[str]:
    """Tars that the manifest does not know, and traces of a run that has not finished."""
    known = {shard.name for shard in listed}
    faults = [f"{path}: not in the manifest" for path in folder.glob("*.tar") if path.name not in known]
    if (folder / UNFINISHED).exists():
        faults.append(f"{folder / UNFINISHED}: a run of `nsi shard` has not finished; run it again")
    return faults


def _verify_shard(folder: Path, shard: Shard, manifest: Manifest) -> tuple[list[str], list[str]]:
    """The keys of one shard, and its faults."""
    tar = folder / shard.name
    try:
        faults = list(_file_faults(tar, shard))
        if faults:
            return [], faults
        index = build_index(tar)
        if not np.array_equal(index, read_index(index_path(tar))):
            return [], [f"{index_path(tar)}: does not fit its tar"]
        if len(index) != shard.samples:
            return [], [f"{tar}: has {len(index)} samples, the manifest says {shard.samples}"]
    except UserError as error:
        return [], [str(error)]
    with tar.open("rb") as file:
        for record in index:
            members = {}
            for member in MEMBERS:
                file.seek(int(record[member]["offset"]))
                members[member] = file.read(int(record[member]["size"]))
            faults += [
                f"{tar}: {record['key'].decode()} at offset {int(record['image']['offset'])}: {fault}"
                for fault in _sample_faults(record["key"].decode(), members, manifest)
            ]
    return [record["key"].decode() for record in index], faults


def _file_faults(tar: Path, shard: Shard) -> Iterator[str]:
    for path, sha256 in ((tar, shard.sha256), (index_path(tar), shard.index_sha256)):
        if not path.exists():
            yield f"{path}: missing"
        elif file_sha256(path) != sha256:
            yield f"{path}: its bytes are not those that were written (sha256 differs from the manifest)"


def _sample_faults(key: str, members: dict[str, bytes], manifest: Manifest) -> Iterator[str]:
    width, height = manifest.image_size
    try:
        decode_image(members["image"], min(width, height))
    except (OSError, ValueError, SyntaxError) as error:
        yield f"the image cannot be decoded ({error})"
    try:
        schema = decode_schema(members["json"])
    except (ValueError, KeyError, TypeError) as error:
        yield f"the schema cannot be read ({error})"
        return
    if schema.key != key:
        yield f"the schema is that of {schema.key}"
    if len(schema.primitives) > manifest.max_objects:
        yield f"has {len(schema.primitives)} objects, the manifest says at most {manifest.max_objects}"
    if not _in_vocabulary(schema, manifest.vocabulary):
        yield "has an id that the vocabulary lacks, or one that its own names contradict"
    try:
        mask_HW = decode_mask(members["mask"])
    except (OSError, ValueError, SyntaxError) as error:
        yield f"the mask cannot be decoded ({error})"
        return
    if mask_HW.shape != (height, width):
        yield f"the mask is {mask_HW.shape[1]}x{mask_HW.shape[0]}, not {width}x{height}"
    if int(mask_HW.max(initial=0)) > len(schema.primitives):
        yield f"the mask has object {int(mask_HW.max())}, the schema only {len(schema.primitives)}"


def _in_vocabulary(schema, vocabulary: Vocabulary) -> bool:
    try:
        named = [vocabulary.encode(o["size"], o["shape"], o["material"]) for o in schema.facts["objects"]]
    except (UserError, KeyError, TypeError):
        return False
    return named == [(p.size, p.shape, p.material) for p in schema.primitives]
