"""What tests share: a small set of scenes and its shards, made once a session by the product itself."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest

from tests.scheduling import SLURM, ByFile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in one order, and two test workers on two cores

SCENES = 60
SHARD_SAMPLES = 10


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slurm first: it waits more than it computes, and a worker that came to it last would leave the other idle."""
    items.sort(key=lambda item: not item.nodeid.startswith(SLURM))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What has been imported by now stays; a collection need not look at it, and `auto` collects before each try."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile | None:
    """In place of xdist's loadgroup, and in the order above."""
    if config.getvalue("dist") != "loadgroup":
        return None
    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of synthetic scenes in the v2 layout."""
    from shards.synthetic.write import write_scenes

    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, SCENES, seed=7, size=(64, 48), workers=1, report=lambda done: None)
    return folder


@pytest.fixture(scope="session")
def shards(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of those scenes: 48 train, 6 val, 6 test."""
    from tests.making import make_shards

    folder = tmp_path_factory.mktemp("data") / "shards"
    make_shards(scenes, folder, shard_samples=SHARD_SAMPLES)
    return folder
