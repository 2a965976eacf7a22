"""`nsi train` from stored features beside `nsi train` from images: whole commands, each step's own rate."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import timm
import torch

from launch import runfolder
from launch.benches.comparison import Comparison, compared, note
from launch.benches.scenes import rendered
from nsi.errors import UserError

BACKBONE, IMAGE_SIZE = "vit_tiny_patch16_224", 112  # a CPU's share of the default ViT-B/8: 49 patches of 192 features
STEPS, WARM_UP, BATCH, ROUNDS = 12, 3, 16, 3


def comparisons(data: Path | None, scenes: int) -> Iterator[Comparison]:
    """Runs of a few steps at the default model, in turn; the backbone's weights are random."""
    with contextlib.ExitStack() as closing:
        work = Path(closing.enter_context(tempfile.TemporaryDirectory()))
        shards = data or work / "shards"
        if not data:
            _nsi("shard", closing.enter_context(rendered(scenes)), shards)
        torch.save(timm.create_model(BACKBONE, num_classes=0, img_size=IMAGE_SIZE).state_dict(), work / "weights.pt")
        backbone = ("--backbone", BACKBONE, "--backbone_weights", work / "weights.pt", "--image_size", IMAGE_SIZE)
        note("storing features")
        _nsi("features", shards, work / "store", *backbone)
        stored: list[float] = []
        images: list[float] = []
        for number in range(ROUNDS):
            images += _rates(shards, work / f"images-{number}", *backbone)
            stored += _rates(shards, work / f"stored-{number}", *backbone, "--features", work / "store")
        yield compared("features/step", "images/s", f"the same steps from images, by {BACKBONE}", stored, images)


def _rates(shards: Path, run: Path, *more: object) -> list[float]:
    """Images a second of each step, but for the first ones."""
    flags = ("--batch_size", BATCH, "--max_steps", STEPS, "--log_every", 1)
    _nsi("train", "--data_path", shards, "--log_path", run, *flags, *more)
    return [line["images_per_second"] for line in runfolder.read_lines(run, runfolder.METRICS)][WARM_UP:]


def _nsi(*arguments: object) -> None:
    command = [sys.executable, "-m", "launch", *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise UserError(found.stderr.strip().splitlines()[-1])
