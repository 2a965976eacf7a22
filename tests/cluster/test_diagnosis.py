"""From the findings of all nodes to who is bad and whose fault it is: the majority decides, or says that it cannot."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from cluster.nodes.diagnosis import GPU_FREE_BYTES, Problem, bad_nodes, diagnose, roster, silent, slow_nodes, status
from cluster.nodes.findings import Findings, Gpu

FREE = Gpu("H100", 80 << 30, 1 << 29)
WELL = Findings(
    "n0",
    0,
    checked=True,
    python="3.11.7",
    packages={"torch": "2.6.0", "h5py": "3.10"},
    interface="ib0",
    address="10.0.0.1",
    data="fingerprint",
    data_bytes=10**9,
    weights_bytes=343,
    scratch_free=10**12,
    mark="mark-0",
    marks_seen=(True, True, True),
    clock=1000.0,
    pair_speed=1e9,
    reduce_speed=1e9,
    backend="gloo",
)


def nodes(count: int, **of_one: dict[str, Any]) -> list[Findings]:
    """Nodes n0, n1, ... that are well, but for what is said of some."""
    return [replace(WELL, node=f"n{rank}", rank=rank, **of_one.get(f"n{rank}", {})) for rank in range(count)]


def verdict(findings: Sequence[Findings]) -> tuple[int, list[str]]:
    problems = diagnose(findings)
    return status(problems), bad_nodes(problems)


def only(findings: Sequence[Findings]) -> Problem:
    """The one problem."""
    (problem,) = diagnose(findings)
    return problem


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_all_well(count: int) -> None:
    assert diagnose(nodes(count)) == []
    assert status([]) == 0


# --- a check that fails by itself ---


def failing(count: int, bad: int, check: str = "data") -> list[Findings]:
    return nodes(count, **{f"n{rank}": {"troubles": {check: "missing; restore it"}} for rank in range(bad)})


@pytest.mark.parametrize("check", ["data", "weights", "log_path", "scratch", "interface", "versions", "gpus"])
def test_on_all_nodes_it_is_the_jobs_fault_and_on_some_theirs(check: str) -> None:
    assert verdict(failing(1, 1, check)) == (1, [])
    assert verdict(failing(2, 1, check)) == (3, ["n0"])
    assert verdict(failing(4, 2, check)) == (3, ["n0", "n1"])
    assert verdict(failing(4, 3, check)) == (1, [])
    assert verdict(failing(4, 4, check)) == (1, [])


def test_the_line_names_the_nodes_where_not_all_fail() -> None:
    assert only(failing(4, 3)) == Problem("data", "job", ("n0", "n1", "n2"), "missing; restore it")
    assert only(failing(4, 4)).nodes == ()


def test_different_words_are_told_apart() -> None:
    found = nodes(
        5, n1={"troubles": {"data": "missing"}}, n2={"troubles": {"data": "torn"}}, n3={"troubles": {"data": "missing"}}
    )
    assert [(problem.nodes, problem.text) for problem in diagnose(found)] == [
        (("n1", "n3"), "missing"),
        (("n2",), "torn"),
    ]
    assert status(diagnose(found)) == 1  # three of five


def test_silence_is_not_the_reason_where_another_node_has_one() -> None:
    words = {"n0": "no answer within 9 s", "n1": "connection refused", "n2": "no answer within 9 s"}
    assert only(nodes(3, **{node: {"troubles": {"network": text}} for node, text in words.items()})).text == (
        "connection refused"
    )


def test_the_job_weighs_more_than_the_nodes() -> None:
    found = failing(3, 3)
    found[1] = replace(found[1], clock=2000.0)
    problems = diagnose(found)
    assert status(problems) == 1
    assert bad_nodes(problems) == ["n1"]


def test_problems_stand_in_the_order_of_the_checks() -> None:
    found = nodes(4, n1={"clock": 1090.0, "python": "3.10.1", "troubles": {"scratch": "full", "data": "missing"}})
    assert [problem.check for problem in diagnose(found)] == ["versions", "data", "scratch", "clock"]


# --- who came ---


def test_nodes_that_never_started_or_stuck() -> None:
    came = nodes(4)[:2]
    left = [replace(came[0]), Findings("n2", 2)]
    found = roster([f"n{rank}" for rank in range(4)], 4, came, left)
    problems = diagnose(found)
    assert [(problem.nodes, problem.text.split(";")[0]) for problem in problems] == [
        (("n2",), "has started, and stuck before it had checked"),
        (("n3",), "never started"),
    ]
    assert (status(problems), bad_nodes(problems)) == (3, ["n2", "n3"])


def test_what_an_absent_node_had_found_counts() -> None:
    came, odd = nodes(3)[:2], replace(WELL, node="n2", rank=2, troubles={"versions": "torch cannot be imported"})
    problems = diagnose(roster(["n0", "n1", "n2"], 3, came, [odd]))
    assert [(problem.check, problem.nodes) for problem in problems] == [("nodes", ("n2",)), ("versions", ("n2",))]


def test_without_the_names_of_the_nodes_ranks_are_named() -> None:
    problem = only(roster([], 3, [each for each in nodes(3) if each.rank != 1], []))
    assert problem.nodes == ("rank 1",)


def test_too_many_missing_are_the_jobs_fault() -> None:
    names = [f"n{rank}" for rank in range(5)]
    assert verdict(roster(names, 5, nodes(2), [])) == (1, [])
    assert verdict(roster(names, 5, nodes(3), [])) == (3, ["n3", "n4"])
    assert verdict(roster(["n0", "n1"], 2, nodes(1), [])) == (3, ["n1"])


def test_a_meeting_place_that_nobody_reaches() -> None:
    names = [f"n{rank}" for rank in range(4)]
    found = roster(names, 4, nodes(1), nodes(4))
    problem = diagnose(found, "n0:29500")[0]
    assert problem == Problem(
        "nodes", "nodes", ("n0",), "none of the others, which have started, reaches it at n0:29500"
    )
    assert verdict(roster(names, 4, nodes(1), nodes(3))) == (1, [])  # one has not even started


def test_a_node_that_falls_silent() -> None:
    found = nodes(3)
    found[2] = silent(found[2])
    assert only(found).nodes == ("n2",)
    assert "fell silent" in only(found).text


def test_two_processes_of_one_node_are_one_name() -> None:
    found = [replace(each, node="n0" if each.rank < 2 else each.node) for each in nodes(5)]
    found[:2] = [replace(each, troubles={"data": "missing"}) for each in found[:2]]
    assert verdict(found) == (3, ["n0"])


# --- what has to be equal ---


def test_versions_of_which_most_nodes_have_one() -> None:
    found = nodes(5, n1={"packages": {"torch": "2.7.0", "h5py": "3.10"}}, n4={"python": "3.12.1"})
    problems = diagnose(found)
    assert [(problem.nodes, problem.text) for problem in problems] == [
        (("n4",), "python is 3.12.1, on the other nodes 3.11.7"),
        (("n1",), "torch is 2.7.0, on the other nodes 2.6.0"),
    ]
    assert verdict(found) == (3, ["n1", "n4"])


def test_versions_of_which_none_has_the_majority() -> None:
    found = nodes(4, n0={"python": "3.12.1"}, n1={"python": "3.12.1"})
    assert verdict(found) == (1, [])
    assert "python differs: 3.12.1 on n0, n1, 3.11.7 on n2, n3" in only(found).text


def test_a_package_that_is_missing() -> None:
    without = {"packages": {"torch": "2.6.0", "h5py": ""}}
    assert only(nodes(3, n2=without)).text == "h5py is missing, on the other nodes 3.10"
    everywhere = only(nodes(2, n0=without, n1=without))
    assert (everywhere.fault, everywhere.nodes) == ("job", ())
    assert everywhere.text.startswith("h5py is missing; install")


def test_the_data_and_the_weights_are_the_same_everywhere() -> None:
    assert verdict(nodes(3, n1={"data": "another"})) == (3, ["n1"])
    assert verdict(nodes(3, n1={"weights_bytes": 342})) == (3, ["n1"])
    assert verdict(nodes(2, n1={"data": "another"})) == (1, [])


def test_a_node_that_could_not_read_is_not_told_of_twice() -> None:
    assert [problem.text for problem in diagnose(nodes(3, n1={"data": "", "troubles": {"data": "missing"}}))] == [
        "missing"
    ]


# --- the run's folder ---


def test_one_folder_and_a_node_elsewhere() -> None:
    assert verdict(nodes(5, n4={"marks_seen": (False, False, False)})) == (3, ["n4"])


def test_rank_0_elsewhere() -> None:
    found = [replace(each, marks_seen=(False, True, True)) for each in nodes(4)]
    found[0] = replace(found[0], marks_seen=(True, False, False))
    assert verdict(found) == (3, ["n0"])


def test_a_folder_of_its_own_on_each_node() -> None:
    """Most nodes see none of the marks; that they agree in it makes it no folder."""
    views = [(True, False, False), (False, True, False), (False, False, True)] + [(False, False, False)] * 5
    found = [replace(each, marks_seen=view) for each, view in zip(nodes(8), views, strict=True)]
    assert verdict(found) == (1, [])
    assert verdict([replace(each, marks_seen=view) for each, view in zip(nodes(2), views, strict=False)]) == (1, [])


def test_without_a_run_folder_nothing_is_told() -> None:
    assert diagnose([replace(each, mark="", marks_seen=()) for each in nodes(3)]) == []


# --- GPUs ---


def gpu_nodes(count: int, **of_one: dict[str, Any]) -> list[Findings]:
    usual = {"gpus_asked": 2, "gpus": (FREE, FREE), "cuda": "12.4", "driver": True}
    return nodes(count, **{f"n{rank}": {**usual, **of_one.get(f"n{rank}", {})} for rank in range(count)})


def test_gpus_as_asked_for() -> None:
    assert diagnose(gpu_nodes(3)) == []
    assert diagnose(gpu_nodes(1, n0={"gpus": (FREE,) * 8})) == []


def test_nodes_without_a_driver_train_on_the_cpu() -> None:
    pretended = {"gpus": (), "driver": False}
    problem = only(gpu_nodes(2, n0=pretended, n1=pretended))
    assert problem.fault == "none"
    assert "no node has a driver of them: training will run on the CPU" in problem.text
    assert status([problem]) == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"gpus": (), "cuda": ""}, "torch 2.6.0 is built for CPUs alone"),
        ({"gpus": (), "driver": False}, "it has no driver of GPUs"),
        ({"gpus": ()}, "its driver shows none"),
        ({"gpus": (FREE,)}, "2 GPUs asked for, 1 to be seen"),
    ],
)
def test_a_node_that_sees_fewer(change: dict[str, Any], why: str) -> None:
    problem = only(gpu_nodes(3, n1=change))
    assert (problem.fault, problem.nodes) == ("nodes", ("n1",))
    assert why in problem.text


def test_a_build_for_cpus_on_nodes_with_gpus_is_the_jobs_fault() -> None:
    assert verdict(gpu_nodes(2, n0={"gpus": (), "cuda": ""}, n1={"gpus": (), "cuda": ""})) == (1, [])
    assert verdict(gpu_nodes(1, n0={"gpus": (), "cuda": ""})) == (1, [])


def test_a_gpu_that_is_gone_from_a_single_node_is_the_nodes_fault() -> None:
    assert verdict(gpu_nodes(1, n0={"gpus": (FREE,)})) == (3, ["n0"])
    assert verdict(gpu_nodes(2, n0={"gpus": (FREE,)}, n1={"gpus": (FREE,)})) == (1, [])  # none has as many


def test_a_gpu_that_somebody_holds_is_the_nodes_fault_even_on_a_single_node() -> None:
    taken = replace(FREE, used_bytes=30 << 30)
    found = gpu_nodes(1, n0={"gpus": (FREE, taken)})
    assert verdict(found) == (3, ["n0"])
    assert only(found).text == "GPU 1 (H100) is not free: 32.2 of 85.9 GB are held; end what runs there"
    broken = replace(FREE, trouble="CUDA error: uncorrectable ECC error")
    assert verdict(gpu_nodes(2, n1={"gpus": (broken, FREE)})) == (3, ["n1"])


def test_what_is_not_asked_for_may_be_taken() -> None:
    taken = replace(FREE, used_bytes=30 << 30)
    assert diagnose(gpu_nodes(1, n0={"gpus": (FREE, FREE, taken)})) == []
    assert diagnose(gpu_nodes(1, n0={"gpus": (taken,), "gpus_asked": 0})) == []
    assert diagnose(gpu_nodes(1, n0={"gpus": (FREE, replace(FREE, used_bytes=GPU_FREE_BYTES))})) == []


# --- scratch, clocks ---


def test_scratch_that_is_full() -> None:
    assert verdict(nodes(3, n1={"scratch_free": 10**8})) == (3, ["n1"])
    assert verdict(nodes(1, n0={"scratch_free": 0})) == (1, [])


def test_scratch_too_small_for_the_shards_is_a_warning() -> None:
    problem = only(nodes(3, n1={"scratch_free": 3 * 10**9, "data_bytes": 5 * 10**9}))
    assert (problem.fault, problem.nodes) == ("none", ("n1",))
    assert problem.text == "3.0 GB free, the shards take 5.0 GB: they cannot be staged whole"


@pytest.mark.parametrize(
    ("skew", "expected"), [(1.9, None), (-1.9, None), (2.1, "none"), (-29.9, "none"), (30.1, "nodes"), (-3e7, "nodes")]
)
def test_clocks(skew: float, expected: str | None) -> None:
    problems = diagnose(nodes(4, n0={"clock": 1000.0 + skew}))
    assert [problem.fault for problem in problems] == ([expected] if expected else [])
    assert all(problem.nodes == ("n0",) for problem in problems)
    assert all(("ahead" if skew > 0 else "behind") in problem.text for problem in problems)


def test_of_two_clocks_nobody_knows_which_is_right() -> None:
    assert verdict(nodes(2, n0={"clock": 2000.0})) == (1, [])


# --- the network ---


def test_a_slow_node() -> None:
    found = nodes(4, n2={"pair_speed": 6e6})
    assert verdict(found) == (3, ["n2"])
    assert only(found).text.startswith("0.0060 GB/s with the best of its partners, the median node has 1.00")
    assert verdict(nodes(4, n2={"pair_speed": 1.1e8})) == (0, [])


def test_a_node_that_reaches_nobody() -> None:
    problem = only(nodes(3, n2={"pair_speed": 0.0}))
    assert (problem.nodes, problem.text.split(",")[0]) == (("n2",), "reaches none of its partners")


def test_nodes_that_do_not_reach_each_other() -> None:
    assert verdict(nodes(2, n0={"pair_speed": 0.0}, n1={"pair_speed": 0.0})) == (1, [])


def test_a_network_that_is_slow_everywhere_is_as_it_is() -> None:
    assert slow_nodes([1e6, 1.2e6, 0.9e6]) == []
    assert slow_nodes([]) == []
    assert slow_nodes([1e9, 1e7, 1e9, 1e7]) == [1, 3]


# --- whatever is found ---


def test_no_order_of_the_nodes_matters() -> None:
    found = nodes(
        6,
        n1={"python": "3.12.1", "clock": 1003.0},
        n2={"troubles": {"scratch": "full"}, "pair_speed": 5e6},
        n3={"marks_seen": (False, False, False)},
    )
    expected = verdict(found)
    assert expected == (3, ["n1", "n2", "n3"])
    for seed in range(20):
        shuffled = random.Random(seed).sample(found, len(found))
        assert verdict(shuffled) == expected


def test_the_bad_ones_are_never_more_than_half() -> None:
    """Of one check: else the job would flee from a healthy cluster."""
    for count in range(1, 9):
        for bad in range(count + 1):
            found, names = verdict(failing(count, bad))
            assert len(names) <= count / 2
            assert found == (0 if not bad else 3 if names else 1)
