"""`nsi bench WHAT`: how fast a part is, as a ratio against what one would use otherwise, both in the same run."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

from launch.benches.comparison import Comparison
from nsi.errors import UsageError

Suite = Literal["loader", "shard", "decoder", "step", "features", "score", "checkpoint"]
ON_DATA = ("loader", "shard", "features")


@dataclass(frozen=True)
class BenchConfig:
    """Measure a part of this program against what one would use otherwise, side by side in one run.

    loader: reading shards against webdataset.WebDataset, decoding against the decoder alone, the first batch.
    shard: `nsi shard` against `cp -r` of the same files.
    decoder: the decoder's forward and backward against its textbook form, on made numbers.
    step: a training step without the backbone against its textbook form, on made numbers.
    features: training steps from stored features against the same from images, on shards.
    score: the contrastive loss of a global batch of 1,024 against its dense form, on made numbers; 8,192 on its own.
    checkpoint: how long the steps stand still for one, of two ranks, against writing it before the next step, and as a
    share of their time; gathering the state against doing so tensor by tensor. On made numbers.
    """

    what: tyro.conf.Positional[Suite]
    """Which part."""
    data: Path | None = None
    """A folder of shards (loader) or of scenes (shard) to measure on; without it scenes are rendered for that. For a
    while copies lie beside it, on the same disk: of shards as links, of scenes eleven times their size.
    decoder, step, score and checkpoint read none."""
    scenes: int = 1000
    """How many scenes to render where no data is given; `shard` copies them to ten times as many."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """One JSON line a comparison."""


def run(config: BenchConfig) -> None:
    """Runs a suite and prints each comparison as soon as it is there."""
    if config.scenes < 100:
        raise UsageError(f"--scenes {config.scenes}: give at least 100, or nothing is measured but starting")
    if config.data and config.what not in ON_DATA:
        raise UsageError(f"--data {config.data}: bench {config.what} reads no data; leave it out")
    suite = importlib.import_module(f"launch.benches.{config.what}")
    comparisons: Iterator[Comparison] = suite.comparisons(config.data, config.scenes)
    for comparison in comparisons:
        print(json.dumps(asdict(comparison)) if config.json else _line(comparison), flush=True)


def _line(found: Comparison) -> str:
    better = "better" if found.ratio >= 1 else "worse"
    return (
        f"{found.name:28} {found.ours:12,.4g} {found.unit} against {found.other:,.4g} of {found.against}: "
        f"{found.ratio:.2f} times, {better}"
    )
