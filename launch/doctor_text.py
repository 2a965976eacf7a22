"""The words of `nsi doctor`: a line for each check, and what follows from all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.nodes.diagnosis import CHECKS, GB, Problem, bad_nodes, some, status
from cluster.nodes.findings import Findings

_MB = 1e6


def to_lines(findings: Sequence[Findings], problems: Sequence[Problem], places: dict[str, str]) -> Iterator[str]:
    """The lines. `places`: the folder or file that a check looked at, by check."""
    known = [each for each in findings if each.checked]
    for check in CHECKS:
        troubled = [problem for problem in problems if problem.check == check]
        for problem in troubled:
            where = f"{some(problem.nodes)}: " if problem.nodes else ""
            yield f"{'warn' if problem.fault == 'none' else 'BAD':5} {check:10} {where}{problem.text}"
        if not troubled and known and (text := _well(check, known, places)):
            yield f"{'ok':5} {check:10} {text}"
    yield _verdict(problems)


def _verdict(problems: Sequence[Problem]) -> str:
    if status(problems) == 3:
        return f"bad nodes: {' '.join(bad_nodes(problems))}"
    return "the job cannot run like this" if status(problems) else "all well"


def _well(check: str, known: Sequence[Findings], places: dict[str, str]) -> str:
    """What is told of a check that found nothing wrong; "" for one that had nothing to look at."""
    if check in ("data", "weights", "log_path", "scratch") and check not in places:
        return ""
    first, several = known[0], len(known) > 1
    if check == "nodes":
        return f"{some([each.node for each in known])}" + (f" ({len(known)})" if several else "")
    if check == "versions":
        return f"python {first.python}, " + ", ".join(f"{name} {version}" for name, version in first.packages.items())
    if check == "gpus":
        return _gpus(known)
    if check == "interface":
        return ", ".join(sorted({each.interface for each in known if each.interface}))
    if check == "data":
        return f"{places[check]}: fingerprint {first.data[:12]}, {first.data_bytes / GB:.2f} GB"
    if check == "weights":
        # Where torch could not be imported nobody has looked.
        return f"{places[check]}: {_weights(known)}" if all(each.weights_bytes is not None for each in known) else ""
    if check == "log_path":
        return f"{places[check]}: " + ("one folder, which all nodes see and can write" if several else "can be written")
    if check == "scratch":
        return f"{places[check]}: {min(each.scratch_free or 0 for each in known) / GB:.1f} GB free at the least"
    if not several:
        return ""
    if check == "clock":
        clocks = [each.clock for each in known if each.clock is not None]
        return f"within {max(clocks) - min(clocks):.2f} s of each other" if clocks else ""
    return _network(known)


def _weights(known: Sequence[Findings]) -> str:
    sizes = [each.weights_bytes for each in known]
    return f"{max(filter(None, sizes)) / _MB:.1f} MB" if all(sizes) else "fetched at the start, or none needed"


def _gpus(known: Sequence[Findings]) -> str:
    most, least = max(len(each.gpus) for each in known), min(len(each.gpus) for each in known)
    names = ", ".join(sorted({gpu.name for each in known for gpu in each.gpus}))
    seen = f"{least if least == most else f'{least} to {most}'} a node ({names})" if most else "none to be seen"
    asked = max(each.gpus_asked for each in known)
    return f"{seen}, free" if asked else f"{seen}, none asked for"


def _network(known: Sequence[Findings]) -> str:
    speeds = {each.node: each.pair_speed for each in known if each.pair_speed is not None}
    if not speeds:
        return ""
    slowest = min(speeds, key=lambda node: speeds[node])
    text = f"two by two {speeds[slowest] / GB:.2f} ({slowest}) to {max(speeds.values()) / GB:.2f} GB/s"
    reduced = [each.reduce_speed for each in known if each.reduce_speed]
    if reduced:
        text += f", all-reduce {min(reduced) / GB:.2f} GB/s by {known[0].backend}"
    return text
