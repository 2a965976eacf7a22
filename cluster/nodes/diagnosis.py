"""What the findings of all nodes mean: what is wrong, on which nodes, and whether they or the job are to blame.

What fails on every node alike is the job's fault: it would fail on other nodes too. What fails on some, up to half of
them, is theirs, and the job can go on without them. Where nodes differ, those are right that have more than half on
their side; where nobody has, it is the job's fault again.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.nodes.findings import Findings, Gpu
from cluster.nodes.within import NO_ANSWER

CHECKS = ("nodes", "versions", "gpus", "interface", "data", "weights", "log_path", "scratch", "clock", "network")
CLOCK_WARN_S, CLOCK_BAD_S = 2.0, 30.0
SLOW = 10  # times slower than the median node
GPU_FREE_BYTES = 2 << 30  # the doctor's own context and a desktop's are below this
SCRATCH_BYTES = 1 << 30
GB = 1e9

Fault = Literal["none", "job", "nodes"]


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be; "none" is to blame where it is but a warning."""

    check: str
    fault: Fault
    nodes: tuple[str, ...]  # where; () is everywhere
    text: str  # what, and what to do


def roster(names: Sequence[str], size: int, came: Sequence[Findings], left: Sequence[Findings]) -> list[Findings]:
    """One entry for each node that was to come: those that came, and the others with that as their trouble.

    `names`: the nodes of the job, () where nobody knows them; `left`: what was found in files that nodes had left.
    """
    here, ranks = {each.node for each in came}, {each.rank for each in came}
    files = {each.node: each for each in left}
    nodes = {each.rank: each.node for each in left}
    if names:
        absent = [(name, files[name].rank if name in files else -1) for name in names if name not in here]
    else:
        absent = [(nodes.get(rank, f"rank {rank}"), rank) for rank in range(size) if rank not in ranks]
    return [*came, *(_absent(name, rank, files.get(name)) for name, rank in absent)]


def silent(findings: Findings) -> Findings:
    """A node that came, and of which nothing was heard afterwards."""
    return replace(findings, troubles={**findings.troubles, "nodes": "came, and then fell silent; look at the node"})


def _absent(name: str, rank: int, left: Findings | None) -> Findings:
    if left is None:
        return Findings(name, rank, troubles={"nodes": "never started; look at the node, or give more --seconds"})
    how = (
        "has started, but could not meet the others" if left.checked else "has started, and stuck before it had checked"
    )
    return replace(left, troubles={**left.troubles, "nodes": f"{how}; look at the node, or give more --seconds"})


def diagnose(findings: Sequence[Findings], meeting: str = "") -> list[Problem]:
    """All problems, in the order of CHECKS. `findings` as `roster` gives them; `meeting`: where nodes had to meet."""
    known = [each for each in findings if each.checked]
    problems = [
        *_presence(findings, meeting),
        *(problem for check in CHECKS[1:] for problem in _some(check, known, _trouble(check))),
        *_versions(known),
        *_gpus(known),
        *_equal("data", known, "the data's fingerprint", lambda each: each.data[:12]),
        *_equal("weights", known, "the weights' size", lambda each: str(each.weights_bytes or "")),
        *_one_folder(known),
        *_scratch(known),
        *_clocks(known),
        *_speeds(known),
    ]
    return sorted(problems, key=lambda problem: CHECKS.index(problem.check))


def status(problems: Sequence[Problem]) -> int:
    """The exit status: 0 all well, 1 the job must not be tried again as it is, 3 it may, without `bad_nodes`."""
    faults = {problem.fault for problem in problems}
    return 1 if "job" in faults else 3 if "nodes" in faults else 0


def bad_nodes(problems: Sequence[Problem]) -> list[str]:
    """The nodes that are to blame, each once."""
    return sorted({node for problem in problems if problem.fault == "nodes" for node in problem.nodes})


def slow_nodes(speeds: Sequence[float]) -> list[int]:
    """The places of those that are far slower than the median, or reach nobody."""
    if not speeds:
        return []
    median = statistics.median_high(speeds)
    return [place for place, speed in enumerate(speeds) if speed * SLOW < median]


