"""Which checkpoints are kept, as a pure function."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.checkpoints.retention import Retention, kept_steps

HOUR = 3600.0


def test_the_last_and_the_best() -> None:
    saved = [(step, step * HOUR) for step in (30, 10, 20, 40)]
    assert kept_steps(saved, frozenset(), Retention(2)) == {30, 40}
    assert kept_steps(saved, frozenset({10}), Retention(2)) == {10, 30, 40}
    assert kept_steps(saved, frozenset({15}), Retention(9)) == {10, 20, 30, 40}  # step 15 is not there
    assert kept_steps([], frozenset({10}), Retention(2)) == set()


def test_the_first_of_every_so_many_hours() -> None:
    saved = [(step, step * HOUR / 10) for step in range(100)]
    assert kept_steps(saved, frozenset(), Retention(1, every_hours=3)) == {0, 30, 60, 90, 99}
    assert kept_steps(saved[45:], frozenset(), Retention(1, every_hours=3)) == {45, 60, 90, 99}


@given(st.lists(st.floats(0, 100 * HOUR), min_size=1, max_size=40), st.integers(1, 4), st.floats(0.5, 20))
def test_what_is_kept_for_good_stays_whatever_else_goes(gaps: list[float], last: int, hours: float) -> None:
    """Asked after each checkpoint, of those that are left: the same as asked once of all."""
    policy, times = Retention(last, hours), [sum(gaps[: place + 1]) for place in range(len(gaps))]
    left: list[tuple[int, float]] = []
    for step, at in enumerate(times):
        left.append((step, at))
        kept = kept_steps(left, frozenset(), policy)
        left = [each for each in left if each[0] in kept]
    assert {step for step, _ in left} == kept_steps(list(enumerate(times)), frozenset(), policy)
