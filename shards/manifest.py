"""The manifest: the one file that says what a folder of shards holds, with a fingerprint over all of it.

Shards are kept as columns, not as objects, in memory and in the file: a million of them are read in a fraction of a
second. A checksum column is one string of hexadecimal digits, equally many a shard.

The fingerprint, a sha256, covers the sha256 of each index, and an index has an xxh3-64 of each member. A tar's own
checksum is xxh3-128, which finds whatever disks and networks do to it, as fast as it is read; sha256 took a third of
the time of writing a shard. Neither xxh3 is proof against somebody who means to deceive.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nsi.errors import UserError
from nsi.schema import Vocabulary
from shards.temporary import temporary_mark
from shards.tokens import Storage, TokenShape

FORMAT = 3
MANIFEST = "manifest.json"
_XXH3_BYTES, _SHA256_BYTES = 16, 32
_CHECKSUMS = re.compile(rb'(?:xxh3_128|sha256)": "')  # begins a column of them, as json.dumps writes it


class Shard(NamedTuple):
    """One tar: its file name, how many samples it holds, its size, and the checksums of it and of its index."""

    name: str
    samples: int
    bytes: int
    xxh3_128: str
    index_sha256: str


@dataclass(frozen=True, eq=False)
class ShardTable:
    """The shards of one split, as columns over S shards; `table[i]` is one of them. Shard i is `SPLIT-00000i.tar`."""

    split: str
    samples_S: np.ndarray  # int64
    bytes_S: np.ndarray  # int64
    xxh3_128_S16: np.ndarray  # uint8
    index_sha256_S32: np.ndarray  # uint8

    @staticmethod
    def of(split: str, shards: Sequence[Shard]) -> ShardTable:
        """The table of some shards, in order."""
        return ShardTable(
            split,
            np.array([shard.samples for shard in shards], np.int64),
            np.array([shard.bytes for shard in shards], np.int64),
            _from_hex("".join(shard.xxh3_128 for shard in shards), _XXH3_BYTES),
            _from_hex("".join(shard.index_sha256 for shard in shards), _SHA256_BYTES),
        )

    def __len__(self) -> int:
        return len(self.samples_S)

    def __getitem__(self, place: int) -> Shard:
        return Shard(
            shard_name(self.split, range(len(self))[place]),
            int(self.samples_S[place]),
            int(self.bytes_S[place]),
            self.xxh3_128_S16[place].tobytes().hex(),
            self.index_sha256_S32[place].tobytes().hex(),
        )

    def __iter__(self) -> Iterator[Shard]:
        return (self[place] for place in range(len(self)))


@dataclass(frozen=True)
class StoredFeatures:
    """What a feature store's shards hold in the place of images. Its manifest's `source` is the fingerprint of the
    shards that they were made of, its `transform` how an image reached the backbone.
    """

    backbone: str
    backbone_hash: str
    weights: str  # where the backbone's came from: "hub", "file", or "none" where it has none
    grid: tuple[int, int]  # patches down, patches across
    feature_dim: int
    storage: Storage
    relative_rms_error: float  # of the storage: root mean square error by that of the features themselves
    largest_error: float  # the largest of all, by the same

    @property
    def shape(self) -> TokenShape:
        """What a scene's features look like."""
        return TokenShape(self.grid[0] * self.grid[1], self.feature_dim, self.storage)


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds."""

    variant: str  # the data set's own name of itself: full, outd, camo, ...
    image_size: tuple[int, int]  # width, height in pixels of every image
    mask_size: tuple[int, int] | None  # of every mask; None where the source has none
    max_objects: int  # most objects in one scene
    transform: str  # what was done to the images on the way in
    split_rule: str
    source: str  # digest over the scenes: their JSONs, and their pictures' sizes
    vocabulary: Vocabulary
    splits: dict[str, ShardTable]
    fingerprint: str = ""
    format: int = FORMAT
    features: StoredFeatures | None = None  # None for shards of images, whose manifests do not name it

    def samples(self, split: str) -> int:
        """How many samples a split holds."""
        return int(self.splits[split].samples_S.sum())

    def sealed(self) -> Manifest:
        """The same manifest with its fingerprint: sha256 over everything else."""
        return replace(self, fingerprint=self._digest())

    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps({**self._head(), "fingerprint": ""}, sort_keys=True).encode())
        for split, table in self.splits.items():
            digest.update(f"{split} {len(table)}".encode())
            counts = table.samples_S.astype("<i8"), table.bytes_S.astype("<i8")
            for column in (*counts, table.xxh3_128_S16, table.index_sha256_S32):
                digest.update(column.ravel().data)
        return digest.hexdigest()

    def _head(self) -> dict[str, Any]:
        head = {**vars(self), "vocabulary": vars(self.vocabulary), "splits": sorted(self.splits)}
        features = head.pop("features")
        return {**head, "features": vars(features)} if features else head


def shard_name(split: str, number: int) -> str:
    """The file name of a split's shard."""
    return f"{split}-{number:06d}.tar"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the sealed manifest to a temporary name, syncs it and renames it."""
    temporary = folder / f"{MANIFEST}.{temporary_mark()}"
    with temporary.open("wb") as file:
        file.write(manifest_bytes(manifest))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / MANIFEST)


def manifest_bytes(manifest: Manifest) -> bytes:
    """What the file of a manifest holds: equal manifests have equal bytes."""
    sealed = manifest.sealed()
    splits = {
        name: {
            "shards": len(table),
            "samples": table.samples_S.tolist(),
            "bytes": table.bytes_S.tolist(),
            "xxh3_128": table.xxh3_128_S16.tobytes().hex(),
            "index_sha256": table.index_sha256_S32.tobytes().hex(),
        }
        for name, table in sealed.splits.items()
    }
    head = json.dumps({name: value for name, value in sealed._head().items() if name != "splits"}, indent=1)
    columns = ",\n".join(
        f"  {json.dumps(split)}: {{\n"
        + ",\n".join(f"   {json.dumps(name)}: {json.dumps(column)}" for name, column in each.items())
        + "\n  }"
        for split, each in splits.items()
    )
    return f'{head[:-2]},\n "splits": {{\n{columns}\n }}\n}}\n'.encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of shards.

    Raises UserError where there is none, where it was written by a newer version, or where it was changed by hand.
    """
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: missing; write the shards with `nsi shard SOURCE {folder}`") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    return parse_manifest(data, str(path))


