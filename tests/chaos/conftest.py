"""What chaos tests share: one zygote, which has imported all of training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.world import Zygote, zygote


@pytest.fixture(scope="package")
def mother(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """The process that ranks are forked from."""
    with zygote(tmp_path_factory.mktemp("zygote")) as made:
        yield made
