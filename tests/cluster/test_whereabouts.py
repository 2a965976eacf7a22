"""Who hangs, who is slow, and where: from beats and stacks."""

from __future__ import annotations

import sys
from dataclasses import replace

from cluster.watch.whereabouts import Beat, hang, slowness, where_is

AT_WORK = Beat(0, "node01", 17, "step", 40, 0.5, "launch/training/step.py:80 (training_step)", "", 0.2)
WAITING = replace(AT_WORK, collective="all_reduce", idle_s=61.0)


def test_nobody_hangs() -> None:
    assert hang([AT_WORK, replace(AT_WORK, rank=1, idle_s=59.0)], 60) is None


def test_the_rank_that_came_least_far_is_named() -> None:
    stuck = replace(AT_WORK, rank=3, node="node07", moves=39, bucket="data_wait", idle_s=62.0, at="shards/x.py:1 (f)")
    assert hang([WAITING, replace(WAITING, rank=1), stuck], 60) == (
        "rank 3 (node07) stood still for 62 s after step 17, in data_wait, at shards/x.py:1 (f); "
        "the others wait in all_reduce at launch/training/step.py:80 (training_step)"
    )


def test_among_equals_it_is_the_one_that_waits_for_nobody() -> None:
    stuck = replace(AT_WORK, rank=1, idle_s=61.0)
    text = hang([WAITING, stuck], 60)
    assert text is not None
    assert text.startswith("rank 1 (node01) stood still")


def test_all_may_wait_for_nothing() -> None:
    text = hang([WAITING, replace(WAITING, rank=1)], 60)
    assert text == (
        "rank 0 (node01), rank 1 (node01) stood still for 61 s after step 17, in step, in all_reduce at "
        "launch/training/step.py:80 (training_step)"
    )


def test_a_start_may_take_longer() -> None:
    starting = replace(AT_WORK, bucket="start", idle_s=170.0)
    assert hang([starting], 60) is None
    assert hang([replace(starting, idle_s=181.0)], 60) is not None


def test_slow_ranks() -> None:
    ranks = [replace(AT_WORK, rank=rank, own_s=own) for rank, own in enumerate((0.1, 0.1, 0.3, 0.1))]
    assert {rank: round(times, 6) for rank, times in slowness(ranks).items()} == {0: 1.0, 1: 1.0, 2: 3.0, 3: 1.0}
    assert slowness(ranks[1:3]) == {1: 1.0, 2: 0.3 / 0.1}  # of two, the slow one is not its own measure
    assert slowness(ranks[:1]) == {}
    assert slowness([*ranks, replace(AT_WORK, rank=4, own_s=0.0)]) == {}


def test_a_stack_tells_the_line_and_no_collective() -> None:
    at, collective = where_is(sys._getframe())
    assert (at, collective) == ("", "")  # tests are no room of the program
