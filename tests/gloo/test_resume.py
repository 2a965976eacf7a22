"""A training that is cut and goes on elsewhere is the training that was never cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cluster.checkpoints.checkpoint import read_checkpoint, write_checkpoint
from tests.gloo.problem import make_adam, make_model, one_process_loss
from tests.gloo.worlds import run_world

WORLDS, STAGES = (1, 2, 3), (0, 1, 2, 3)
CUT, ONWARD = 4, 50
# Large at first, so that weights and moments have gone somewhere by the cut; then small, since any two trainings that
# round otherwise part at larger rates.
LRS = [1e-3] * CUT + [1e-5] * ONWARD


def whole(stage: int) -> dict:
    return {"stage": stage, "precision": "fp32", "steps": CUT + ONWARD, "lrs": LRS}


def first(root: Path, world: int, stage: int) -> dict:
    return {**whole(stage), "steps": CUT, "save": str(root / f"{world}-{stage}")}


def onward(root: Path, stage: int, origin: tuple[int, int]) -> dict:
    """Goes on at this stage from what the origin's world and stage saved."""
    return {**whole(stage), "steps": ONWARD, "load": str(root / "{}-{}".format(*origin) / f"step-{CUT:08d}")}


@pytest.fixture(scope="module")
def truth() -> list[float]:
    """The losses of AdamW in one process, without DeepSpeed and without a cut."""
    model = make_model(0.0)
    adam, losses = make_adam(model), []
    for step, lr in enumerate(LRS):
        for group in adam.param_groups:
            group["lr"] = lr
        adam.zero_grad()
        loss = one_process_loss(model, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adam.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("worlds", "stages"), [((1, 2), (0, 3)), pytest.param(WORLDS, STAGES, marks=pytest.mark.long)], ids=str
)
def test_any_change_of_world_and_stage(
    tmp_path: Path, truth: list[float], worlds: tuple[int, ...], stages: tuple[int, ...]
) -> None:
    """To more ranks and to fewer, out of two stages and into two; in its own world and stage bit for bit."""

    def elsewhere(world: int, origins: tuple[int, ...]) -> list[dict]:
        return [
            onward(tmp_path, (stage + world) % 4, (origin, stage))
            for origin in origins
            for stage in stages[(origin + world) % 2 :: 2]
        ]

    def check(world: int, own: list[dict], moved: list[dict]) -> None:
        found = run_world("work_engine.py", world, tmp_path, json.dumps(own + moved), timeout_s=600)
        for rank in found:
            for place in range(0, len(own), 3):
                uncut, _, resumed = rank[place : place + 3]
                assert uncut["losses"] == pytest.approx(truth, rel=1e-5)
                for key in ("parameters", "moments"):
                    assert resumed[key] == uncut[key]
                assert resumed["losses"] == uncut["losses"][CUT:]
            for setting, each in zip(moved, rank[len(own) :], strict=True):
                assert each["losses"][0] == pytest.approx(truth[CUT], rel=1e-5), setting
                assert each["losses"] == pytest.approx(truth[CUT:], rel=1e-5), setting

    for place, world in enumerate(worlds):  # each can go on from those before it, and at the end from those after it
        own = [
            case
            for stage in stages
            for case in (whole(stage), first(tmp_path, world, stage), onward(tmp_path, stage, (world, stage)))
        ]
        check(world, own, elsewhere(world, worlds[: place + 1]))
    for place, world in enumerate(worlds[:-1]):
        check(world, [], elsewhere(world, worlds[place + 1 :]))


@pytest.mark.slow
def test_a_state_that_is_not_the_whole_one_shows(tmp_path: Path, truth: list[float]) -> None:
    """What the proof above would see: moments that were lost, and a step count that was."""
    (_,) = run_world("work_engine.py", 1, tmp_path, json.dumps([first(tmp_path, 1, 1)]))
    found = read_checkpoint(tmp_path / "1-1" / f"step-{CUT:08d}")
    for name, change in (("moments", {}), ("count", {"optimizer_steps": 0})):
        training = type(found.training)(**{**vars(found.training), **change})
        if name == "moments":
            for tensors in training.moments.values():
                for tensor in tensors.values():
                    tensor.zero_()
        write_checkpoint(tmp_path / f"{name}-1", type(found)(CUT, 1, training, {}))
        found = read_checkpoint(tmp_path / "1-1" / f"step-{CUT:08d}")
    plan = [onward(tmp_path, 1, (name, 1)) for name in ("moments", "count")]  # pyright: ignore
    for each in run_world("work_engine.py", 1, tmp_path, json.dumps(plan))[0]:
        assert each["losses"] != pytest.approx(truth[CUT:], rel=1e-5)
