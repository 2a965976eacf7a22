"""`--compile`: the same numbers, and eager with one line of warning where compiling fails."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config as inductor

from launch.config import TrainConfig, science
from launch.training.compiling import compile_model, compiled_or_eager
from tests.gloo.problem import make_model, one_process_loss


@pytest.mark.slow
def test_a_compiled_model_computes_the_same() -> None:
    losses, gradients, said = [], [], []
    for compiled in (False, True):
        model = make_model(0.3, num_iterations=1)
        if compiled:
            compile_model(model, 1, said.append)
        loss = one_process_loss(model, 0)
        losses.append(loss.item())
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert said == []
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


def test_without_a_compiler_it_goes_on_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    said: list[str] = []
    function = compiled_or_eager(lambda x: (x.sin() + 1).sum(), said.append)
    for _ in range(2):
        x = torch.ones(3, requires_grad=True)
        function(x).backward()
        torch.testing.assert_close(x.grad, torch.ones(3).cos())
    assert len(said) == 1
    assert said[0].startswith("--compile is off: it failed here (")
    assert "\n" not in said[0]


def test_a_failure_of_the_function_itself_is_its_own() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        compiled_or_eager(function, lambda text: None)(torch.ones(1))


def test_zero_3_is_left_alone() -> None:
    model, said = make_model(0.0), []
    compile_model(model, 3, said.append)
    assert "forward" not in vars(model.slot_attention)
    assert len(said) == 1
    assert "ZeRO 3" in said[0]


def test_it_belongs_to_no_science() -> None:
    assert not {"compile", "recompute"} & set(science(TrainConfig("", None)))  # type: ignore[arg-type]
