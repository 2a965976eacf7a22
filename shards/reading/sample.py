"""One sample: where it lies in its tar, and its members' bytes, verified when they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from nsi.errors import UserError
from shards.index import MemberPlace
from shards.reading.cache import ShardCache
from shards.reading.reader import Span, SpanReader
from shards.reading.storage import Storage
from shards.tokens import TokenShape

DECODING_ERRORS = Exception  # what Pillow raises of damaged pictures depends on its plugins, and is no short list
_digest = xxhash.xxh3_64_intdigest


class Damaged(UserError):
    """A member's bytes are not those that were written."""


class Sample(NamedTuple):
    """Where a sample lies: the stretch of its tar that holds all of it, and its members in the tar."""

    sample: int  # its id: its place in the split
    key: str  # from the index
    span: Span
    image: MemberPlace  # in a feature store the features made of it
    mask: MemberPlace
    json: MemberPlace


@dataclass(frozen=True)
class Source:
    """Where a data set is read from. Cheap to send to another process."""

    storage: Storage
    cache: ShardCache | None
    fingerprint: str
    features: TokenShape | None = None  # of a feature store's scenes

    def reader(self) -> SpanReader:
        """A reader of its shards, for one thread."""
        return SpanReader(self.storage, self.cache, self.fingerprint)

    def where(self, sample: Sample) -> str:
        """A sample's shard, for messages."""
        return self.storage.where(sample.span.shard)

    def named(self, member: str) -> str:
        """What a member is, for messages."""
        return "features" if self.features and member == "image" else member

    def remedy(self) -> str:
        """What helps against damaged bytes, for messages."""
        advice = f"run `nsi verify {self.storage.location}` and restore the shard"
        return f"remove the copies in {self.cache.folder}; if that does not help, {advice}" if self.cache else advice


def member_bytes(sample: Sample, data: memoryview | bytes, member: str, source: Source) -> memoryview | bytes:
    """A member's bytes out of those of its sample. Raises UserError where they are not the bytes that were written."""
    offset, size, xxh3 = getattr(sample, member)
    start = offset - sample.span.offset
    part = data[start : start + size]
    if size == 0:
        raise UserError(f"{source.where(sample)}: {sample.key} has no {source.named(member)}: its source had none")
    if _digest(part) != xxh3:
        raise Damaged(
            f"{source.where(sample)}: {source.named(member)} of {sample.key} at offset {offset} does not have its "
            f"checksum; {source.remedy()}"
        )
    return part


def training_bytes(
    sample: Sample, data: memoryview | bytes, source: Source
) -> tuple[memoryview | bytes, memoryview | bytes]:
    """Image and JSON of a sample, as `member_bytes` gives them, in the least time: training reads nothing else."""
    begin = sample.span.offset
    (image_at, image_size, image_xxh3), (json_at, json_size, json_xxh3) = sample.image, sample.json
    image = data[image_at - begin : image_at - begin + image_size]
    json = data[json_at - begin : json_at - begin + json_size]
    if _digest(image) != image_xxh3 or _digest(json) != json_xxh3:
        return member_bytes(sample, data, "image", source), member_bytes(sample, data, "json", source)
    return image, json


def cannot_decode(sample: Sample, member: str, error: Exception, source: Source) -> str:
    """The message for a member whose bytes are those that were written, and yet no picture or JSON."""
    offset = getattr(sample, member).offset
    advice = (
        "write the store again with `nsi features`"
        if source.features
        else "it was so in the source: remove that scene there and shard again"
    )
    return (
        f"{source.where(sample)}: {source.named(member)} of {sample.key} at offset {offset} cannot be decoded "
        f"({error}); {advice}"
    )
