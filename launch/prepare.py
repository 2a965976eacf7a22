"""What stands before the first step: data, model and what to go on from, checked on every rank; then the run folder."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.attempt import Attempt, take_attempt
from cluster.checkpoint import Checkpoint
from cluster.engine import read_deepspeed_config
from cluster.prometheus import forget_endpoints
from cluster.world import World
from launch import runfolder
from launch.build import make_backbone, make_model
from launch.config import TrainConfig, to_json
from launch.resume import find_checkpoint, load_start
from nsi.backbone import Backbone, parameters_hash
from nsi.errors import UserError
from nsi.model import NeuralSlotInterpreter
from shards.loading.loader import check_fits
from shards.order import Order
from shards.reading.cache import ShardCache
from shards.reading.dataset import Split, open_splits

DEEPSPEED_CONFIG = Path(__file__).with_name("deepspeed.json")


@dataclass(frozen=True)
class Parts:
    """What a run is made of, on this rank."""

    train: Split
    val: Split
    order: Order
    backbone: Backbone
    backbone_hash: str
    model: NeuralSlotInterpreter
    restored: Checkpoint | None


def prepare(config: TrainConfig, speak: bool, first_of_node: bool) -> Parts:
    """Opens the data, builds the model, and finds what to go on from.

    `speak`: whether to print warnings. `first_of_node`: whether to look if all shards are there, once a node.
    Raises UserError for anything that does not fit together.
    """
    read_deepspeed_config(config.engine.deepspeed_config or DEEPSPEED_CONFIG)  # the engine reads it again, too late
    cache = ShardCache(config.data.cache_path, int(config.data.cache_gb * 1e9)) if config.data.cache_path else None
    train_split, val_split = open_splits(config.data_path, ("train", "val"), cache)
    for split in (train_split, val_split):
        check_fits(split, config.data.max_program_len)
        if first_of_node:
            split.check_complete()
    if config.optim.batch_size > len(train_split):
        raise UserError(
            f"{config.data_path}: --batch_size {config.optim.batch_size} is larger than the train split's "
            f"{len(train_split)} scenes; lower it"
        )
    backbone = make_backbone(config.backbone, config.data.image_size)
    backbone_hash = parameters_hash(backbone)
    restored = find_checkpoint(config, train_split, backbone_hash, speak)
    model = make_model(config, train_split.manifest.vocabulary, backbone)
    if restored:
        model.load_state_dict(restored.training.parameters)
    elif config.checkpoint_path:
        load_start(model, config.checkpoint_path, train_split)
    order = Order(train_split.shard_samples, config.optim.seed, config.optim.batch_size)
    return Parts(train_split, val_split, order, backbone, backbone_hash, model, restored)


def begin(config: TrainConfig, world: World, parts: Parts) -> Attempt | None:
    """Rank 0 takes the attempt's number and writes down what is about to run."""
    if world.rank != 0:
        return None
    step = parts.restored.step if parts.restored else 0
    attempt = take_attempt(config.log_path / runfolder.ATTEMPTS, world.size, world.launcher, step)
    (config.log_path / runfolder.STOPPED).unlink(missing_ok=True)
    forget_endpoints(config.log_path)
    manifest = parts.train.manifest
    content = {
        "config": to_json(config),
        "data": {
            "path": config.data_path,
            "fingerprint": manifest.fingerprint,
            "variant": manifest.variant,
            "split_rule": manifest.split_rule,
            "image_size": manifest.image_size,
            **{split: manifest.samples(split) for split in manifest.splits},
        },
        "vocabulary": vars(manifest.vocabulary),
        "backbone": {
            "name": config.backbone.backbone,
            "hash": parts.backbone_hash,
            "feature_dim": parts.backbone.feature_dim,
            "grid": parts.backbone.grid,
        },
        "parameters": sum(parameter.numel() for parameter in parts.model.parameters()),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }
    path = config.log_path / runfolder.CONFIG
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.rename(path)
    return attempt
