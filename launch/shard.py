"""`nsi shard SOURCE OUT`: a folder of CLEVRTex scenes becomes WebDataset shards with an index and a manifest."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from launch.progress import progress
from nsi.errors import UsageError
from shards.scenes import find_scene_jsons
from shards.splits import SplitRule
from shards.write import survey, write_shards


@dataclass(frozen=True)
class ShardConfig:
    """Turn a folder of CLEVRTex scenes (v1 or v2 layout) into WebDataset shards.

    Images and masks are kept byte for byte. A run that was cut goes on where it stopped; the same scenes give the
    same bytes whatever the number of workers. Plain webdataset reads the result.
    """

    source: tyro.conf.Positional[Path]
    """Folder that holds the scenes, at any depth (clevrtexv2_full, say)."""
    out: tyro.conf.Positional[Path]
    """Folder to write the shards to; made if it is missing."""
    splits: SplitRule = "official"
    """official: the first tenth of the indices is test, the next val, the rest train (CLEVRTex). reference: as the
    public NSI code cuts them; its train split holds the official test split."""
    shard_samples: int = 500
    """Scenes in a shard; the last of a split has fewer."""
    workers: int = os.cpu_count() or 1
    """Threads that read and write."""


def run(config: ShardConfig) -> None:
    """Surveys the scenes, then writes the shards."""
    if config.shard_samples < 1 or config.workers < 1:
        raise UsageError("--shard_samples and --workers must be at least 1")
    count = len(find_scene_jsons(config.source))
    with progress("checking scenes", count, unit="scenes") as advance:
        scenes = survey(config.source, config.workers, advance)
    with progress("writing shards", count, unit="scenes") as advance:
        manifest = write_shards(scenes, config.out, config.splits, config.shard_samples, config.workers, advance)
    splits = ", ".join(f"{name} {manifest.samples(name)}" for name in manifest.splits)
    shards = sum(len(part) for part in manifest.splits.values())
    print(f"{config.out}: {shards} shards; scenes: {splits}; {len(manifest.vocabulary.materials)} materials")
