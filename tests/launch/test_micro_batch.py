"""`--micro_batch_size auto`: the most that fits, found without a trace, and no other result."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.engine.config import EngineConfig
from launch.config import LossConfig
from launch.training.micro_batch import fitting_rows, made_up_batch, reserved_bytes
from launch.training.step import StepSettings
from nsi.errors import UserError
from shards.loading.rows import SceneShape
from tests.gloo.problem import TAU, F, P, T, make_model
from tests.launch.test_training import losses, train

ROWS = 12
CPU = torch.device("cpu")


class Limited(nn.Module):
    """A model that has room for so many rows at once, and notes how many it was given."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.inner, self.most, self.tried = make_model(0.0), most, []

    def __deepcopy__(self, memo: dict) -> Limited:
        other = Limited(self.most)
        other.inner, other.tried = copy.deepcopy(self.inner, memo), self.tried
        return other

    def forward(self, features_MPF: torch.Tensor, *others: object) -> object:
        self.tried.append(len(features_MPF))
        if len(features_MPF) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return self.inner(features_MPF, *others)


def fit(model: nn.Module, reserve: int = 0, **engine: object) -> int:
    batch = made_up_batch(ROWS, SceneShape(8, T), CPU)
    settings = StepSettings(LossConfig(tau=TAU), 0, 0, ROWS, ROWS, F, lambda own_R: own_R)

    def backbone(images_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(images_BCHW), P, F)

    return fitting_rows(model, backbone, batch, EngineConfig(**engine), settings, reserve)  # type: ignore[arg-type]


@pytest.mark.parametrize("most", [ROWS, 7, 3, 1])
def test_it_finds_rows_that_fit(most: int) -> None:
    model = Limited(most)
    found = fit(model)
    assert most * 2 // 3 <= found <= most  # sizes shrink by a tenth or by one
    assert found in model.tried
    assert max(model.tried) == ROWS  # the largest first


def test_it_leaves_no_trace() -> None:
    model = Limited(5)
    before, state = copy.deepcopy(model.inner.state_dict()), torch.get_rng_state()
    fit(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.inner.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_where_nothing_fits() -> None:
    with pytest.raises(UserError, match="not even one row fits into a rank's memory; give --recompute"):
        fit(Limited(0))
    with pytest.raises(UserError, match="the whole model and one row do not fit .*; give --micro_batch_size a number"):
        fit(Limited(0), zero_stage=3)


def test_what_is_set_aside_counts() -> None:
    with pytest.raises(UserError, match="not even one row fits"):
        fit(Limited(ROWS), reserve=1 << 60)


def test_other_failures_are_no_want_of_memory() -> None:
    class Broken(Limited):
        def __deepcopy__(self, memo: dict) -> Broken:
            return Broken(self.most)

        def forward(self, features_MPF: torch.Tensor, *others: object) -> object:
            raise RuntimeError("shapes do not agree")

    with pytest.raises(RuntimeError, match="shapes do not agree"):
        fit(Broken(ROWS))


def test_adam_is_set_aside_once_for_all_who_share_it() -> None:
    model = make_model(0.0)
    trained = sum(parameter.numel() for parameter in model.parameters())
    alone, shared = (reserved_bytes(model, EngineConfig(zero_stage=1), world, CPU) for world in (1, 4))
    assert alone >= 8 * trained  # two moments in float32
    assert shared < alone


@pytest.mark.slow
def test_training_with_it_is_the_same(shards: Path, tmp_path: Path) -> None:
    for name, flags in (("auto", ("--micro_batch_size", "auto")), ("whole", ())):
        found = train(shards, tmp_path / name, *flags)
        assert found.returncode == 0, found.stderr
        assert ("--micro_batch_size auto: 12 of a rank's 12 rows at once" in found.stderr) == (name == "auto")
    assert losses(tmp_path / "auto") == losses(tmp_path / "whole")
