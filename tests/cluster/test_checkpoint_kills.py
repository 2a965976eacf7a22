"""SIGKILL before every call that changes a folder of checkpoints: the last one that was safe is found, every time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_no_checkpoint_that_was_safe(tmp_path: Path) -> None:
    """While one is written in a fresh place, in that of one that is not complete, damaged, void or good, while older
    ones are removed, and while a start puts right what an earlier kill left. One process forks a child a moment."""
    out = tmp_path / "kills.json"
    command = [sys.executable, str(Path(__file__).with_name("work_kills.py")), str(out), str(tmp_path / "folders")]
    found = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    kills = json.loads(out.read_text())
    assert list(kills) == ["fresh", "unmarked", "damaged", "void", "standing", "orphaned"]
    assert min(kills.values()) >= 30