def _trouble(check: str) -> Callable[[Findings], str]:
    return lambda each: each.troubles.get(check, "")


def _some(check: str, among: Sequence[Findings], text_of: Callable[[Findings], str]) -> list[Problem]:
    """The nodes of which there is something to tell, those with equal words together."""
    bad = [(each.node, text) for each in among if (text := text_of(each))]
    fault: Fault = "nodes" if 2 * len(bad) <= len(among) else "job"
    texts = list(dict.fromkeys(text for _, text in bad))
    texts.sort(key=lambda text: NO_ANSWER in text)  # which is but the echo, where another node knows more
    if texts and len(bad) == len(among):
        return [Problem(check, fault, (), texts[0])]
    return [Problem(check, fault, tuple(node for node, said in bad if said == text), text) for text in texts]


def _equal(check: str, among: Sequence[Findings], what: str, value_of: Callable[[Findings], str]) -> list[Problem]:
    """Those that differ from the majority; a node without a value has its own trouble, and is passed over."""
    values = [(each.node, value) for each in among if (value := value_of(each))]
    counts = Counter(value for _, value in values)
    if len(counts) < 2:
        return []
    usual, count = counts.most_common(1)[0]
    if 2 * count > len(values):
        return [
            Problem(check, "nodes", _having(values, value), f"{what} is {value}, on the other nodes {usual}")
            for value in counts
            if value != usual
        ]
    told = ", ".join(f"{value} on {some(_having(values, value))}" for value in counts)
    return [Problem(check, "job", (), f"{what} differs: {told}; make it the same on all nodes")]


def _having(values: Sequence[tuple[str, str]], wanted: str) -> tuple[str, ...]:
    return tuple(node for node, value in values if value == wanted)


def _presence(findings: Sequence[Findings], meeting: str) -> list[Problem]:
    absent = [each for each in findings if "nodes" in each.troubles]
    if len(absent) == len(findings) - 1 > 1 and all(each.checked for each in absent):
        alone = next(each.node for each in findings if each not in absent)
        return [Problem("nodes", "nodes", (alone,), f"none of the others, which have started, reaches it at {meeting}")]
    return _some("nodes", findings, _trouble("nodes"))


def _versions(known: Sequence[Findings]) -> list[Problem]:
    problems = _equal("versions", known, "python", lambda each: each.python)
    for name in dict.fromkeys(name for each in known for name in each.packages):
        problems += _equal("versions", known, name, lambda each, name=name: each.packages.get(name) or "missing")
        if all(not each.packages.get(name) for each in known):
            problems.append(Problem("versions", "job", (), f"{name} is missing; install it into the job's environment"))
    return problems


def _gpus(known: Sequence[Findings]) -> list[Problem]:
    wanting = [each for each in known if each.gpus_asked and "gpus" not in each.troubles]
    if wanting and not any(each.gpus or each.driver for each in wanting):
        text = f"asked for {wanting[0].gpus_asked} GPUs, but no node has a driver of them: training will run on the CPU"
        return [Problem("gpus", "none", (), text)]
    taken = [
        Problem("gpus", "nodes", (each.node,), text)  # the node's own, be it on all: other nodes' GPUs may be free
        for each in wanting
        for place, gpu in enumerate(each.gpus[: each.gpus_asked])  # those that ranks will take
        if (text := _taken(place, gpu))
    ]
    if len(known) == 1 and any(each.gpus for each in wanting):
        # No majority to ask; but torch can use this node's GPUs, and the job was given more of them than are there.
        return [*(Problem("gpus", "nodes", (each.node,), text) for each in wanting if (text := _too_few(each))), *taken]
    return [*_some("gpus", wanting, _too_few), *taken]


