"""The gradient contract: W ranks, even or uneven rows, any micro-batches, give the one-process loss and gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gloo.problem import make_model, one_process_loss
from tests.gloo.worlds import run_world


@pytest.mark.parametrize(
    ("size", "micro_rows", "dropout"),
    [(1, 0, 0.0), (1, 2, 0.3), (2, 0, 0.3), (3, 0, 0.0), (3, 2, 0.3), (4, 0, 0.3), (4, 1, 0.0)],
)
def test_any_world_has_the_one_process_gradient(tmp_path: Path, size: int, micro_rows: int, dropout: float) -> None:
    model = make_model(dropout).double()
    loss = one_process_loss(model, step=4)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
    for found in run_world("work_gradient.py", size, tmp_path, str(dropout), str(micro_rows)):
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-9)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            difference = (torch.tensor(found["gradients"][name], dtype=torch.float64) - parameter.grad.flatten()).norm()
            # Relative to the tensor's norm, or to 1e-3 of the global one: some true gradients are zero.
            assert difference <= 1e-9 * max(parameter.grad.norm().item(), 1e-3 * norm), name
        assert found["share"] == 5
        assert found["collect"] == list(range(size))
        assert found["any"] == [True, False]
        assert found["flags"] == [rank == 0 for rank in range(size)]


def test_the_truth_depends_on_what_is_tested() -> None:
    """The test above could not fail if noise, dropout and the repeated scene changed nothing."""
    losses = {one_process_loss(make_model(dropout).double(), step).item() for dropout in (0.0, 0.3) for step in (4, 5)}
    assert len(losses) == 4
