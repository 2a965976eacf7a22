"""`nsi synth OUT`: render textured scenes in the CLEVRTex layout, to have data within minutes, with no download."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from launch.progress import progress
from nsi.errors import UsageError
from shards.synthetic.write import VARIANT, write_scenes

SIDES = (32, 4096)  # the shortest and the longest side that a frame may have
SEEDS = 2**64


@dataclass(frozen=True)
class SynthConfig:
    """Render textured scenes, with masks and schemas, in the layout of CLEVRTex v2.

    Every tool that reads CLEVRTex reads them: `nsi shard OUT SHARDS` is the next step. They keep CLEVRTex's
    rules (3 to 10 objects; cubes, cylinders, spheres and monkeys in three sizes; its 60 material names, its camera)
    but not its textures, which are drawn here: use them to try things out, and CLEVRTex for figures to publish.

    Scene i depends on the seed, the size and i alone. So any number of workers gives the same scenes, a run that was
    cut goes on where it stopped, and more scenes can be added later with the same command and a larger --scenes.
    """

    out: tyro.conf.Positional[Path]
    """Folder to write to; made if it is missing. Scenes of another seed or size are never mixed into it."""
    scenes: int = 1000
    """How many scenes the folder shall have in the end. A scene of 320x240 takes about 120 KB."""
    seed: int = 0
    """Which scenes: another seed gives other scenes throughout."""
    size: str = "320x240"
    """Width x height in pixels. 320x240 is CLEVRTex's; a smaller frame of 4:3, as 128x96, renders three times as fast
    and shows the same view."""
    workers: int = os.cpu_count() or 1
    """Processes that render. One does about 60 scenes of 320x240 a second."""


def run(config: SynthConfig) -> None:
    """Render the scenes that are still missing."""
    size = parse_size(config.size)
    if config.scenes < 1:
        raise UsageError(f"--scenes {config.scenes}: give 1 or more")
    if config.workers < 1:
        raise UsageError(f"--workers {config.workers}: give 1 or more")
    if not 0 <= config.seed < SEEDS:
        raise UsageError(f"--seed {config.seed}: give a whole number from 0 to 2^64 - 1")
    counts: list[int] = []
    began = time.monotonic()
    with progress("rendering", config.scenes, unit="scenes") as advance:

        def report(done: int) -> None:
            counts.append(done)
            advance(done)

        write_scenes(config.out, config.scenes, config.seed, size, config.workers, report)
    print(_summary(config, found=counts[0], seconds=time.monotonic() - began))


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) from `320x240`. Raises UserError where it says anything else."""
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text.strip().lower())
    if match is None:
        raise UsageError(f"--size {text}: give width x height in pixels, as in 320x240")
    width, height = int(match[1]), int(match[2])
    if min(width, height) < SIDES[0] or max(width, height) > SIDES[1]:
        raise UsageError(f"--size {text}: both sides must lie between {SIDES[0]} and {SIDES[1]} pixels")
    return width, height


def _summary(config: SynthConfig, found: int, seconds: float) -> str:
    where = f"{config.out / VARIANT}: {config.scenes} scenes of {config.size}, seed {config.seed}"
    rendered = config.scenes - found
    if not rendered:
        return f"{where}; all were there already"
    some = f"{rendered} rendered now" if found else "all rendered"
    return f"{where}; {some} in {seconds:.1f} s, {rendered / seconds:.1f} scenes/s"
