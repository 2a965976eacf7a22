"""What Slurm tests share: one cluster, good as new before each test. `tests/scheduling.py` gives it one worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster.bringup import down, up
from tests.slurm.cluster.commands import Cluster
from tests.slurm.cluster.faults import restore
from tests.slurm.cluster.packages import install


@pytest.fixture(scope="session")
def standing_cluster() -> Iterator[Cluster]:
    """The cluster as the last test left it."""
    if why := install():
        pytest.skip(why)
    cluster = up()
    yield cluster
    down(cluster.place.folder)


@pytest.fixture
def cluster(standing_cluster: Cluster) -> Cluster:
    """Four idle nodes, whatever the test before did."""
    restore(standing_cluster)
    return standing_cluster


@pytest.fixture
def apart(cluster: Cluster) -> Cluster:
    """A cluster whose nodes have a network of their own."""
    if not cluster.place.namespaces:
        pytest.skip("no namespaces here; run the tests as root of a machine or of a privileged container")
    return cluster
