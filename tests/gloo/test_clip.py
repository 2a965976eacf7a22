"""The slot encoder's gradient clipped alone, through DeepSpeed, as one process does it: every stage and precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nsi.reference_names import SLOT_ENCODER
from tests.gloo.problem import make_adam, make_model, one_process_loss
from tests.gloo.worlds import run_world

STEPS, STAGES = 4, (0, 1, 2, 3)
CLIP = 0.05  # far below the slot encoder's norm


def case(stage: int, precision: str, **more) -> dict:
    clip = {"clip_only": SLOT_ENCODER, "grad_clip": CLIP}
    return {"stage": stage, "precision": precision, "steps": STEPS, **clip, **more}


def one_process(steps: int) -> dict:
    """Steps of AdamW in one process, as the public code clips, and Adam's moments, which tell of scales."""
    model = make_model(0.0)
    adam = make_adam(model)
    clipped = [p for name, p in model.named_parameters() if name.startswith(SLOT_ENCODER)]
    assert 0 < len(clipped) < len(list(model.parameters()))
    losses, norms = [], []
    for step in range(steps):
        adam.zero_grad()
        loss = one_process_loss(model, step)
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
        assert torch.nn.utils.clip_grad_norm_(clipped, CLIP).item() > 2 * CLIP
        adam.step()
        losses.append(loss.item())
    moments = {name: adam.state[p]["exp_avg"].flatten() for name, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "moments": moments}


@pytest.fixture(scope="module")
def truth() -> dict:
    return one_process(STEPS)


def distance(found: dict, truth: dict) -> float:
    """The largest difference of a parameter's first moment, relative to its norm or to 1e-3 of them all."""
    whole = torch.cat(list(truth["moments"].values())).norm()
    return max(
        float((torch.tensor(found["moments"]["exp_avg"][name]) - moment).norm() / max(moment.norm(), 1e-3 * whole))
        for name, moment in truth["moments"].items()
    )


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.long) for size in (1, 3))])
def test_at_every_stage(tmp_path: Path, truth: dict, size: int) -> None:
    plan = [case(stage, "fp32", micro_rows=rows) for stage in STAGES for rows in (0, 2)]
    for found in run_world("work_engine.py", size, tmp_path, json.dumps(plan)):
        for each in found:
            assert each["losses"] == pytest.approx(truth["losses"], rel=1e-5)
            assert each["norms"] == pytest.approx(truth["norms"], rel=1e-4)  # the whole norm, before clipping
            assert distance(each, truth) < 1e-4


def test_in_half_precision(tmp_path: Path) -> None:
    """One step: after it roundings have their own way."""
    truth = one_process(1)
    # Stage 0 last: DeepSpeed's autocast engine leaves a mark on the process, by which later fp16 engines unscale twice.
    plan = [case(stage, precision, steps=1) for stage in (1, 2, 3, 0) for precision in ("bf16", "fp16")]
    for each in run_world("work_engine.py", 2, tmp_path, json.dumps(plan))[0]:
        assert each["norms"] == pytest.approx(truth["norms"], rel=0.02)
        assert distance(each, truth) < 0.25


def test_clipping_all_is_another_thing(tmp_path: Path, truth: dict) -> None:
    """So that the tests above can fail."""
    (found,) = run_world("work_engine.py", 1, tmp_path, json.dumps([{**case(1, "fp32"), "clip_only": []}]))[0]
    assert distance(found, truth) > 0.5
