"""Validation by portions, in any world and ZeRO stage, is that of all rows at once in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gloo.problem import G
from tests.gloo.worlds import run_world


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The figures of one process with all rows at once."""
    ((found,),) = run_world("work_validation.py", 1, tmp_path_factory.mktemp("one"), "[0]", str(G))
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_any_world_stage_and_portions_have_the_same_figures(tmp_path: Path, truth: dict, size: int) -> None:
    """Two rows at once. Three ranks have three rows each, and on some of them the last portion holds no scene."""
    for rank, stages in enumerate(run_world("work_validation.py", size, tmp_path, "[0, 1, 2, 3]", "2")):
        for whole, portions, whole_later, portions_later in stages:
            assert portions == pytest.approx(whole, rel=1e-6)
            assert portions_later == pytest.approx(whole_later, rel=1e-6)
            assert whole_later["loss"] != pytest.approx(whole["loss"], rel=1e-4)  # a step lies between
            assert portions == pytest.approx(truth if rank == 0 else {name: truth[name] for name in whole}, rel=1e-5)
