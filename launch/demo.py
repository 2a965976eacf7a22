"""`nsi demo`: the whole road in minutes on two CPU processes, with nothing to download.

Each step is the command that a person would type, printed before it runs.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from launch import runfolder
from nsi.errors import UsageError, UserError

RANKS = 2
CALIBRATION_STEPS = 40
TRAIN_SCRIPT = Path(__file__).with_name("train.py")


@dataclass(frozen=True)
class DemoConfig:
    """Render scenes, shard them, train on two DeepSpeed ZeRO processes, evaluate, write the report.

    Runs on CPUs alone. A second call continues the first.
    """

    out: tyro.conf.Positional[Path] = Path("demo")
    """Folder for scenes, shards and the run."""
    minutes: float = 0
    """Train for about so many minutes: a few steps are timed first. 0 trains for the recipe's number of steps."""
    scenes: int = 5000
    """Distinct scenes to render; a tenth of them is the test split, and so the gallery."""


def run(config: DemoConfig) -> None:
    """Goes the whole road. Raises UserError where a step of it fails."""
    if config.scenes < 2000:
        raise UsageError(f"--scenes {config.scenes}: give at least 2000, for a gallery of 200 held-out scenes")
    if config.minutes < 0:
        raise UsageError(f"--minutes {config.minutes:g}: give a number above 0, or leave it out")
    began = time.monotonic()
    scenes, shards = config.out / "scenes", config.out / "shards"
    trained = config.out / (f"run-{config.minutes:g}-minutes" if config.minutes else "run")
    _nsi("synth", str(scenes), "--scenes", str(config.scenes), "--size", "128x96")
    _nsi("shard", str(scenes), str(shards))
    steps = _steps_for(config, shards) if config.minutes else 0
    _train(shards, trained, *(["--max_steps", str(steps)] if steps else []))
    _nsi("eval", str(trained), "--split", "test")
    _nsi("report", str(trained))
    print(_closing_words(trained, time.monotonic() - began))


def _steps_for(config: DemoConfig, shards: Path) -> int:
    """How many steps fit into the minutes, by timing a few."""
    trial = config.out / "trial"
    _train(shards, trial, "--max_steps", str(CALIBRATION_STEPS), "--log_every", str(CALIBRATION_STEPS // 2))
    speed = runfolder.read_lines(trial, runfolder.METRICS)[-1]["images_per_second"]
    batch_size = json.loads((trial / runfolder.CONFIG).read_text())["config"]["optim"]["batch_size"]
    return max(CALIBRATION_STEPS, round(config.minutes * 60 * speed / batch_size))


def _nsi(*arguments: str) -> None:
    _call(["nsi", *arguments], [sys.executable, "-m", "launch", *arguments])


def _train(shards: Path, run_folder: Path, *more: str) -> None:
    """Training through DeepSpeed's own launcher, as on a node with several GPUs."""
    flags = ["--recipe", "demo", "--data_path", str(shards), "--log_path", str(run_folder), *more]
    with socket.socket() as probe:  # a free port, so that two demos can run side by side
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["--num_accelerators", str(RANKS), "--master_port", str(port)]
    _call(
        ["deepspeed", *launcher, "launch/train.py", *flags],
        [sys.executable, "-m", "deepspeed.launcher.runner", *launcher, str(TRAIN_SCRIPT), *flags],
    )


def _call(shown: list[str], command: list[str]) -> None:
    print(f"\n$ {shlex.join(shown)}", flush=True)
    # Two ranks share the cores, and a machine's GPUs are left alone: the demo is the same everywhere.
    threads = str(max(1, (os.cpu_count() or 1) // RANKS))
    # glibc would give each step's large buffers back to the system and fault them in again: a fifth of the time.
    keep_memory = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": threads, **keep_memory}
    status = subprocess.run(command, env=environment, check=False).returncode
    if status != 0:
        raise UserError(f"the step above failed with status {status}; run `nsi demo` again, it goes on from there")


def _closing_words(run_folder: Path, seconds: float) -> str:
    """Where the report is, and what its figures mean."""
    found = json.loads(runfolder.eval_path(run_folder, "test").read_text())
    retrieval, chance = found["retrieval"], found["retrieval"]["chance"]["R@5"]
    there, back = retrieval["schema_to_image"]["R@5"], retrieval["image_to_schema"]["R@5"]
    count, kind = retrieval["gallery"], found["pictures"]
    part = found["attention"] if kind == "attention" else found
    seen, tied = part["discovery"], part["grounding"]
    right, floor = (tied[choice]["slot_accuracy"] for choice in ("argmax", "floor"))
    return f"""
Done in {seconds / 60:.1f} minutes. The report: {(run_folder / runfolder.REPORT).resolve()}

Each of {count} scenes that training never saw was described by its schema alone (size, shape, material
and place of each object) and looked up among the images of all {count}, and the other way round.
  schema to image   R@5 {there:.3f}: {there / chance:.0f} times chance ({chance:.4f}) to have the right image among five
  image to schema   R@5 {back:.3f}: {back / chance:.0f} times chance to have the right schema among five
  slots on objects  FG-ARI {seen["FG-ARI"]:.3f}, mBO {seen["mBO"]:.3f} by the {kind} masks (1 is perfect)
  words on slots    {right:.0%} of the objects chose the very slot that covers them best; a random slot: {floor:.0%}
The report's pictures show where the slots look, and which of the words each of them took.
"""