def parse_manifest(data: bytes, path: str) -> Manifest:
    """A manifest from the bytes of its file; `path` is for messages. Raises UserError as `read_manifest` does."""
    try:
        content = _parse_json(data)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}); write the shards again with `nsi shard`") from None
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path}: not a manifest of this program; write the shards again with `nsi shard`")
    if content["format"] != FORMAT:
        newer = isinstance(content["format"], int) and content["format"] > FORMAT
        help_ = "upgrade the program" if newer else "write the shards again with `nsi shard`"
        raise UserError(f"{path}: format {content['format']}, but this version reads {FORMAT}; {help_}")
    try:
        manifest = Manifest(
            **{
                **content,
                "image_size": tuple(content["image_size"]),
                "mask_size": tuple(content["mask_size"]) if content["mask_size"] else None,
                "vocabulary": Vocabulary(**{name: tuple(names) for name, names in content["vocabulary"].items()}),
                "splits": {name: _table(name, columns) for name, columns in content["splits"].items()},
                "features": _features(content.get("features")),
            }
        )
        sealed = manifest.sealed()
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: not a manifest of this program ({error}); write the shards again") from None
    if sealed.fingerprint != manifest.fingerprint:
        raise UserError(f"{path}: its fingerprint does not fit its content; write the shards again with `nsi shard`")
    return manifest


def _parse_json(data: bytes) -> Any:
    """What `json.loads` gives, but for the columns of checksums, which are views of `data`.

    They are nine tenths of a manifest, and json would look at every digit and copy each thrice. Columns that are
    written in another way than ours are parsed as they stand.
    """
    view = memoryview(data)
    rest: list[bytes | memoryview] = []
    columns: dict[str, memoryview] = {}
    at = 0
    while found := _CHECKSUMS.search(data, at):
        begin = found.end()
        end = data.find(b'"', begin)
        if end < 0:
            break
        place = f"#{begin}"  # stands for the column while the rest is parsed: # is no hexadecimal digit
        columns[place] = view[begin:end]
        rest += [view[at:begin], place.encode()]
        at = end
    rest.append(view[at:])

    def restored(found: dict[str, Any]) -> dict[str, Any]:
        return {name: columns.get(value, value) if isinstance(value, str) else value for name, value in found.items()}

    try:
        return json.loads(b"".join(rest), object_hook=restored)
    except ValueError:
        return json.loads(data)  # so that the error names its place in the whole file


def _features(content: dict[str, Any] | None) -> StoredFeatures | None:
    return StoredFeatures(**{**content, "grid": tuple(content["grid"])}) if content else None


def _table(split: str, columns: dict[str, Any]) -> ShardTable:
    table = ShardTable(
        split,
        np.array(columns["samples"], np.int64),
        np.array(columns["bytes"], np.int64),
        _from_hex(columns["xxh3_128"], _XXH3_BYTES),
        _from_hex(columns["index_sha256"], _SHA256_BYTES),
    )
    lengths = {len(column) for column in (table.samples_S, table.bytes_S, table.xxh3_128_S16, table.index_sha256_S32)}
    if lengths != {columns["shards"]}:
        raise ValueError(f"split {split} lists {columns['shards']} shards, its columns {sorted(lengths)}")
    return table


def _from_hex(text: str | memoryview, width: int) -> np.ndarray:
    """(S, width) uint8 from two hexadecimal digits a byte."""
    return np.frombuffer(binascii.unhexlify(text), np.uint8).reshape(-1, width)
