"""Validation takes no more rows at once than training, and finds what it finds with all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from launch.config import LossConfig
from launch.training import validation
from launch.training.step import StepSettings
from launch.training.validation import Validation, validate
from nsi.backbone import Backbone, Passing
from nsi.batch import Batch
from nsi.model import NeuralSlotInterpreter
from tests.gloo.problem import BETA, SEED, TAU, VIT_FEATURES, G, Pooled, make_finetuned, make_model, make_split


@pytest.fixture(autouse=True)
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Plain:
    """What validation asks of an engine, with one process and no DeepSpeed."""

    def __init__(self, module: NeuralSlotInterpreter) -> None:
        self.module, self.forward, self.eval, self.train = module, module, module.eval, module.train


def parts(kind: str) -> tuple[NeuralSlotInterpreter, Backbone]:
    """A model and what stands before it."""
    return (make_finetuned(), Passing((2, 2), VIT_FEATURES)) if kind == "trained" else (make_model(0.3), Pooled())


def validated(
    kind: str, micro_rows: int, batches: list[Batch] | None = None, seen: list[int] | None = None
) -> Validation:
    """The figures by so many rows at once; `seen` is told the rows of every forward, a backbone's or the model's."""
    model, before = parts(kind)
    if seen is not None:
        for module in (before, model, *(getattr(model, name) for name in ("backbone", "target") if kind == "trained")):
            module.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    settings = StepSettings(LossConfig(tau=TAU, beta=BETA), SEED, 0, G, micro_rows, before.feature_dim)
    return validate(Plain(model), before, batches or make_split(0, 1), settings, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["frozen", "trained"])
@pytest.mark.parametrize("micro_rows", [1, 2, 3, 6])
def test_portions_change_no_figure(monkeypatch: pytest.MonkeyPatch, kind: str, micro_rows: int) -> None:
    """No portion divides the rows but the first; some portions hold no scene, one begins with the unreadable one."""
    monkeypatch.setattr(validation, "SCENES_SHOWN", 4)  # fewer than there are
    whole, found = validated(kind, G), validated(kind, micro_rows)
    assert found.figures == pytest.approx(whole.figures, rel=1e-6)
    assert whole.figures["gallery"] == 10
    assert found.sample_ids_B.tolist() == whole.sample_ids_B.tolist() == [10, 11, 12, 14]
    assert torch.allclose(found.alphas_BNP, whole.alphas_BNP, rtol=0, atol=1e-6)


def test_batches_of_that_size_would_have_other_figures() -> None:
    """So the test above can fail: portions that are contrasted on their own miss negatives."""
    small = [part for batch in make_split(0, 1) for part in (batch.select(slice(0, 4)), batch.select(slice(4, G)))]
    whole, found = validated("frozen", G), validated("frozen", G, small)
    assert found.figures["reconstruction"] == pytest.approx(whole.figures["reconstruction"], rel=1e-6)
    assert found.figures["contrastive"] < 0.8 * whole.figures["contrastive"]


@pytest.mark.parametrize("kind", ["frozen", "trained"])
@pytest.mark.parametrize("micro_rows", [1, 3, G])
def test_no_forward_has_more_rows_than_in_training(kind: str, micro_rows: int) -> None:
    seen: list[int] = []
    validated(kind, micro_rows, seen=seen)
    assert max(seen) == micro_rows
    assert sum(seen) == len(make_split(0, 1)) * G * (4 if kind == "trained" else 2)  # every row once in each
