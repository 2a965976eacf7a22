"""`nsi features SHARDS OUT`: the frozen backbone's patch features, computed once for all epochs of all runs.

Shapes: B rows, P patches, F features.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro

from cluster.processes import use_gpus
from launch.config import BackboneConfig, DataConfig, Flat
from launch.parts import parse_part
from launch.progress import progress
from launch.training.build import make_backbone
from launch.training.stored import describe_transform, describe_weights
from nsi.backbone import Backbone, parameters_hash
from nsi.batch import Batch
from nsi.errors import UsageError, UserError
from nsi.tokens import pack, unpack
from shards.loading.feed import on_device
from shards.loading.loader import chosen_batches, refuse_faults
from shards.loading.rows import SceneShape
from shards.loading.workers import DataWorkers, open_workers
from shards.manifest import Manifest, Shard, StoredFeatures
from shards.reading.dataset import Split, load_manifest, open_splits
from shards.reading.storage import open_storage
from shards.tokens import Storage, Tokens
from shards.writing.store import (
    ErrorSums,
    StoredScene,
    StoreWriter,
    begin_store,
    finish_store,
    is_written,
    planned_store,
)
from shards.writing.target import leaving_nothing
from shards.writing.write import Part

SPLITS = ("train", "val")  # what training reads; `nsi eval` computes features anew
_WAITING = 4  # batches that may wait for the disk


@dataclass(frozen=True)
class FeaturesConfig:
    """Store the frozen backbone's patch features, so that `nsi train --features OUT` does without the backbone.

    OUT has a shard for each of SHARDS' train and val shards, with the same scenes in the same order. It is bound to
    these shards, to the backbone and its weights, and to how images reach it: give the flags that `nsi train` is given.
    At the defaults a scene takes 1.2 MB (784 patches of 768 features in bf16), or half of that as int8.

    A run that was cut goes on where it stopped. Several GPUs or machines: run `--part 1/N` to `--part N/N`, each on a
    GPU of its own (a Slurm job array, say); the one that ends last completes OUT.
    """

    shards: tyro.conf.Positional[str]
    """Folder of shards, written by `nsi shard`: a path, s3://bucket/folder or http(s)://host/folder."""
    out: tyro.conf.Positional[Path]
    """Folder to write to; made if it is missing."""
    image_size: int = DataConfig.image_size
    """As in `nsi train`."""
    squash_size: int = DataConfig.squash_size
    """As in `nsi train`."""
    backbone: Flat[BackboneConfig] = field(default_factory=BackboneConfig)
    storage: Storage = "bf16"
    """bf16: features rounded to 8 significant bits. int8: 8 bits each and a scale a patch, half the size. What it costs
    in precision is measured over all scenes and told."""
    batch_size: int = 64
    """Images that the backbone takes at once."""
    num_workers: int = 2
    """Processes that read and decode images."""
    part: str = ""
    """i/N: write the i-th of N parts, i from 1."""


class _Piece(NamedTuple):
    """What the backbone takes at once: some scenes of one shard."""

    shard: str
    ids_B: np.ndarray
    is_last: bool


def run(config: FeaturesConfig) -> None:
    """Writes what is missing of a store. Raises UserError where it cannot be read, computed or written."""
    part = _check(config)
    splits = _open(config.shards)
    data = DataConfig(image_size=config.image_size, squash_size=config.squash_size)
    device = torch.device("cuda" if use_gpus() else "cpu")
    backbone = make_backbone(config.backbone, config.image_size)
    features = StoredFeatures(
        config.backbone.backbone,
        parameters_hash(backbone),
        describe_weights(config.backbone),
        backbone.grid,
        backbone.feature_dim,
        config.storage,
        0.0,
        0.0,
    )
    planned = planned_store(splits[0].manifest, describe_transform(data, config.backbone), features)
    shape = SceneShape(config.image_size, splits[0].manifest.max_objects, config.squash_size)
    with leaving_nothing(config.out):
        complete = begin_store(config.out, planned)
        if complete is None:
            _write_missing(config, splits, shape, backbone.to(device), device, part)
            complete = finish_store(config.out, planned, [split.table for split in splits])
    if complete is None:
        assert part is not None
        print(f"{config.out}: part {part.number}/{part.count} is done; the last part to end completes the store")
        return
    _check_whole(config.out, complete)
    _tell(config.out, complete)


def _write_missing(
    config: FeaturesConfig,
    splits: list[Split],
    shape: SceneShape,
    backbone: Backbone,
    device: torch.device,
    part: Part | None,
) -> None:
    shards = [(split, place) for split in splits for place in range(len(split.table))]
    mine = part.share(shards) if part else shards
    total = sum(split.table[place].samples for split, place in mine)
    todo = [(split, place) for split, place in mine if not is_written(config.out, split.table[place])]
    done = total - sum(split.table[place].samples for split, place in todo)
    with (
        contextlib.closing(StoreWriter(config.out)) as store,
        open_workers(config.num_workers, pin=device.type == "cuda") as workers,
        progress("storing features", total, unit="scenes") as advance,
        ThreadPoolExecutor(1) as thread,  # hashes and writes while the next features are computed
        torch.inference_mode(),
    ):
        advance(done)
        waiting: deque[Future[None]] = deque()
        for split in splits:
            pieces = list(_pieces(split, [place for each, place in todo if each is split], config.batch_size))
            jsons = Split(split.storage, split.manifest, split.name, split.source.cache)  # the thread's own
            batches = _batches(split, shape, pieces, config.batch_size, workers, device)
            for piece, batch in zip(pieces, batches, strict=True):
                stored_BPF, scales_BP, sums = _store(backbone, batch, len(piece.ids_B), config.storage, piece.shard)
                waiting.append(thread.submit(_write, store, jsons, piece, batch.keys, stored_BPF, scales_BP, sums))
                while len(waiting) > _WAITING:
                    waiting.popleft().result()
                done += len(piece.ids_B)
                advance(done)
        for each in waiting:
            each.result()


