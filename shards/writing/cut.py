"""Which scenes go into which shard: a pure function of the scenes and the settings, the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nsi.errors import UsageError
from shards.manifest import Manifest, shard_name
from shards.sources.scene import HdfRow, Scene
from shards.writing.splits import SplitRule, followed_rule, split_scenes
from shards.writing.survey import Survey
from shards.writing.transform import Transform

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Settings:
    """What a person chooses about shards."""

    rule: SplitRule = "official"
    shard_samples: int = 500
    shard_mb: float = 0.0  # a shard ends before its scenes exceed so many megabytes in the source; 0 goes by samples
    transform: Transform = field(default_factory=Transform)

    def __post_init__(self) -> None:
        if self.shard_samples < 1:
            raise UsageError("--shard_samples must be at least 1")
        if not self.shard_mb >= 0:  # NaN fails it too
            raise UsageError(f"--shard_mb {self.shard_mb}: must be a size in megabytes, or 0")


class ShardPlan(NamedTuple):
    """One shard that is to be written."""

    name: str  # its file's
    split: str
    scenes: tuple[Scene, ...]
    digest: str  # over what the scenes hold


@dataclass(frozen=True)
class Plan:
    """All shards of a folder, and a digest over all that decides their content."""

    split_rule: str  # the rule that was followed in the end
    shards: tuple[ShardPlan, ...]
    digest: str


def cut(survey: Survey, settings: Settings) -> Plan:
    """Deals the scenes out to shards: splits one after the other, scenes by index."""
    split_rule, splits = split_scenes(survey.scenes, settings.rule)
    shards = tuple(
        ShardPlan(shard_name(split, number), split, part, _scenes_digest(part))
        for split, scenes in splits.items()
        for number, part in enumerate(_parts(scenes, settings))
    )
    digest = hashlib.sha256(f"{split_rule} {settings.transform.describe()} {survey.vocabulary.fingerprint()}".encode())
    for shard in shards:
        digest.update(f"{shard.name} {shard.digest}".encode())
    return Plan(split_rule, shards, digest.hexdigest())


def may_be_cut_so(manifest: Manifest, settings: Settings) -> bool:
    """Whether finished shards may be those of some settings, as far as their manifest tells without the scenes."""
    count, samples = settings.shard_samples, [table.samples_S for table in manifest.splits.values()]
    return (
        manifest.split_rule == followed_rule(settings.rule, manifest.variant)
        and manifest.transform == settings.transform.describe()
        and (settings.shard_mb > 0 or all((each[:-1] == count).all() and (each <= count).all() for each in samples))
    )


def _scenes_digest(scenes: Sequence[Scene]) -> str:
    """A digest over what scenes hold: their JSONs, and what is known of their pictures without reading these here."""
    digest = hashlib.sha256()
    for scene in scenes:
        sizes = (scene.image.size, scene.mask.size if scene.mask else 0)
        glimpse = scene.image.glimpse if isinstance(scene.image, HdfRow) else b""
        digest.update(scene.key.encode() + scene.digest + glimpse + b"%d %d\n" % sizes)
    return digest.hexdigest()


def _parts(scenes: Sequence[Scene], settings: Settings) -> Iterator[tuple[Scene, ...]]:
    if not settings.shard_mb:
        for start in range(0, len(scenes), settings.shard_samples):
            yield tuple(scenes[start : start + settings.shard_samples])
        return
    part: list[Scene] = []
    size = 0
    for scene in scenes:
        if part and size + scene.size > settings.shard_mb * MEGABYTE:
            yield tuple(part)
            part, size = [], 0
        part.append(scene)
        size += scene.size
    yield tuple(part)
