"""The training state gathered flat is the one gathered tensor by tensor, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gloo.worlds import run_world


def case(stage: int, precision: str = "fp32", steps: int = 2, **more) -> dict:
    return {"stage": stage, "precision": precision, "steps": steps, **more}


# Stage 0 in half precision last, as in test_engine.py.
PLAN = [case(stage) for stage in (0, 1, 2, 3)]
PLAN += [case(stage, steps=0, finetuned=True) for stage in (0, 1, 2, 3)]
PLAN += [case(stage, precision) for stage in (1, 2, 3, 0) for precision in ("bf16", "fp16")]


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.long) for size in (1, 3, 4))])
def test_flat_and_tensor_by_tensor(tmp_path: Path, size: int) -> None:
    """Sizes that no world divides, several parameter groups, a frozen part, every stage and precision."""
    for found in run_world("work_gathering.py", size, tmp_path, json.dumps(PLAN)):
        assert all(found["flat"])
        for setting, each in zip(PLAN, found["cases"], strict=True):
            assert each["differences"] == [], setting
            assert each["groups"] >= 4, setting
            assert each["tensors"] > 40 if setting.get("finetuned") else each["tensors"] == 10
            assert each["moving"] == (setting["steps"] > 0)
