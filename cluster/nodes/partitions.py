"""A cluster's partitions, from what Slurm says of them; and what is wrong with a job, in its words and in ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.nodes.sbatch import seconds


@dataclass(frozen=True)
class Partition:
    """A queue of the cluster. Times in seconds; None without a limit."""

    name: str
    is_default: bool
    nodes: int
    time_limit: int | None
    usual_time: int | None  # of a job that gives no --time


@dataclass(frozen=True)
class Kind:
    """Some nodes that are alike."""

    partition: str
    nodes: int
    cpus: int
    memory_mb: int
    gpus: int


def parse_partitions(said: str) -> list[Partition]:
    """From `scontrol show partition --oneliner`."""
    found: list[Partition] = []
    for line in said.splitlines():
        facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "PartitionName" in facts:
            limit, usual = seconds(facts.get("MaxTime", "")), seconds(facts.get("DefaultTime", ""))
            nodes = int(facts["TotalNodes"]) if facts.get("TotalNodes", "").isdecimal() else 0
            found.append(Partition(facts["PartitionName"], facts.get("Default") == "YES", nodes, limit, usual or limit))
    return found


def parse_kinds(said: str) -> list[Kind]:
    """From `sinfo --noheader --format=%R|%D|%c|%m|%G`; a + behind a number means that some nodes have more."""
    found: list[Kind] = []
    for line in said.splitlines():
        name, nodes, cpus, memory, gres = (line.split("|", 4) + [""] * 5)[:5]
        counts = [int(re.sub(r"\D", "", text) or 0) for text in (nodes, cpus, memory)]
        gpus = sum(int(count or 1) for count in re.findall(r"\bgpu(?::[a-zA-Z][^:,(]*)?(?::(\d+))?", gres))
        found.append(Kind(name, counts[0], counts[1], counts[2], gpus))
    return found


def chosen(partitions: Sequence[Partition], asked: Mapping[str, str]) -> list[Partition]:
    """Those that a job may run in."""
    if names := [name for name in asked.get("partition", "").split(",") if name]:
        return [each for each in partitions if each.name in names]
    return [each for each in partitions if each.is_default]


def explain(said: str, asked: Mapping[str, str], partitions: Sequence[Partition], kinds: Sequence[Kind]) -> str:
    """What sbatch refused a job with, as one line that says what to do."""
    lines = [re.sub(r"^(sbatch: )?((error|fatal): )?|^allocation failure: ", "", line) for line in said.splitlines()]
    lines = [line.strip() for line in lines if line.strip() and not line.startswith('Try "')]
    words = re.sub(r"^Batch job submission failed: |^allocation failure: ", "", lines[-1]) if lines else "no word"
    low = said.lower()
    there = ", ".join(each.name + (" (the default)" if each.is_default else "") for each in partitions) or "none"
    if "invalid partition" in low:
        return f"no partition {asked.get('partition', '')!r} here; there are {there}: give one of them as --partition"
    if "no partition specified" in low:
        return f"this cluster has no default partition; there are {there}: give one of them as --partition"
    if "node configuration is not available" in low or "more processors requested" in low or "node count" in low:
        return f"no nodes can ever hold this job ({words}); {_has(asked, partitions, kinds)}; ask for less"
    if "unable to contact slurm controller" in low:
        return "Slurm's controller does not answer (`scontrol ping` looks for it); try again later, or tell the site"
    if "configuration" in low and ("source" in low or "process" in low):
        return f"Slurm is not set up on this machine ({words}); submit from a login node of the cluster"
    if "account" in low or "qos" in low:
        return f"{words}; `sacctmgr show associations user=$USER format=account,partition,qos` lists what you may use"
    if "feature" in low:
        return f"--constraint {asked.get('constraint', '')}: {words}; `sinfo -o '%N %f'` lists the nodes' features"
    if "time limit" in low:
        return f"--time {asked.get('time', '')}: {words}; `sinfo -o '%R %l'` lists the partitions' limits"
    if "gres" in low:
        return f"--gres {asked.get('gres', '')}: {words}; `sinfo -o '%N %G'` lists what nodes have"
    if "node name" in low:
        return f"{words}; `sinfo -N` lists the nodes"
    return f"{words} (so says sbatch; `sbatch --help` lists its options)"


def _has(asked: Mapping[str, str], partitions: Sequence[Partition], kinds: Sequence[Kind]) -> str:
    """What the partitions of a job have."""
    texts = []
    for each in chosen(partitions, asked):
        own = [kind for kind in kinds if kind.partition == each.name]
        if own:
            most = [max(getattr(kind, name) for kind in own) for name in ("cpus", "memory_mb", "gpus")]
            nodes = "1 node" if each.nodes == 1 else f"{each.nodes} nodes"
            texts.append(f"{each.name} has {nodes} with at most {most[0]} CPUs, {most[1]} MB and {most[2]} GPUs each")
    return "; ".join(texts) or "`sinfo -o '%R %D %c %m %G'` lists what there is"
