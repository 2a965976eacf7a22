"""--recompute under every ZeRO stage: a decoder that computes its hidden layers twice trains as one that keeps them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gloo.worlds import run_world

STAGES = (0, 1, 2, 3)


def test_recomputing_trains_the_same_at_every_stage(tmp_path: Path) -> None:
    plan = [
        {"stage": stage, "precision": "fp32", "steps": 3, "recompute": recompute}
        for recompute in (False, True)
        for stage in STAGES
    ]
    for found in run_world("work_engine.py", 2, tmp_path, json.dumps(plan)):
        kept, recomputed = found[: len(STAGES)], found[len(STAGES) :]
        for stage in STAGES:
            assert recomputed[stage]["losses"] == pytest.approx(kept[stage]["losses"], rel=1e-6)
            assert recomputed[stage]["losses"] == pytest.approx(kept[0]["losses"], rel=1e-5)
