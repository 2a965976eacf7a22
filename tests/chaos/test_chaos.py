"""A short chaos run: ten faults, then the proof. `make chaos` has a hundred."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.chaos.chaos import Round, loss_difference, torment, torment_with, uninterrupted
from tests.chaos.faults import cut
from tests.chaos.world import Zygote
from tests.launch.outside import nsi, refused

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux tells whose children processes are"),
]


def check(found: Round, whole: Path) -> None:
    """All that is promised of any run."""
    assert found.audit == ""
    assert found.missing_steps == 0
    assert found.wrong_restores == ()
    assert found.left == 0
    assert found.unaccounted_s < 0.01
    assert loss_difference(found.run, whole) < 1e-5
    for outcome in found.outcomes:
        assert outcome.survived, outcome
        assert outcome.gone_s < 30, outcome


def test_ten_kills(mother: Zygote, shards: Path, tmp_path: Path) -> None:
    found = torment(mother, shards, tmp_path / "killed", seed=1, kills=10)
    check(found, uninterrupted(mother, shards, tmp_path / "whole", found.steps))


@pytest.mark.parametrize(("below", "calls"), [("attempts", 3), ("ledger", 4), ("checkpoints", 16)])
def test_cut_between_any_two_calls(mother: Zygote, shards: Path, tmp_path: Path, below: str, calls: int) -> None:
    """Attempt after attempt ends itself at the first, second, ... call that changes a file or a name in a folder."""
    faults = [cut(1, number, below) for number in range(1, calls + 1)]
    found = torment_with(mother, shards, tmp_path / "killed", faults)
    check(found, uninterrupted(mother, shards, tmp_path / "whole", found.steps))
    moments = [outcome.moment for outcome in found.outcomes]
    assert all(moment.startswith("at ") for moment in moments), moments
    if below == "checkpoints":
        assert {"at fsync", "at rename", "at unlink"} <= {moment.rpartition(" ")[0] for moment in moments}, moments


def test_the_proof_can_fail(mother: Zygote, shards: Path, tmp_path: Path) -> None:
    """A ledger that lacks what a kill is said to have spared is not proven, and a changed loss is seen."""
    run = uninterrupted(mother, shards, tmp_path / "whole", 10)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    metrics = copy / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[-1]["loss"] *= 1.0001
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert loss_difference(copy, run) > 1e-5
    (ledger,) = (copy / "ledger").iterdir()
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    assert "is not in the ledger" in refused(nsi("audit", copy))
