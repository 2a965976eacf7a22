"""The whole road, as `make demo` walks it, only shorter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.runfolder import read_lines


@pytest.mark.slow
def test_the_demo_walks_the_whole_road(tmp_path: Path) -> None:
    """Fewest scenes, and training for so few minutes that the steps that time it are all there is."""
    command = [sys.executable, "-m", "launch", "demo", str(tmp_path / "demo"), "--scenes", "2000", "--minutes", "0.01"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    run = tmp_path / "demo" / "run-0.01-minutes"
    assert f"The report: {run / 'report.html'}" in found.stdout
    assert "200 scenes that training never saw" in found.stdout
    assert (run / "report.html").stat().st_size > 100_000
    lines = read_lines(run, "metrics.jsonl")
    assert lines[-1]["world_size"] == 2
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert json.loads((run / "eval-test.json").read_text())["retrieval"]["gallery"] == 200
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0
    assert "all were there already" in again.stdout


@pytest.mark.slow
@pytest.mark.long
def test_the_recipe_learns(tmp_path: Path) -> None:
    """About half of the demo's steps: held-out scenes are found at least 15 times as often as by chance, both ways."""
    scenes, shards, run = (str(tmp_path / name) for name in ("scenes", "shards", "run"))
    steps = [
        ["synth", scenes, "--scenes", "4500", "--size", "128x96"],
        ["shard", scenes, shards],
        ["train", "--recipe", "demo", "--data_path", shards, "--log_path", run, "--max_steps", "650"],
        ["eval", run, "--split", "test"],
    ]
    memory = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30), "DS_ACCELERATOR": "cpu"}
    for step in steps:
        command = [sys.executable, "-m", "launch", *step]
        found = subprocess.run(command, env={**os.environ, **memory}, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr[-3000:]
    found = json.loads((Path(run) / "eval-test.json").read_text())["retrieval"]
    assert found["gallery"] == 450
    for direction in ("schema_to_image", "image_to_schema"):
        assert found[direction]["R@5"] >= 15 * found["chance"]["R@5"]
    lines = read_lines(Path(run), "metrics.jsonl")
    assert lines[-1]["loss"] < 0.8 * lines[20]["loss"]


def test_too_few_scenes(capsys: pytest.CaptureFixture[str]) -> None:
    from launch.cli import run

    assert run(["demo", "somewhere", "--scenes", "100"]) == 2
    assert "give at least 2000" in capsys.readouterr().err
