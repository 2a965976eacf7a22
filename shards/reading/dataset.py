"""One split of a folder of shards, read by place: sample i is a stretch of a tar, wherever the tars are.

Opening reads the manifest alone. A shard's index is read when its first sample is asked for and checked against the
manifest; every member's checksum is verified when it is read. Memory does not grow with the number of samples.
"""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from nsi.errors import UserError
from shards.index import INDEX_SUFFIX, MEMBERS, MemberPlace, parse_index
from shards.manifest import MANIFEST, Manifest, Shard, ShardTable, parse_manifest
from shards.reading.cache import ShardCache
from shards.reading.reader import Span
from shards.reading.sample import DECODING_ERRORS, Sample, Source, cannot_decode, member_bytes
from shards.reading.storage import Storage, open_storage

Decoded = TypeVar("Decoded")
_INDEXES_KEPT = 128  # two blocks of the order and room to spare; some 50 KB each
_place = functools.partial(tuple.__new__, MemberPlace)  # twice as fast as its constructor
_REQUESTS = 16  # indexes asked of a server at the same time


class _Index(NamedTuple):
    """A shard's index in plain columns, from which rows are taken faster than from its records."""

    shard: Shard
    keys_K: np.ndarray
    places_K9: np.ndarray  # offset, size and xxh3 of image, mask and JSON

    @staticmethod
    def of(shard: Shard, records_K: np.ndarray) -> _Index:
        columns = [records_K[member][name] for member in MEMBERS for name in MemberPlace._fields]
        return _Index(shard, np.ascontiguousarray(records_K["key"]), np.stack(columns, axis=1))


class Split:
    """A split that is open for reading. Sample ids run over the shards in the manifest's order."""

    def __init__(self, storage: Storage, manifest: Manifest, name: str, cache: ShardCache | None) -> None:
        shape = manifest.features.shape if manifest.features else None
        self.source = Source(storage, cache, manifest.fingerprint, shape)
        self.storage, self.manifest, self.name = storage, manifest, name
        self.table: ShardTable = manifest.splits[name]
        self._begins_S1 = np.concatenate(([0], np.cumsum(self.table.samples_S)))
        self._indexes: OrderedDict[int, _Index] = OrderedDict()
        self._reader = self.source.reader()

    def __len__(self) -> int:
        return int(self._begins_S1[-1])

    @property
    def folder(self) -> str:
        """The folder of shards, for messages."""
        return self.storage.location

    @property
    def shard_samples(self) -> np.ndarray:
        """Samples of each shard, as the order wants them."""
        return self.table.samples_S

    def locate(self, samples: Sequence[int] | np.ndarray) -> list[Sample]:
        """Where some samples lie. Raises UserError where an index is missing or does not fit its tar."""
        samples_R = np.asarray(samples, np.int64)
        if samples_R.size and not 0 <= samples_R.min() <= samples_R.max() < len(self):
            raise IndexError(f"samples {samples_R.min()} to {samples_R.max()} of {len(self)}")
        shards_R = np.searchsorted(self._begins_S1, samples_R, side="right") - 1
        places_R = samples_R - self._begins_S1[shards_R]
        found: dict[int, Sample] = {}
        numbers = np.unique(shards_R).tolist()
        for number, index in zip(numbers, self._open_indexes(numbers), strict=True):
            rows = np.flatnonzero(shards_R == number)
            found.update(zip(rows.tolist(), _samples(index, places_R[rows], samples_R[rows].tolist()), strict=True))
        return [found[row] for row in range(len(samples_R))]

    def key(self, sample: int) -> str:
        """The key of a sample, from the index."""
        return self.locate([sample])[0].key

    def read(self, sample: int, member: str) -> bytes:
        """The bytes of a sample's "image", "mask" or "json".

        Raises UserError with shard, key and offset where they are not the bytes that were written.
        """
        found = self.locate([sample])[0]
        (data,) = self._reader.read([found.span])
        return bytes(member_bytes(found, data, member, self.source))

    def read_jsons(self, samples: Sequence[int] | np.ndarray) -> list[bytes]:
        """The bytes of some samples' JSONs, and of nothing else. Raises UserError as `read` does."""
        found = [
            sample._replace(span=sample.span._replace(offset=sample.json.offset, size=sample.json.size))
            for sample in self.locate(samples)
        ]
        data = self._reader.read([sample.span for sample in found])
        return [
            bytes(member_bytes(sample, part, "json", self.source)) for sample, part in zip(found, data, strict=True)
        ]

    def decode(self, sample: int, member: str, decoder: Callable[[bytes], Decoded]) -> Decoded:
        """A member's bytes, decoded. Raises UserError with shard and key where they cannot be."""
        data = self.read(sample, member)
        try:
            return decoder(data)
        except DECODING_ERRORS as error:
            raise UserError(cannot_decode(self.locate([sample])[0], member, error, self.source)) from None

    def indexes(self) -> Iterator[np.ndarray]:
        """The records of each shard's index, in order."""
        return (self._records(shard) for shard in self.table)

    def find(self, key: str) -> int | None:
        """The id of the sample with a key, None where there is none. Reads every index."""
        for shard, records in enumerate(self.indexes()):
            if len(places := np.flatnonzero(records["key"] == key.encode())):
                return int(self._begins_S1[shard] + places[0])
        return None

    def check_complete(self) -> None:
        """Compares the storage's listing with the manifest, where it can list: nothing is read, so it costs little.

        Raises UserError for the first shard or index that is missing or has another size.
        """
        sizes = self.storage.sizes()
        if sizes is None:
            return
        for shard in self.table:
            for name in (shard.name, index_name(shard.name)):
                if name not in sizes:
                    raise UserError(f"{self.storage.where(name)}: missing; restore it")
            if sizes[shard.name] != shard.bytes:
                raise UserError(
                    f"{self.storage.where(shard.name)}: has {sizes[shard.name]} bytes, the manifest says "
                    f"{shard.bytes}; restore the shard"
                )

    def _open_indexes(self, numbers: Sequence[int]) -> list[_Index]:
        """The indexes of some shards. Those of the shards used last are kept."""
        missing = [number for number in numbers if number not in self._indexes]
        shards = [self.table[number] for number in missing]
        if self.storage.is_local or len(shards) < 2:
            read = list(map(self._records, shards))
        else:  # a new block of the order needs many at once, and a server takes its time over each
            with ThreadPoolExecutor(min(_REQUESTS, len(shards))) as threads:
                read = list(threads.map(self._records, shards))
        self._indexes.update(zip(missing, map(_Index.of, shards, read), strict=True))
        for number in numbers:
            self._indexes.move_to_end(number)
        found = [self._indexes[number] for number in numbers]
        while len(self._indexes) > _INDEXES_KEPT:
            self._indexes.popitem(last=False)
        return found

    def _records(self, shard: Shard) -> np.ndarray:
        name = index_name(shard.name)
        data = self.storage.read(name)
        where = self.storage.where(name)
        if hashlib.sha256(data).hexdigest() != shard.index_sha256:
            raise UserError(
                f"{where}: is not the index that was written (sha256 differs from the manifest); restore the file"
            )
        records = parse_index(data, where)
        if len(records) != shard.samples:
            raise UserError(f"{where}: lists {len(records)} samples, the manifest {shard.samples}; restore the file")
        return records


