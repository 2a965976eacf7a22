"""A trained backbone at every ZeRO stage: as one process trains it; under ZeRO 3 no rank ever holds it, or its target,
as a whole."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from launch.training.prepare import DEEPSPEED_CONFIG
from nsi.finetuned import BACKBONE
from tests.gloo.problem import Trained, make_finetuned, train_finetuned
from tests.gloo.worlds import run_world

pytestmark = pytest.mark.slow

STEPS = 4
STAGES = (0, 1, 2, 3)
HALF_STAGES = (1, 2, 3, 0)  # as in test_engine.py
VIT, OTHER_VIT = "test_vit", "test_vit2"  # the other has registers, and a norm that its features pass by


def case(stage: int, precision: str = "fp32", micro_rows: int = 0, **more) -> dict:
    return {"stage": stage, "precision": precision, "micro_rows": micro_rows, "steps": STEPS, **more}


@pytest.fixture(scope="module")
def truths() -> dict[str, Trained]:
    """Four steps of AdamW in one process, without DeepSpeed."""
    return {vit: train_finetuned(vit, STEPS) for vit in (VIT, OTHER_VIT)}


@pytest.fixture
def all_shared(tmp_path: Path) -> str:
    """DeepSpeed's settings, and that ZeRO 3 keeps no parameter whole for being small: here all are."""
    settings = json.loads(DEEPSPEED_CONFIG.read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(settings))
    return str(path)


@pytest.mark.parametrize(
    ("size", "micro_rows"),
    [(2, 0), *(pytest.param(*each, marks=pytest.mark.long) for each in ((1, 0), (1, 2), (2, 2), (3, 0), (3, 2)))],
)
def test_every_stage_trains_as_one_process(
    tmp_path: Path, truths: dict[str, Trained], all_shared: str, size: int, micro_rows: int
) -> None:
    plan = [case(stage, micro_rows=micro_rows, compare="changes") for stage in STAGES]
    plan.append(case(3, micro_rows=micro_rows, compare="changes", deepspeed=all_shared))
    if size == 3:
        plan += [case(stage, micro_rows=micro_rows, compare="changes", vit=OTHER_VIT) for stage in (2, 3)]
    for found in run_world("work_finetuned.py", size, tmp_path, json.dumps(plan)):
        for setting, each in zip(plan, found, strict=True):
            truth = truths[setting.get("vit", VIT)]
            assert each["losses"] == pytest.approx(truth.losses, rel=1e-5), setting
            assert each["norms"] == pytest.approx(truth.norms, rel=1e-4), setting
            assert min(each["norms"]) > 0.5  # so that clipping was really at work
            assert each["off"] < 1e-3, setting
            assert each["saved"] == sorted(truth.changes)
            assert sorted(each["changed"]) == sorted(truth.changes)


def test_what_is_trained(truths: dict[str, Trained]) -> None:
    """So that the test above says something of the backbone; of another learning rate it would be far off."""
    for truth in truths.values():
        changes = {name: change.abs().max().item() for name, change in truth.changes.items()}
        assert not any(name.startswith("target.") for name in changes)
        slow = max(size for name, size in changes.items() if name.startswith(BACKBONE))
        assert 0 < 5 * slow < max(changes.values())
    assert "backbone.model.reg_token" in truths[OTHER_VIT].changes
    assert "backbone.model.fc_norm.weight" not in truths[OTHER_VIT].changes


@pytest.mark.long
def test_every_stage_has_the_one_process_gradient(tmp_path: Path) -> None:
    plan = [case(stage, micro_rows=rows, steps=0, compare="gradients") for rows in (0, 1) for stage in STAGES]
    for setting, each in zip(plan, run_world("work_finetuned.py", 3, tmp_path, json.dumps(plan))[0], strict=True):
        assert each["off"] < 1e-5, setting


def test_zero_3_takes_the_module_apart_before_any_device_has_it(tmp_path: Path) -> None:
    """Four ranks: a quarter of each parameter, the frozen ones too; the other stages bring all of it to a device."""
    size = 4
    plan = [case(stage, steps=0) for stage in (2, 3)]
    wholes = {name: parameter.numel() for name, parameter in make_finetuned().named_parameters()}
    everything = sum(wholes.values())
    for shared, apart in run_world("work_finetuned.py", size, tmp_path, json.dumps(plan)):
        assert (shared["held"], shared["moved"]) == (wholes, [everything])
        assert (sum(apart["held"].values()), apart["moved"]) == (0, [0])
        assert apart["pieces"] == {name: math.ceil(count / size) for name, count in wholes.items()}
        assert sum(apart["pieces"].values()) < 1.01 * everything / size


@pytest.mark.long
def test_a_trained_backbone_moves_between_worlds_and_stages(tmp_path: Path, truths: dict[str, Trained]) -> None:
    half = STEPS // 2
    plan = [case(stage, steps=half, save=str(tmp_path / f"from-{stage}")) for stage in (0, 3)]
    run_world("work_finetuned.py", 2, tmp_path, json.dumps(plan))
    onward = [
        case(3 - stage, steps=half, load=str(tmp_path / f"from-{stage}" / f"step-{half:08d}")) for stage in (0, 3)
    ]
    for each in run_world("work_finetuned.py", 3, tmp_path, json.dumps(onward))[0]:
        assert each["losses"] == pytest.approx(truths[VIT].losses[half:], rel=1e-5)


@pytest.mark.long
def test_recomputing_trains_the_same(tmp_path: Path, truths: dict[str, Trained], all_shared: str) -> None:
    plan = [case(stage, micro_rows=2, recompute=True, compare="changes") for stage in (0, 2)]
    plan.append(case(3, recompute=True, compare="changes", deepspeed=all_shared))
    for setting, each in zip(plan, run_world("work_finetuned.py", 2, tmp_path, json.dumps(plan))[0], strict=True):
        assert each["losses"] == pytest.approx(truths[VIT].losses, rel=1e-5), setting
        assert each["off"] < 1e-3, setting


@pytest.mark.long
def test_half_precision_stays_near(tmp_path: Path, truths: dict[str, Trained]) -> None:
    plan = [case(stage, precision, 2) for stage in HALF_STAGES for precision in ("bf16", "fp16")]
    for setting, each in zip(plan, run_world("work_finetuned.py", 2, tmp_path, json.dumps(plan))[0], strict=True):
        # fp16 leaves its first steps out, until the loss scale fits.
        steps = STEPS if setting["precision"] == "bf16" else 1
        assert each["losses"][:steps] == pytest.approx(truths[VIT].losses[:steps], rel=0.05), setting
        assert not any(name.startswith("target.") for name in each["changed"])