def _too_few(each: Findings) -> str:
    if len(each.gpus) >= each.gpus_asked:
        return ""
    if each.gpus:
        return f"{each.gpus_asked} GPUs asked for, {len(each.gpus)} to be seen; ask for fewer, or look at the node"
    why = (
        f"torch {each.packages.get('torch', '')} is built for CPUs alone"
        if not each.cuda
        else "its driver shows none"
        if each.driver
        else "it has no driver of GPUs"
    )
    return f"{each.gpus_asked} GPUs asked for, torch sees none: {why}"


def _taken(place: int, gpu: Gpu) -> str:
    if gpu.trouble:
        return f"GPU {place} cannot be used ({gpu.trouble})"
    if gpu.used_bytes > GPU_FREE_BYTES:
        held, total = gpu.used_bytes / GB, gpu.total_bytes / GB
        return f"GPU {place} ({gpu.name}) is not free: {held:.1f} of {total:.1f} GB are held; end what runs there"
    return ""


def _one_folder(known: Sequence[Findings]) -> list[Problem]:
    """Nodes share a folder where they see the same of the files that the first few nodes left in theirs."""
    looked = [each for each in known if each.marks_seen and "log_path" not in each.troubles]
    if all(all(each.marks_seen) for each in looked):
        return []
    views = Counter(each.marks_seen for each in looked if any(each.marks_seen))
    usual, count = views.most_common(1)[0] if views else ((), 0)
    if 2 * count > len(looked):
        others = tuple(each.node for each in looked if each.marks_seen != usual)
        return [
            Problem("log_path", "nodes", others, "is another folder here than on the other nodes; look at its mounts")
        ]
    return [Problem("log_path", "job", (), "is not one folder on all nodes; give --log_path a folder that they share")]


def _scratch(known: Sequence[Findings]) -> list[Problem]:
    looked = [each for each in known if each.scratch_free is not None]
    full = _some("scratch", looked, lambda each: _full(each.scratch_free or 0))
    data = max((each.data_bytes for each in looked), default=0)
    tight = [each for each in looked if SCRATCH_BYTES <= (each.scratch_free or 0) < data]
    if tight:
        least = min(each.scratch_free or 0 for each in tight) / GB
        text = f"{least:.1f} GB free, the shards take {data / GB:.1f} GB: they cannot be staged whole"
        full.append(Problem("scratch", "none", tuple(each.node for each in tight), text))
    return full


def _full(free: int) -> str:
    return f"{free / GB:.2f} GB free, 1 GB is the least; make room" if free < SCRATCH_BYTES else ""


def _clocks(known: Sequence[Findings]) -> list[Problem]:
    times = [(each.node, each.clock) for each in known if each.clock is not None]
    if len(times) < 2:
        return []
    middle = statistics.median_low([clock for _, clock in times])
    off = [(node, clock - middle) for node, clock in times if abs(clock - middle) > CLOCK_WARN_S]
    far = sum(abs(by) > CLOCK_BAD_S for _, by in off)
    fault: Fault = "nodes" if 2 * far < len(times) else "job"  # of two, nobody knows who is right
    return [
        Problem(
            "clock",
            fault if abs(by) > CLOCK_BAD_S else "none",
            (node,),
            f"its clock is {abs(by):.1f} s {'ahead' if by > 0 else 'behind'}; set it (NTP)",
        )
        for node, by in off
    ]


def _speeds(known: Sequence[Findings]) -> list[Problem]:
    measured = [each for each in known if each.pair_speed is not None and "network" not in each.troubles]
    speeds = [each.pair_speed or 0.0 for each in measured]
    if len(measured) > 1 and not any(speeds):
        return [
            Problem("network", "job", (), "no node reaches another; set NSI_INTERFACE, or open the ports between them")
        ]
    slow, median = slow_nodes(speeds), statistics.median_high(speeds) if speeds else 0.0
    return [Problem("network", "nodes", (measured[place].node,), _slow(speeds[place], median)) for place in slow]


def _slow(speed: float, median: float) -> str:
    if not speed:
        return "reaches none of its partners, which reach others; look at its interface and firewall"
    return (
        f"{speed / GB:.4f} GB/s with the best of its partners, the median node has {median / GB:.2f}; look at its link"
    )


def some(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