def open_splits(location: str | Path, names: Sequence[str], cache: ShardCache | None = None) -> list[Split]:
    """Opens splits of a folder of shards: a path, s3://, http:// or https://. The manifest is read once for all.

    Raises UserError where there is no such folder or split.
    """
    storage = open_storage(location)
    manifest = load_manifest(storage)
    if manifest.features:
        raise UserError(
            f"{location}: a feature store; give it to --features, and the shards that it was made of as data"
        )
    return splits_of(storage, manifest, names, cache)


def splits_of(storage: Storage, manifest: Manifest, names: Sequence[str], cache: ShardCache | None) -> list[Split]:
    """Splits of shards whose manifest has been read. Raises UserError where there is no such split."""
    for name in names:
        if name not in manifest.splits:
            there = ", ".join(sorted(manifest.splits))
            raise UserError(f"{storage.location}: has no split {name!r}; there are {there}")
    return [Split(storage, manifest, name, cache) for name in names]


def open_split(location: str | Path, name: str, cache: ShardCache | None = None) -> Split:
    """Opens one split, as `open_splits` does."""
    return open_splits(location, [name], cache)[0]


def load_manifest(storage: Storage) -> Manifest:
    """The manifest of a folder of shards, wherever it is."""
    return parse_manifest(storage.read(MANIFEST), storage.where(MANIFEST))


def _samples(index: _Index, places_R: np.ndarray, ids: list[int]) -> Iterator[Sample]:
    """Some rows of an index as tuples."""
    shard = index.shard
    keys, places = index.keys_K[places_R].tolist(), index.places_K9[places_R].tolist()
    for sample, key, numbers in zip(ids, keys, places, strict=True):
        image, mask, json = _place(numbers[:3]), _place(numbers[3:6]), _place(numbers[6:])
        span = Span(shard.name, shard.bytes, shard.xxh3_128, image.offset, json.offset + json.size - image.offset)
        yield Sample(sample, key.decode(), span, image, mask, json)


def index_name(shard: str) -> str:
    """The name of the index beside a shard."""
    return f"{shard.removesuffix('.tar')}{INDEX_SUFFIX}"
