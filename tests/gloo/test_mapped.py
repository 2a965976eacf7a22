"""A run lets go of the checkpoint that it goes on from: pruned, it would take its room on the disk all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gloo.worlds import run_world
from tests.launch.test_resume import checkpointed
from tests.launch.test_training import SMALL

STEPS = 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "stage"), [(1, 0), *(pytest.param(1, stage, marks=pytest.mark.long) for stage in (1, 2)), (2, 3)]
)
def test_nothing_of_it_is_mapped_once_training_runs(shards: Path, tmp_path: Path, size: int, stage: int) -> None:
    run = tmp_path / "run"
    start = checkpointed(shards, run)
    flags = ["--max_steps", str(STEPS), "--checkpoint_every", "1", "--keep_last", "1", "--zero_stage", str(stage)]
    command = ["--data_path", str(shards), "--log_path", str(run), *SMALL, *flags]
    for found in run_world("work_mapped.py", size, tmp_path, str(start), *command):
        assert len(found["held"]) >= 2  # so that there is something to see, as long as somebody holds it
        assert found["training"] == [[]] * STEPS
    assert not start.exists()  # pruned
