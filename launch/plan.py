"""`nsi plan SHARDS`: what a training run over these shards will need, from the manifest alone, before paying for it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import tyro

from launch.plan_text import cautions, to_text
from nsi.errors import UsageError, UserError
from shards.capacity import Capacity, World, capacity
from shards.manifest import MANIFEST, Manifest, parse_manifest
from shards.pace import REMOTE_REQUESTS, Pace, Speeds, pace
from shards.reading.storage import Storage, open_storage

SPLIT = "train"


@dataclass(frozen=True)
class PlanConfig:
    """Say what `nsi train` will need over a folder of shards: steps, reads, cache, open files, rates and memory.

    Only the manifest is read, so a thousand nodes can be planned on a laptop. Amounts are exact or bounds, as said;
    times and rates are estimates from the speeds given here. Two ways to read are set side by side: ranged reads, of
    samples one by one from a shared file system or an object store; and `nsi train --cache_path`, which keeps whole
    shards of an object store on each node's disk.
    """

    shards: tyro.conf.Positional[str]
    """Folder of shards, written by `nsi shard`: a path, s3://bucket/folder or http(s)://host/folder."""
    ranks: int = 1
    """Processes of the run in all, one a GPU."""
    nodes: int = 1
    """Machines that they are spread over, equally."""
    batch_size: int = 128
    """The GLOBAL batch, as in `nsi train`."""
    epochs: int = 300
    """Passes over the training split, as in `nsi train`."""
    max_steps: int = 0
    """Stop after so many steps instead; 0 means by --epochs."""
    num_workers: int = 1
    """Processes a rank that read and decode. Each is taken to have a core of its own."""
    storage_mb_per_second: float = 1000.0
    """What the storage gives one node while all nodes read, in 10^6 bytes a second. A network of 10 Gbit/s carries
    about 1200."""
    storage_latency_ms: float = 10.0
    """From a request to its first byte. Usual are 0.1 for a local disk, 1 for a parallel file system, 20 to 50 for an
    object store."""
    decode_images_per_second: float = 370.0
    """Images that one core decodes: 370 is what Pillow does with PNGs of 320x240."""
    images_per_second: float | None = None
    """How fast all ranks together shall train: says what that asks of the storage, and whether the data keep up."""
    json: bool = False
    """Print one JSON object instead of text."""


def run(config: PlanConfig) -> None:
    """Prints the plan. Raises UsageError for a world that cannot be, UserError where there is nothing to plan for."""
    _check(config)
    storage = open_storage(config.shards)
    manifest, manifest_bytes = _read(storage)
    world = World(config.ranks, config.nodes, config.batch_size, config.num_workers)
    speeds = Speeds(
        config.storage_mb_per_second,
        config.storage_latency_ms,
        config.decode_images_per_second,
        requests_at_once=1 if storage.is_local else REMOTE_REQUESTS,
    )
    needs = capacity(manifest, SPLIT, manifest_bytes, world, config.epochs, config.max_steps)
    times, wanted = pace(needs, speeds), config.images_per_second
    if config.json:
        print(json.dumps(to_json(needs, times, speeds, wanted)))
    else:
        print(to_text(f"{SPLIT} of {config.shards}", needs, times, speeds, wanted))


def to_json(needs: Capacity, times: Pace, speeds: Speeds, wanted: float | None) -> dict[str, Any]:
    """The plan as plain JSON. Fractions become numbers; the length of an epoch is also there as a fraction."""
    content = {"split": SPLIT, **dataclasses.asdict(needs), **dataclasses.asdict(times)}
    content["length"]["steps_an_epoch_exactly"] = str(needs.length.steps_an_epoch)
    content["speeds"] = dataclasses.asdict(speeds)
    content["wanted"] = None if wanted is None else _wanted(wanted, times)
    content["cautions"] = list(cautions(needs, times, wanted))
    return _plain(content)


def _check(config: PlanConfig) -> None:
    counts = {name: getattr(config, name) for name in ("ranks", "nodes", "batch_size", "epochs", "num_workers")}
    speeds = {name: getattr(config, name) for name in ("storage_mb_per_second", "decode_images_per_second")}
    if config.images_per_second is not None:
        speeds["images_per_second"] = config.images_per_second
    for name, value in {**counts, **speeds}.items():
        if not (value > 0 and math.isfinite(value)):
            raise UsageError(f"--{name} {value}: must be above 0")
    for name, value in {"max_steps": config.max_steps, "storage_latency_ms": config.storage_latency_ms}.items():
        if not (value >= 0 and math.isfinite(value)):
            raise UsageError(f"--{name} {value}: must be at least 0")
    if config.ranks % config.nodes:  # also where there are fewer ranks than nodes
        raise UsageError(
            f"--ranks {config.ranks} --nodes {config.nodes}: every node has equally many ranks; "
            "give a multiple of --nodes as --ranks"
        )


def _read(storage: Storage) -> tuple[Manifest, int]:
    """The manifest, and how many bytes its file has."""
    data = storage.read(MANIFEST)
    manifest = parse_manifest(data, storage.where(MANIFEST))
    if SPLIT not in manifest.splits:
        raise UserError(f"{storage.location}: has no split {SPLIT!r}; there are {', '.join(sorted(manifest.splits))}")
    if not manifest.samples(SPLIT):
        raise UserError(f"{storage.location}: its split {SPLIT!r} has no samples; shard more scenes with `nsi shard`")
    return manifest, len(data)


def _wanted(wanted: float, times: Pace) -> dict[str, float]:
    """What a wanted speed asks of the storage."""
    rates = times.rates
    return {
        "images_per_second": wanted,
        "ranged_mb_per_second_a_node": wanted * rates.ranged.mb_a_node_per_image,
        "filling_cache_mb_per_second_a_node": wanted * rates.filling_cache.mb_a_node_per_image,
        "full_cache_mb_per_second_a_node": wanted * rates.full_cache.mb_a_node_per_image,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, Fraction):
        return int(value) if value.denominator == 1 else float(value)
    return value
