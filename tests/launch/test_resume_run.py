"""Real runs that change their world, ZeRO stage and precision on the way: the samples and losses of one that does not.

tests/gloo/test_resume.py has more of such moves, without data and in fewer processes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cluster.checkpoints.attempt import read_attempts
from cluster.records.ledger import read_ledger
from tests.launch.test_training import BIN, losses, train

# Small and even: rounding grows past 1e-5 at larger rates, in any two equal trainings.
COURSE = ["--batch_size", "7", "--lr", "1e-5", "--lr_warmup_steps", "0", "--schedule", "constant"]
COURSE += ["--validate_every", "100000", "--checkpoint_every", "100000"]
FIRST, SECOND, LAST = 5, 30, 56


def go_on(shards: Path, run: Path, until: int, world: int, stage: int, precision: str = "fp32") -> None:
    launcher = (str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(world)) if world > 1 else ()
    flags = ["--max_steps", str(until), "--zero_stage", str(stage), "--precision", precision]
    found = train(shards, run, *COURSE, *flags, launcher=launcher)
    assert found.returncode == 0, found.stdout + found.stderr


def samples(run: Path) -> dict[int, int]:
    """A digest of what was read, by step."""
    ledger = read_ledger(run / "ledger")
    assert not ledger.damages
    return {
        entry.first_step + place: int(digest)
        for entry in ledger.entries
        for place, digest in enumerate(entry.digests_K)
    }


@pytest.mark.slow
def test_a_run_that_moves_from_world_to_world(shards: Path, tmp_path: Path) -> None:
    """Two ranks at stage 3, three at stage 0, one at stage 2; more than 50 steps after the first cut. And on, in bf16:
    the same samples, and a loss as near as bf16 comes."""
    whole, moved, half = (tmp_path / name for name in ("whole", "moved", "half"))
    go_on(shards, whole, LAST, 1, 1)
    go_on(shards, moved, FIRST, 2, 3)
    go_on(shards, moved, SECOND, 3, 0)
    shutil.copytree(moved, half)
    go_on(shards, moved, LAST, 1, 2)
    assert samples(moved) == samples(whole)
    assert len(samples(moved)) == LAST
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-5)
    assert [each.restored_step for each in read_attempts(moved / "attempts")] == [0, FIRST, SECOND]
    go_on(shards, half, SECOND + 2, 1, 1, "bf16")
    assert samples(half) == {step: digest for step, digest in samples(whole).items() if step < SECOND + 2}
    assert losses(half)[SECOND] == pytest.approx(losses(whole)[SECOND], rel=0.01)
    assert losses(half)[SECOND] != losses(whole)[SECOND]
