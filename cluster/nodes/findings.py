"""What `nsi doctor` finds on one node: plain facts, as they are written to a file and told to the other nodes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees."""

    name: str
    total_bytes: int
    used_bytes: int  # by anybody; the doctor's own context is among it
    trouble: str = ""  # why it cannot be used, in one line


@dataclass(frozen=True)
class Findings:
    """One node. What was not looked for keeps its default; what failed is in `troubles`, a line for each check."""

    node: str
    rank: int  # -1 where nobody knows
    checked: bool = False  # False: it has started, or not even that
    python: str = ""
    packages: dict[str, str] = field(default_factory=dict)  # by name; "" where it is not installed
    gpus_asked: int = 0
    gpus: tuple[Gpu, ...] = ()
    cuda: str = ""  # what torch was built for; "" for CPUs alone
    driver: bool = False  # whether the node has a driver of GPUs at all
    interface: str = ""  # the one whose address is used towards rank 0
    address: str = ""
    port: int = 0  # where partners of the exchange knock
    data: str = ""  # the manifest's fingerprint
    data_bytes: int = 0
    weights_bytes: int | None = None  # 0: the hub gives them at the start, or there are none
    scratch_free: int | None = None  # bytes
    mark: str = ""  # the name of the file that it left in the run's folder
    marks_seen: tuple[bool, ...] = ()  # whether it sees those of the first few nodes
    clock: float | None = None  # seconds since 1970, when all looked at their clocks
    pair_speed: float | None = None  # bytes a second with the best of its partners, both ways at once
    reduce_speed: float | None = None  # bytes of an all-reduce by its seconds
    backend: str = ""  # of that all-reduce
    troubles: dict[str, str] = field(default_factory=dict)


def to_json(findings: Findings) -> str:
    """As one JSON object."""
    return json.dumps(dataclasses.asdict(findings), indent=1)


def from_json(text: str | bytes) -> Findings:
    """What `to_json` wrote. Raises ValueError or TypeError for anything else."""
    content = json.loads(text)
    gpus = tuple(Gpu(**gpu) for gpu in content.pop("gpus"))
    return Findings(**{**content, "gpus": gpus, "marks_seen": tuple(content["marks_seen"])})


def leave(folder: Path, findings: Findings, name: str) -> None:
    """Writes a node's findings into a folder, made where it is missing; whole, or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.{findings.rank}"
    temporary.write_text(to_json(findings))
    temporary.rename(folder / f"{name}.json")


def read_all(folder: Path, oldest: float) -> list[Findings]:
    """What nodes have left in a folder since a moment, by its own clock, in the order of their ranks."""
    found = []
    for path in folder.glob("*.json"):
        try:
            if path.stat().st_mtime >= oldest:
                found.append(from_json(path.read_bytes()))
        except (OSError, ValueError, TypeError, KeyError):  # of another kind, or of another version
            continue
    return sorted(found, key=lambda each: each.rank)
