"""Steps that are not finite: which ones count, and what the report says of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch.config import LossConfig
from launch.training.nonfinite import advice, is_broken, report, suspects, write_report
from launch.training.step import StepResult, StepSettings
from nsi.model import NeuralSlotInterpreter
from tests.gloo.problem import SEED, TAU, VIT_FEATURES, F, G, make_batch, make_finetuned, make_model, make_pictures

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def result(contrastive: float, reconstruction: float, norm: float, applied: bool) -> StepResult:
    return StepResult(torch.tensor(contrastive), torch.tensor(reconstruction), norm, applied)


@pytest.mark.parametrize(
    ("found", "precision", "broken"),
    [
        (result(1.0, 1.0, 2.0, True), "fp32", False),
        (result(1.0, 1.0, INF, False), "fp32", True),
        (result(1.0, 1.0, INF, False), "bf16", True),
        (result(1.0, 1.0, INF, False), "fp16", False),  # the loss scale comes down
        (result(NAN, 1.0, INF, False), "fp16", True),
        (result(1.0, INF, INF, False), "fp32", True),
    ],
)
def test_which_steps_are_broken(found: StepResult, precision: str, broken: bool) -> None:
    assert is_broken(found, precision) == broken


class Plain:
    """What a report asks of an engine, with one process and no DeepSpeed."""

    def __init__(self) -> None:
        self.module: NeuralSlotInterpreter = make_model(0.0)

    def forward(self, *inputs):
        return self.module(*inputs)

    def state(self):
        return type("State", (), {"parameters": dict(self.module.named_parameters())})


def reported(features_GPF: torch.Tensor, engine: Plain, micro_rows: int = G) -> dict:
    batch, _ = make_batch()
    parts = iter(features_GPF.split(micro_rows))
    settings = StepSettings(LossConfig(tau=TAU), SEED, 0, G, micro_rows, F)
    return report(engine, lambda images: next(parts), batch, 6, settings, result(NAN, 1.0, INF, False))  # type: ignore[arg-type]


@pytest.mark.parametrize("micro_rows", [G, 2])
def test_the_report_names_the_scene_whose_features_are_not_finite(tmp_path: Path, micro_rows: int) -> None:
    _, features_GPF = make_batch()
    features_GPF[3, 4, 5] = NAN
    found = reported(features_GPF, Plain(), micro_rows)
    assert found["step"] == 7
    assert found["samples"][0]["id"] == 13
    assert len(found["samples"]) == G
    assert "in 1 of 7 scenes, beginning with their features: 13 (13)" in suspects(found)
    write_report(tmp_path / "report.json", found)
    said = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)  # strict JSON
    assert said["samples"][0]["largest"]["features"] == "nan"
    assert all(math.isfinite(value) for value in said["samples"][1]["largest"].values())


def test_it_names_weights_that_are_not_finite() -> None:
    engine = Plain()
    with torch.no_grad():
        engine.module.decoder.positions[0, 0] = INF
    found = reported(make_batch()[1], engine)
    assert found["parameters"][0]["name"] == "decoder.positions"
    assert suspects(found) == "weights are not finite: decoder.positions"


def test_where_the_backbone_is_trained_too_it_has_no_features_to_blame() -> None:
    """Images are given to the model in their place, and are never at fault."""
    engine = Plain()
    engine.module = make_finetuned()
    with torch.no_grad():
        engine.module.backbone.get_parameter("model.norm.bias")[0] = INF
    settings = StepSettings(LossConfig(tau=TAU), SEED, 0, G, G, VIT_FEATURES)
    found = report(engine, lambda images: images, make_pictures(), 6, settings, result(NAN, 1.0, INF, False))  # type: ignore[arg-type]
    assert "features" not in found["samples"][0]["largest"]
    assert suspects(found) == "weights are not finite: backbone.model.norm.bias"
    assert "lower --lr" in advice(found)


def test_it_says_where_nothing_of_a_scene_is_wrong() -> None:
    found = reported(make_batch()[1], Plain())
    assert "it is in the scores or the gradient" in suspects(found)
    norms = [each["norm"] for each in found["parameters"]]
    assert norms == sorted(norms, reverse=True)
