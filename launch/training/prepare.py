"""What stands before the first step: data, model and what to go on from, checked on every rank; then the run folder."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.checkpoints.attempt import Attempt, go_on_from, take_attempt
from cluster.checkpoints.checkpoint import Checkpoint
from cluster.checkpoints.folder import clear_leftovers, survey
from cluster.engine.config import precision_note
from cluster.engine.engine import check_deepspeed_config
from cluster.records.prometheus import forget_endpoints
from cluster.world import World
from launch import runfolder
from launch.config import TrainConfig, to_json
from launch.training.build import make_backbone, make_model, standing_before
from launch.training.choose import Choice, saved_since
from launch.training.compiling import compile_model
from launch.training.resume import Progress, check_belongs, load_start, progress_of
from launch.training.stored import open_features
from nsi.backbone import Backbone, parameters_hash
from nsi.errors import UserError
from nsi.model import NeuralSlotInterpreter, load_trained
from nsi.schema import Vocabulary
from shards.capacity import cache_needed
from shards.loading.loader import check_fits
from shards.loading.rows import SceneShape
from shards.manifest import Manifest
from shards.order import Order
from shards.reading.cache import ShardCache
from shards.reading.dataset import Split, open_splits

DEEPSPEED_CONFIG = Path(__file__).parents[1] / "deepspeed.json"


@dataclass(frozen=True)
class Parts:
    """What a run is made of, on this rank."""

    train: Split
    val: Split
    train_rows: Split  # what rows are read from: the splits themselves, or those of a feature store made of them
    val_rows: Split
    shape: SceneShape
    order: Order
    backbone: Backbone  # what stands before the model
    backbone_hash: str  # of the frozen weights, trained on or not
    model: NeuralSlotInterpreter
    restored: Progress | None  # of the checkpoint that it goes on from, whose tensors are not held


def prepare(config: TrainConfig, speak: bool, first_of_node: bool, restored: Checkpoint | None) -> Parts:
    """Opens the data and builds the model, with the weights of `restored`, the checkpoint to go on from.

    `speak`: whether to print warnings. `first_of_node`: whether to look if all shards are there, once a node.
    Raises UserError for anything that does not fit together.
    """
    check_deepspeed_config(config.engine.deepspeed_config or DEEPSPEED_CONFIG, config.engine)
    cache = ShardCache(config.data.cache_path, int(config.data.cache_gb * 1e9)) if config.data.cache_path else None
    train_split, val_split = open_splits(config.data_path, ("train", "val"), cache)
    data = train_split, val_split
    stored = config.data.features and open_features(config.data.features, data, config.data, config.backbone, cache)
    train_rows, val_rows = stored.splits if stored else data
    for split in (train_rows, val_rows):
        check_fits(split, config.data.max_program_len)
        if first_of_node:
            split.check_complete()
    if config.optim.batch_size > len(train_split):
        raise UserError(
            f"{config.data_path}: --batch_size {config.optim.batch_size} is larger than the train split's "
            f"{len(train_split)} scenes; lower it"
        )
    if stored:
        backbone, backbone_hash = stored.backbone, stored.backbone_hash
    else:
        backbone = make_backbone(config.backbone, config.data.image_size)
        backbone_hash = parameters_hash(backbone)
    warn = _warn if speak else lambda text: None
    if cache and (needed := cache_needed(train_rows.table, config.optim.batch_size)) > cache.limit_bytes:
        warn(
            f"--cache_gb {config.data.cache_gb:g}: shards that are read at a time take up to {needed / 1e9:.3g} GB, so "
            "they will be fetched again and again; give that much, or leave --cache_path out and read by ranges"
        )
    if restored:
        check_belongs(restored, config, train_split, backbone_hash, warn)
    model = make_model(config, train_split.manifest.vocabulary, backbone)
    if (note := precision_note(config.engine)) and not (restored and _same_precision(restored, config)):
        warn(note)
    if restored:
        load_trained(model, restored.training.parameters)
    elif config.checkpoint_path:
        load_start(model, config.checkpoint_path, config, train_split, backbone_hash, warn)
    if config.engine.compile:
        compile_model(model, config.engine.zero_stage, warn)
    order = Order(train_split.shard_samples, config.optim.seed, config.optim.batch_size)
    shape = _shape(config, train_rows)
    before = standing_before(config.backbone, backbone)
    progress = progress_of(restored) if restored else None
    return Parts(*data, train_rows, val_rows, shape, order, before, backbone_hash, model, progress)


def _same_precision(restored: Checkpoint, config: TrainConfig) -> bool:
    """Whether the run came by its precision in the same way before, and has said so."""
    before = restored.facts["config"]["engine"]
    return (before["precision"], before["zero_stage"]) == (config.engine.precision, config.engine.zero_stage)


def _warn(text: str) -> None:
    print(f"nsi train: {text}", file=sys.stderr)


def _shape(config: TrainConfig, rows: Split) -> SceneShape:
    """What a row holds: stored features where there are any, and then no image."""
    objects = config.data.max_program_len
    if features := rows.manifest.features:
        return SceneShape(0, objects, tokens=features.shape)
    return SceneShape(config.data.image_size, objects, config.data.squash_size)


def begin(config: TrainConfig, world: World, parts: Parts, choice: Choice, started: float) -> Attempt | None:
    """Rank 0, whose process `started` then, takes the attempt's number and writes down what is about to run.

    From then on an attempt that was still there ends. Where it has saved more since the choice of what to go on from,
    the attempt is one that goes on from that; see `catch_up`. Raises UserError where the run folder cannot be written.
    """
    if world.rank != 0:
        return None
    step = parts.restored.step if parts.restored else 0
    attempts = config.log_path / runfolder.ATTEMPTS
    # Checkpoints may have come from another run folder, without its attempts.
    after = max((found.attempt for found in survey(config.log_path / runfolder.CHECKPOINTS)), default=0)
    attempt = take_attempt(attempts, world.size, world.launcher, step, started, after)
    if (later := saved_since(config.log_path, choice)) is not None:
        attempt = go_on_from(attempts, attempt, later)  # at once: an attempt that goes on from before makes it void
    with contextlib.suppress(OSError):  # what stays takes some room, and is tried again after a checkpoint
        clear_leftovers(config.log_path / runfolder.CHECKPOINTS, attempt.number)
    job = os.environ.get("SLURM_JOB_ID", "")  # which must not be queued again for the death of another job's attempt
    try:
        (config.log_path / runfolder.STOPPED).unlink(missing_ok=True)
        stop = config.log_path / runfolder.STOP
        # Meant for an attempt before; but of a job's restarts each heeds what came since the first.
        if stop.exists() and stop.stat().st_mtime < float(os.environ.get("NSI_JOB_BEGAN", started)):
            stop.unlink()
        (config.log_path / runfolder.RUNNING).write_text(f"{attempt.number} {job}\n")
        forget_endpoints(config.log_path)
        _write_config(config, parts)
    except OSError as error:
        raise UserError(
            f"{config.log_path}: cannot be written ({error.strerror or error}); make room, or choose another --log_path"
        ) from None
    return attempt


def catch_up(config: TrainConfig, world: World, parts: Parts, attempt: Attempt) -> Attempt | None:
    """Rank 0 writes down what an attempt goes on from that had to choose and to prepare once more."""
    if world.rank != 0:
        return None
    step = parts.restored.step if parts.restored else 0
    return go_on_from(config.log_path / runfolder.ATTEMPTS, attempt, step)


def _write_config(config: TrainConfig, parts: Parts) -> None:
    manifest = parts.train.manifest
    content = {
        **record(config, manifest, manifest.vocabulary, parts.backbone, parts.backbone_hash, parts.model),
        "features": {
            "path": config.data.features,
            "fingerprint": parts.train_rows.manifest.fingerprint,
            "storage": features.storage,
            "relative_rms_error": features.relative_rms_error,
        }
        if (features := parts.train_rows.manifest.features)
        else None,
    }
    path = config.log_path / runfolder.CONFIG
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.rename(path)


def record(
    config: TrainConfig,
    manifest: Manifest | None,
    vocabulary: Vocabulary,
    backbone: Backbone,
    backbone_hash: str,
    model: NeuralSlotInterpreter,
) -> dict[str, Any]:
    """What config.json says of a run; `manifest` is that of its shards, if it has any."""
    data: dict[str, Any] = {"path": config.data_path}
    if manifest:
        data |= {name: getattr(manifest, name) for name in ("fingerprint", "variant", "split_rule", "image_size")}
        data |= {split: manifest.samples(split) for split in manifest.splits}
    return {
        "config": to_json(config),
        "data": data,
        "vocabulary": vars(vocabulary),
        "backbone": {
            "name": config.backbone.backbone,
            "hash": backbone_hash,
            "feature_dim": backbone.feature_dim,
            "grid": backbone.grid,
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }
