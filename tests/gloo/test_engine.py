"""DeepSpeed at every ZeRO stage and precision trains as one process does, and hands its state to any other."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.gloo.problem import make_adam, make_model, one_process_loss
from tests.gloo.worlds import run_world

STEPS = 4
STAGES = (0, 1, 2, 3)
# Stage 0 last: it goes through torch_autocast, which DeepSpeed remembers for the process, and fp16 engines of ZeRO 1 to
# 3 made after it do not divide by their loss scale. A training process has one engine.
HALF_STAGES = (1, 2, 3, 0)


def case(stage: int, precision: str = "fp32", **more) -> dict:
    return {"stage": stage, "precision": precision, "steps": STEPS, **more}


@pytest.fixture(scope="module")
def truth() -> dict:
    """Four steps of AdamW in one process, without DeepSpeed."""
    model = make_model(0.0)
    adam = make_adam(model)
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


OPTIONS = {"learned_tau": True, "slot_start": "learned", "bilevel": True, "activation": "silu"}


@pytest.mark.parametrize(
    "size", [1, pytest.param(2, marks=pytest.mark.long), 3, pytest.param(4, marks=pytest.mark.long)]
)
def test_every_stage_has_the_one_process_gradient(tmp_path: Path, size: int) -> None:
    """Before any step is taken: each parameter's gradient as DeepSpeed has it, all stages, whole and micro-batches."""
    kinds = [{"dropout": 0.0, "options": {}}, {"dropout": 0.3, "options": OPTIONS}]
    plan = [
        {**case(stage), "steps": 0, "gradients": True, "micro_rows": rows, **kind}
        for kind in kinds
        for stage in STAGES
        for rows in (0, 1)
    ]
    for setting, each in zip(plan, run_world("work_engine.py", size, tmp_path, json.dumps(plan))[0], strict=True):
        model = make_model(setting["dropout"], **setting["options"])
        one_process_loss(model, 0).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            difference = (torch.tensor(each["gradients"][name]) - parameter.grad.flatten()).norm()
            # Relative to the tensor's norm, or to 1e-3 of the global one: some true gradients are zero.
            assert difference <= 1e-5 * max(parameter.grad.norm().item(), 1e-3 * norm), name


@pytest.mark.long
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


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
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


BAND = {"bf16": 0.01, "fp16": 0.01}  # of the float32 loss, in the mean of 20 steps


@pytest.mark.long
def test_200_steps_in_half_precision_track_float32_at_every_stage(tmp_path: Path) -> None:
    # At larger rates any two trainings part (two in fp16 by 5 %), be their difference as small as it may.
    gently = {"steps": 200, "lr": 3e-4, "loss_scale": 2.0**12}
    plan = [{**case(1), **gently}]
    # A loss scale that fits from the start: a step left out would make it another training.
    plan += [{**case(stage, precision), **gently} for stage in HALF_STAGES for precision in BAND]
    exact, *half = run_world("work_engine.py", 1, tmp_path, json.dumps(plan))[0]
    exact_20 = torch.tensor(exact["losses"]).view(-1, 20).mean(dim=1)
    assert exact_20[-1] < 0.8 * exact_20[0]  # there was something to track
    for setting, each in zip(plan[1:], half, strict=True):
        found_20 = torch.tensor(each["losses"]).view(-1, 20).mean(dim=1)
        off = (found_20 / exact_20 - 1).abs().max().item()
        assert 0 < off < BAND[setting["precision"]], (setting["precision"], setting["stage"], off)


def test_fp16_recovers_from_an_overflow(tmp_path: Path, truth: dict) -> None:
    """A scale far too high: some steps are left out, the scale comes down, and then training is what it would be."""
    plan = [{**case(stage, "fp16"), "steps": 30, "loss_scale": 2.0**30} for stage in HALF_STAGES]
    for found in run_world("work_engine.py", 2, tmp_path, json.dumps(plan)):
        for each in found:
            left_out = each["applied"].count(False)
            assert 10 <= left_out <= 20
            assert not any(each["applied"][:10])
            assert each["applied"][-8:].count(True) >= 7
            assert each["scales"][-1] == 2.0 ** (30 - left_out)
            assert each["optimizer_steps"] == 30 - left_out
            assert each["losses"][-1] < each["losses"][0]


def test_the_loss_scale_goes_from_stage_to_stage(tmp_path: Path) -> None:
    plan = [
        {**case(stage, "fp16"), "steps": 4, "loss_scale": 2.0**10, "save": str(tmp_path / f"from-{stage}")}
        for stage in HALF_STAGES
    ]
    run_world("work_engine.py", 2, tmp_path, json.dumps(plan))
    onward = [
        {**case(stage, "fp16"), "steps": 2, "load": str(tmp_path / f"from-{3 - stage}" / "step-00000004")}
        for stage in HALF_STAGES
    ]
    for each in run_world("work_engine.py", 1, tmp_path, json.dumps(onward))[0]:
        assert each["scales"] == [2.0**10] * 2
        assert each["optimizer_steps"] == 6


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_that_is_not_finite_changes_no_weight(tmp_path: Path, precision: str) -> None:
    """One rank sees a NaN in its second step: all ranks leave that step out, and go on as if it had not been."""
    plan = []
    for stage in HALF_STAGES:
        more = {"loss_scale": 2.0**10} if precision == "fp16" else {}
        plan += [
            {**case(stage, precision), **more, "broken_steps": [1]},
            {**case(stage, precision), **more, "steps": 1},
        ]
    for found in run_world("work_engine.py", 2, tmp_path, json.dumps(plan)):
        for broken, once in zip(found[::2], found[1::2], strict=True):
            assert broken["applied"] == [True, False, True, True]
            assert broken["losses"][0] == once["losses"][0]
            assert not math.isfinite(broken["losses"][1])
            assert all(map(math.isfinite, broken["losses"][2:]))
            assert broken["optimizer_steps"] == 3
