"""`nsi bench`: its names and its JSON are a contract; what it measures here is too small to mean anything."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.benches import score, shard
from launch.benches.comparison import compared
from launch.cli import run as nsi

ROOT = Path(__file__).parents[2]


def test_a_ratio_above_one_is_better() -> None:
    assert compared("a", "images/s", "b", [3.0, 2.0, 9.0], [1.5, 1.0, 7.0]).ratio == 2.0  # of the medians
    assert compared("a", "s", "b", [2.0], [3.0]).ratio == 1.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "names"),
    [
        ("shard", ["shard/copy-vs-cp", "shard/copy-vs-cp-synced"]),
        pytest.param(
            "loader",
            ["loader/read-vs-webdataset", "loader/decode-vs-decoder", "loader/first-batch"],
            marks=pytest.mark.long,
        ),
        pytest.param(
            "checkpoint",
            [f"checkpoint/{name}" for name in ("standstill", "share", "gather", "step-beside-writing")],
            marks=pytest.mark.long,
        ),
    ],
)
def test_each_suite_says_its_names(suite: str, names: list[str]) -> None:
    command = [sys.executable, "-m", "launch", "bench", suite, "--scenes", "100", "--json"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [line["name"] for line in lines] == names
    for line in lines:
        assert {"name", "ours", "other", "unit", "ratio"} <= set(line)
        assert all(line[key] > 0 and math.isfinite(line[key]) for key in ("ours", "other", "ratio"))


@pytest.mark.slow
@pytest.mark.long
def test_the_score_takes_less_memory_than_the_dense_form() -> None:
    """Its two comparisons; the large batch that it tells of afterwards takes a minute."""
    time, memory = itertools.islice(score.comparisons(None, 0), 2)
    assert (time.name, memory.name) == ("score/time", "score/memory")
    assert time.ratio > 0
    assert memory.ratio > 5


def test_only_what_is_sharded_is_copied(scenes: Path, tmp_path: Path) -> None:
    """CLEVRTex's folders hold fifteen times as many bytes of the renderer's other passes."""
    source = Path(shutil.copytree(scenes, tmp_path / "source"))
    wanted = {path.relative_to(source) for path in source.rglob("CLEVRTEX*.*")}
    for folder in {path.parent for path in source.rglob("*.json")}:
        (folder / f"{folder.name}_depth_0003.png").write_bytes(b"x")
    linked = shard.linked(source, tmp_path / "linked")
    assert {path.relative_to(linked) for path in linked.rglob("*") if path.is_file()} == wanted


def test_too_few_scenes(capsys: pytest.CaptureFixture[str]) -> None:
    assert nsi(["bench", "shard", "--scenes", "5"]) == 2
    assert "give at least 100" in capsys.readouterr().err