def _pieces(split: Split, places: list[int], batch_size: int) -> Iterator[_Piece]:
    """Some shards' scenes in pieces that never cross a shard's end, so that each shard is computed as if alone."""
    ends_S = np.cumsum(split.shard_samples)
    for place in places:
        shard: Shard = split.table[place]
        ids = np.arange(ends_S[place] - shard.samples, ends_S[place])
        for first in range(0, len(ids), batch_size):
            yield _Piece(shard.name, ids[first : first + batch_size], first + batch_size >= len(ids))


def _batches(
    split: Split, shape: SceneShape, pieces: list[_Piece], rows: int, workers: DataWorkers, device: torch.device
) -> Iterator[Batch]:
    ids = iter([piece.ids_B for piece in pieces])
    return on_device(map(refuse_faults, chosen_batches(split, shape, rows, ids, workers)), device)


def _store(
    backbone: Backbone, batch: Batch, count: int, storage: Storage, shard: str
) -> tuple[np.ndarray, np.ndarray | None, ErrorSums]:
    """The features of the first `count` rows as they are stored (bfloat16 by its bits), and what storing them costs."""
    features_BPF = backbone(batch.images_BCHW)[:count]
    stored_BPF, scales_BP = pack(features_BPF, storage)
    error_BPF = unpack(stored_BPF, scales_BP) - features_BPF
    sums_3 = torch.stack(
        [
            error_BPF.square().sum(dtype=torch.float64),
            features_BPF.square().sum(dtype=torch.float64),
            error_BPF.abs().max().double(),
        ]
    )
    if not sums_3.isfinite().all():
        raise UserError(f"{shard}: the backbone gives features that are no finite numbers; check its weights")
    squared_error, squares, largest = sums_3.tolist()
    bits_BPF = stored_BPF.view(torch.int16) if storage == "bf16" else stored_BPF
    scales = None if scales_BP is None else scales_BP.cpu().numpy()
    return bits_BPF.cpu().numpy(), scales, ErrorSums(squared_error, squares, largest, features_BPF.numel())


def _write(
    store: StoreWriter,
    split: Split,
    piece: _Piece,
    keys: tuple[str, ...],
    stored_BPF: np.ndarray,
    scales_BP: np.ndarray | None,
    sums: ErrorSums,
) -> None:
    if scales_BP is None:
        scales_BP = np.empty((len(stored_BPF), 0), np.float32)
    images = [sample.image.xxh3 for sample in split.locate(piece.ids_B)]
    made = map(Tokens, keys, images, stored_BPF, scales_BP)
    store.write(piece.shard, map(StoredScene, made, split.read_jsons(piece.ids_B)), sums, piece.is_last)


def _open(shards: str) -> list[Split]:
    """The splits that training reads, as far as there are any."""
    there = load_manifest(open_storage(shards)).splits
    names = [name for name in SPLITS if name in there]
    if not names:
        raise UserError(f"{shards}: has neither a train nor a val split, so nothing to train on")
    return open_splits(shards, names)


def _check(config: FeaturesConfig) -> Part | None:
    """The part that is asked for. Raises UsageError for values that no run could use."""
    for name in ("image_size", "batch_size", "num_workers"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name} {getattr(config, name)}: must be above 0")
    if config.squash_size < 0:
        raise UsageError(f"--squash_size {config.squash_size}: must be at least 0")
    if config.backbone.backbone_trainable:
        raise UsageError("--backbone_trainable: only a frozen backbone's features can be stored; leave it out")
    return parse_part(config.part)


def _check_whole(out: Path, manifest: Manifest) -> None:
    """Raises UserError where a shard of a complete store is missing or cut since."""
    storage = open_storage(out)
    for name in manifest.splits:
        Split(storage, manifest, name, None).check_complete()


def _tell(out: Path, manifest: Manifest) -> None:
    facts = manifest.features
    assert facts is not None
    scenes = ", ".join(f"{name} {manifest.samples(name)}" for name in manifest.splits)
    size = sum(int(table.bytes_S.sum()) for table in manifest.splits.values())
    each = f"{facts.shape.patches} patches of {facts.feature_dim} features"
    print(f"{out}: {scenes} scenes, {each}, {size / 1e6:,.1f} MB")
    print(
        f"  {facts.storage}: off by {facts.relative_rms_error:.2g} of the features' size (root mean square), the worst "
        f"by {facts.largest_error:.2g}; next: nsi train --features {out}"
    )
