"""DeepSpeed at every ZeRO stage and precision trains as one process does, and hands its state to any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.gloo.problem import make_model, one_process_loss
from tests.gloo.worlds import run_world

STEPS = 4
STAGES = (0, 1, 2, 3)


def case(stage: int, precision: str = "fp32", **more) -> dict:
    return {"stage": stage, "precision": precision, "steps": STEPS, **more}


@pytest.fixture(scope="module")
def truth() -> dict:
    """Four steps of AdamW in one process, without DeepSpeed."""
    model = make_model(0.0)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    losses, norms = [], []
    for step in range(STEPS):
        adam.zero_grad()
        loss = one_process_loss(model, step)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        adam.step()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_stage_trains_as_one_process(tmp_path: Path, truth: dict, size: int) -> None:
    plan = [case(stage) for stage in STAGES] + [case(stage, micro_rows=2) for stage in STAGES]
    for found in run_world("work_engine.py", size, tmp_path, json.dumps(plan)):
        for each in found:
            assert each["losses"] == pytest.approx(truth["losses"], rel=1e-5)
            assert each["norms"] == pytest.approx(truth["norms"], rel=1e-4)
            assert min(each["norms"]) > 0.5  # so that clipping was really at work


def test_state_moves_between_worlds_stages_and_precisions(tmp_path: Path, truth: dict) -> None:
    """Two ranks stop after half the steps; one, two or three ranks at another stage go on."""
    half = {"steps": STEPS // 2}
    plan = [{**case(stage), **half, "save": str(tmp_path / f"from-{stage}")} for stage in STAGES]
    plan.append({**case(2, "bf16"), **half, "save": str(tmp_path / "from-bf16")})
    run_world("work_engine.py", 2, tmp_path, json.dumps(plan))
    checkpoint = f"step-{STEPS // 2:08d}"
    for size in (1, 2, 3):
        onward = [{**case(3 - stage), **half, "load": str(tmp_path / f"from-{stage}" / checkpoint)} for stage in STAGES]
        onward.append({**case(1), **half, "load": str(tmp_path / "from-bf16" / checkpoint)})
        *exact, from_bf16 = run_world("work_engine.py", size, tmp_path, json.dumps(onward))[0]
        for each in exact:
            assert each["losses"] == pytest.approx(truth["losses"][STEPS // 2 :], rel=1e-5)
        assert from_bf16["losses"] == pytest.approx(truth["losses"][STEPS // 2 :], rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_in_the_same_world_is_bit_for_bit(tmp_path: Path, precision: str) -> None:
    plan = []
    for stage in STAGES:
        folder = tmp_path / f"{precision}-{stage}"
        plan += [
            case(stage, precision),
            {**case(stage, precision), "steps": 2, "save": str(folder)},
            {**case(stage, precision), "steps": 2, "load": str(folder / "step-00000002")},
        ]
    for found in run_world("work_engine.py", 2, tmp_path, json.dumps(plan)):
        for place in range(0, len(found), 3):
            whole, _, resumed = found[place : place + 3]
            assert resumed["losses"] == whole["losses"][2:]
            assert resumed["parameters"] == whole["parameters"]
            assert resumed["moments"] == whole["moments"]


def test_bf16_is_near_fp32_at_every_stage(tmp_path: Path, truth: dict) -> None:
    plan = [case(stage, "bf16") for stage in STAGES]
    for each in run_world("work_engine.py", 2, tmp_path, json.dumps(plan))[0]:
        assert each["losses"] == pytest.approx(truth["losses"], rel=0.05)
        assert each["losses"] != truth["losses"]  # it was bf16 indeed
