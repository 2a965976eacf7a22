"""The house: arrows point down, and the check that says so can fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("launch", "nsi", "shards", "cluster")


def lint(folder: Path) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_house_as_it_stands() -> None:
    found = lint(ROOT)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("nsi/loss.py", "import launch.config"),
        ("shards/order.py", "import cluster.world"),
        ("cluster/world.py", "import shards.order"),
        ("nsi/noise.py", "import shards.order"),
        ("shards/decode.py", "import nsi.model"),
        ("cluster/checkpoints/checkpoint.py", "import deepspeed"),
        ("launch/training/run.py", "import deepspeed"),
    ],
)
def test_an_arrow_that_runs_up_is_caught(copy: Path, file: str, line: str) -> None:
    path = copy / file
    path.write_text(path.read_text() + f"\n{line}\n")
    found = lint(copy)
    assert found.returncode != 0
    assert "BROKEN" in found.stdout


def test_files_hold_one_concept() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 350
    }
    assert not long


def test_every_file_opens_with_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if path.name != "__init__.py" and not path.read_text().startswith('"""')
    ]
    assert not silent
