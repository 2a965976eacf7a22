"""Features that were stored once, in the place of a backbone: what they must agree in with a run."""

from __future__ import annotations

from dataclasses import dataclass

from launch.config import BackboneConfig, DataConfig
from launch.training.build import make_backbone
from nsi.backbone import DCT, Backbone, absent_backbone, parameters_hash
from nsi.errors import UserError
from shards.manifest import MANIFEST, StoredFeatures
from shards.reading.cache import ShardCache
from shards.reading.dataset import Split, load_manifest, splits_of
from shards.reading.storage import open_storage
from shards.writing.target import UNFINISHED


@dataclass(frozen=True)
class Features:
    """A feature store that fits a run: its train and val splits, and what stands for the backbone."""

    splits: tuple[Split, Split]
    backbone: Backbone
    backbone_hash: str


def describe_transform(data: DataConfig, backbone: BackboneConfig) -> str:
    """How an image reaches the backbone, in words: features are the same only where these are."""
    by_way_of = f" by way of {data.squash_size}x{data.squash_size}" if data.squash_size else ""
    shown = "" if backbone.backbone == DCT else f", normalization {backbone.normalization}"
    return f"{data.image_size}x{data.image_size}{by_way_of}{shown}"


def describe_weights(backbone: BackboneConfig) -> str:
    """Where a backbone's weights come from, as a store notes it."""
    return "none" if backbone.backbone == DCT else "file" if backbone.backbone_weights else "hub"


def open_features(
    location: str, data: tuple[Split, Split], config: DataConfig, backbone: BackboneConfig, cache: ShardCache | None
) -> Features:
    """The store at `location`, whose splits are those of `data`.

    The backbone is built only to compare its hash, and only where its weights are at hand: a store from the hub's
    weights stands for the hub's. Raises UserError naming what does not fit.
    """
    storage = open_storage(location)
    if storage.is_local and storage.path(UNFINISHED).exists() and not storage.path(MANIFEST).exists():
        raise UserError(f"{location}: a feature store that is not complete; run its `nsi features` again to go on")
    manifest = load_manifest(storage)
    facts = manifest.features
    if facts is None:
        raise UserError(f"{location}: holds images, not features; write these with `nsi features {location} STORE`")
    made_of = data[0].manifest.fingerprint
    if manifest.source != made_of:
        raise UserError(
            f"{location}: was made of other shards (fingerprint {manifest.source[:12]}) than {data[0].folder} "
            f"({made_of[:12]}); write a store of these with `nsi features`"
        )
    _check(location, "--backbone", facts.backbone, backbone.backbone)
    _check(location, "images", manifest.transform, describe_transform(config, backbone))
    found_hash = _hash(location, facts, config, backbone)
    if found_hash != facts.backbone_hash:
        raise UserError(
            f"{location}: was made by a {facts.backbone} with other weights or patches (hash "
            f"{facts.backbone_hash[:12]}, here {found_hash[:12]}); give what `nsi features` was given"
        )
    train, val = splits_of(storage, manifest, [split.name for split in data], cache)
    for stored, split in zip((train, val), data, strict=True):
        if stored.shard_samples.tolist() != split.shard_samples.tolist():
            raise UserError(f"{location}: its {split.name} shards are not those of {split.folder}; write it again")
    return Features((train, val), absent_backbone(facts.grid, facts.feature_dim), facts.backbone_hash)


def _hash(location: str, facts: StoredFeatures, config: DataConfig, backbone: BackboneConfig) -> str:
    """The hash of the backbone that the run asks for."""
    if backbone.backbone == DCT or backbone.backbone_weights:
        return parameters_hash(make_backbone(backbone, config.image_size))
    if facts.weights != "hub":
        raise UserError(f"{location}: was made with --backbone_weights; give the same file, to compare it")
    return facts.backbone_hash


def _check(location: str, what: str, stored: str, wanted: str) -> None:
    if stored != wanted:
        raise UserError(f"{location}: was made with {what} {stored}, this run has {wanted}; give the same, or "
                        "write another store with `nsi features`")  # fmt: skip
