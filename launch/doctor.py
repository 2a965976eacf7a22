"""`nsi doctor`: whether these nodes can run a job, before it begins, and by name which cannot."""

from __future__ import annotations

import faulthandler
import math
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.nodes import checks as node_checks
from cluster.nodes.diagnosis import bad_nodes, diagnose, roster, silent, status
from cluster.nodes.exchange import listen
from cluster.nodes.findings import Findings, leave, read_all
from cluster.nodes.within import within
from cluster.world import World, find_world, hosts
from launch import hub, runfolder
from launch.doctor_text import to_lines
from nsi.errors import UsageError, UserError
from shards.manifest import MANIFEST, parse_manifest
from shards.reading.storage import Retries, open_storage

# In the report, for a batch script, which does not trust the status that it gets by way of srun.
BAD_NODES = "bad-nodes"  # the names, a line each, where the status is 3
HOPELESS = "hopeless"  # there where it is 1
LEAST_SECONDS = 5.0
# Shares of --seconds, by which torch is imported, all have come, all has been measured, all know the outcome.
IMPORTED_BY, COME_BY, END_BY, LAST = 0.55, 0.6, 0.9, 0.98
_MARK_WAIT_S = 2.0  # for a file system that shows new files late


@dataclass(frozen=True)
class DoctorConfig:
    """Check the nodes of a job before it begins: start it with one process on each node, or alone on one machine.

    Ends with 0 where all is well, with 3 where nodes are bad and the others are not (REPORT/bad-nodes names them), with
    1 where the job would fail on any nodes.
    """

    data_path: str | None = None
    """Folder of shards, as in `nsi train`: its manifest must be readable, and the same, on all nodes."""
    log_path: Path | None = None
    """Run folder, as in `nsi train`: all nodes must see and write the same one. It is made where it is missing."""
    backbone_weights: Path | None = None
    """The weights of the ViT, as in `nsi train`: must be readable on all nodes."""
    backbone: str | None = None
    """The ViT, as in `nsi train`: without --backbone_weights, its weights must lie in each node's cache of the hub, or
    the hub must answer there."""
    recipe: str | None = None
    """As in `nsi train`, for the --backbone that it sets where none is given."""
    scratch: Path | None = None
    """Folder on each node's own disk, which must be writable and not full."""
    gpus: int | None = None
    """GPUs that each node must have, free; without it as many as the Slurm job has on the node, which may be none."""
    report: Path | None = None
    """Folder for what was found, NODE.json; without it RUN/doctor/JOB-RESTART in a Slurm job that has a --log_path,
    else nothing is kept."""
    seconds: float = 60.0
    """After so long it ends, whatever hangs; a node that has not come in three fifths of it is bad."""


def run(config: DoctorConfig) -> None:
    """Prints the diagnosis on rank 0. Raises SystemExit(3) for bad nodes, SystemExit(1) for a job that cannot run."""
    start = time.monotonic()
    _check(config)
    # Where even a thread's limit does not help (a driver that keeps Python's lock), the process ends by this.
    faulthandler.dump_traceback_later(config.seconds, exit=True, file=2)
    try:
        found = _examine(config, find_world(os.environ), start)
    finally:
        faulthandler.cancel_dump_traceback_later()
    if found:
        raise SystemExit(found)


def _check(config: DoctorConfig) -> None:
    if config.gpus is not None and config.gpus < 0:
        raise UsageError(f"--gpus {config.gpus}: must be at least 0")
    if not (math.isfinite(config.seconds) and config.seconds >= LEAST_SECONDS):
        raise UsageError(f"--seconds {config.seconds}: must be at least {LEAST_SECONDS:.0f}")


def _examine(config: DoctorConfig, world: World, start: float) -> int:
    """The exit status; on rank 0 the diagnosis is printed."""
    # torch tells every lost connection with a page of C++; what matters of it is in our own line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    report = _report_folder(config, os.environ)
    mine = Findings(node_checks.node_name(os.environ), world.rank)
    report = _leave(report, mine, world, config.seconds)
    mine = _look_here(config, world, mine, start + config.seconds * IMPORTED_BY)
    door = listen(mine.address)
    mine = replace(mine, port=door.getsockname()[1], checked=True)
    report = _leave(report, mine, world, config.seconds)
    try:
        if world.size == 1:
            return _conclude(config, world, report, [mine], [])
        return _together(config, world, report, mine, door, start)
    finally:
        if config.log_path and mine.mark:
            mark = config.log_path / runfolder.DOCTOR / mine.mark
            within(2.0, {"mark": lambda: mark.unlink(missing_ok=True)})


def _look_here(config: DoctorConfig, world: World, mine: Findings, until: float) -> Findings:
    """What this node finds by itself; torch, which may take long from a shared folder, is awaited until a moment."""
    works: dict[str, Callable[[], dict[str, Any]]] = {
        "interface": lambda: _interface(world),
        "versions": lambda: {
            "python": platform.python_version(),
            "packages": node_checks.package_versions(),
            "gpus_asked": node_checks.gpus_asked(config.gpus, os.environ),
        },
    }
    data, weights, run_folder, scratch = config.data_path, config.backbone_weights, config.log_path, config.scratch
    if data is not None:
        works["data"] = lambda: _data(data)
    if weights:
        works["weights"] = lambda: {"weights_bytes": node_checks.file_bytes(weights)}
    if run_folder:
        works["log_path"] = lambda: {"mark": node_checks.leave_mark(run_folder / runfolder.DOCTOR)}
    if scratch:
        works["scratch"] = lambda: {"scratch_free": node_checks.scratch_free(scratch)}
    done, troubles = within(min(15.0, config.seconds / 4), works)
    mine = replace(mine, **{name: fact for facts in done.values() for name, fact in facts.items()})
    if mine.address:
        _, unknown = within(5.0, {"interface": lambda: node_checks.check_host_name(mine.interface, mine.address)})
        troubles |= unknown
    # In a thread as well: the environment may lie in the very folder that does not answer.
    built, more = within(until - time.monotonic(), {"versions": node_checks.torch_build})
    if built:
        version, cuda = built["versions"]
        mine = replace(mine, packages={**mine.packages, "torch": version}, cuda=cuda)
        # By then timm must have been imported as well, from the folder that torch came from.
        done, more = within(max(config.seconds / 6, until - time.monotonic()), _with_torch(config))
        mine = replace(mine, **{name: fact for facts in done.values() for name, fact in facts.items()})
        if not mine.gpus_asked:
            more.pop("gpus", None)
    return replace(mine, driver=node_checks.has_driver(), troubles={**troubles, **more})


def _with_torch(config: DoctorConfig) -> dict[str, Callable[[], dict[str, Any]]]:
    """What needs torch to be found out."""
    works: dict[str, Callable[[], dict[str, Any]]] = {"gpus": lambda: {"gpus": node_checks.gpus()}}
    if not config.backbone_weights and (config.backbone or config.recipe):
        works["weights"] = lambda: {"weights_bytes": hub.weights_bytes(_backbone(config))}
    return works


def _backbone(config: DoctorConfig) -> str:
    """The ViT that training would take, given the same flags."""
    from launch.recipes import starting_point  # needs torch

    return config.backbone or starting_point(["--recipe", config.recipe or ""]).backbone.backbone


def _data(data_path: str) -> dict[str, Any]:
    storage = open_storage(data_path, Retries(limit=2, timeout_s=5.0))
    manifest = parse_manifest(storage.read(MANIFEST), storage.where(MANIFEST))
    size = sum(int(table.bytes_S.sum()) for table in manifest.splits.values())
    return {"data": manifest.fingerprint, "data_bytes": size}


def _interface(world: World) -> dict[str, Any]:
    name, address = node_checks.interface_towards(world.master_addr, world.master_port)
    return {"interface": name, "address": address} if world.size > 1 else {}


def _together(
    config: DoctorConfig, world: World, report: Path | None, mine: Findings, door: socket.socket, start: float
) -> int:
    """Meets the others, measures with them, and on rank 0 judges. Where rank 0 is not to be met, the files tell."""
    # Each moment comes a little later for those that wait for rank 0 than for itself.
    come_by = start + config.seconds * (COME_BY + 0.15 if world.rank else COME_BY)
    end_by = start + config.seconds * (LAST if world.rank else END_BY)
    met = False
    try:
        if "versions" in mine.troubles:
            raise UserError(mine.troubles["versions"])
        from cluster.nodes import meeting  # needs torch

        opened, troubles = within(come_by - time.monotonic() + 3, {"store": lambda: meeting.open_store(world, come_by)})
        if troubles:
            raise UserError(troubles["store"])
        store = opened["store"]
        go = meeting.come(store, world, mine, come_by, end_by)
        met = True
        mine = meeting.measure(store, world, go, mine, door, lambda marks: _look(config, marks))
        _leave(report, mine, world, config.seconds)
        if world.rank:
            return meeting.be_told(store, world, end_by)
        came = meeting.hear(store, go, end_by)
        left = _read(report, world, mine, config.seconds) if report and len(came) < world.size else []
        found = _conclude(config, world, report, came, left)
        meeting.tell(store, go, found, start + config.seconds * LAST)
        return found
    except (RuntimeError, OSError, UserError) as error:  # torch's own errors of lost connections are RuntimeErrors
        if report is None or (world.rank == 0 and "versions" not in mine.troubles):
            raise
        return _by_files(config, world, report, mine, met, error)


def _look(config: DoctorConfig, marks: Sequence[str]) -> tuple[bool, ...]:
    """Which of the marks this node sees in the run's folder."""
    if not config.log_path:
        return ()
    paths = [config.log_path / runfolder.DOCTOR / mark for mark in marks]
    end = time.monotonic() + _MARK_WAIT_S
    while not all(path.exists() for path in paths) and time.monotonic() < end:
        time.sleep(0.2)
    return tuple(path.exists() for path in paths)


def _by_files(config: DoctorConfig, world: World, report: Path, mine: Findings, met: bool, error: Exception) -> int:
    """Without rank 0: the first of the others that has checked itself judges by what all have left in the report.

    Raises UserError on the others, and on all where rank 0 seems to be well.
    """
    left = _read(report, world, mine, config.seconds)
    checked = [each for each in left if each.checked]
    judge = next((each for each in checked if each.rank or not met), mine)
    if judge.rank != world.rank:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"node {mine.node} cannot meet the others: {why}; what node {judge.node} says tells more")
    return _conclude(config, world, report, [each if each.rank or not met else silent(each) for each in checked], left)


def _conclude(
    config: DoctorConfig, world: World, report: Path | None, came: Sequence[Findings], left: Sequence[Findings]
) -> int:
    """Prints and writes the diagnosis; returns the status. `left`: what is in the files of those that did not come."""
    names = hosts(os.environ.get("SLURM_STEP_NODELIST", "")) if world.launcher == "srun" else []
    names = names if len(names) == world.size else []  # several processes a node, or one on some of them
    problems = diagnose(findings := roster(names, world.size, came, left), f"{world.master_addr}:{world.master_port}")
    for line in to_lines(findings, problems, _places(config)):
        print(line)
    sys.stdout.flush()
    if report and (found := status(problems)):
        mark = report / (BAD_NODES if found == 3 else HOPELESS)
        text = "".join(f"{node}\n" for node in bad_nodes(problems)) if found == 3 else ""
        _, troubles = within(5.0, {"write": lambda: mark.write_text(text)})
        for trouble in troubles.values():
            print(f"nsi doctor: {mark}: cannot be written ({trouble})", file=sys.stderr)
    return status(problems)


def _places(config: DoctorConfig) -> dict[str, str]:
    """What was looked at, by check."""
    asked = {
        "data": config.data_path,
        "weights": config.backbone_weights or config.backbone or (config.recipe and f"of --recipe {config.recipe}"),
        "log_path": config.log_path,
        "scratch": config.scratch,
    }
    return {check: str(place) for check, place in asked.items() if place is not None}


def _report_folder(config: DoctorConfig, env: Mapping[str, str]) -> Path | None:
    job = env.get("SLURM_JOB_ID")
    if config.report or not config.log_path or not job:
        return config.report
    return config.log_path / runfolder.DOCTOR / f"{job}-{env.get('SLURM_RESTART_COUNT', '0')}"


def _file_name(world: World, node: str) -> str:
    return f"{node}-{world.rank}" if world.local_rank else node


def _leave(report: Path | None, mine: Findings, world: World, seconds: float) -> Path | None:
    """Leaves the findings in the report. Returns it, or None where it cannot be had: nobody waits for it twice."""
    if report is None:
        return None
    name = _file_name(world, mine.node)
    _, troubles = within(seconds / 10, {"leave": lambda: leave(report, mine, name)})
    return None if troubles else report


def _read(report: Path, world: World, mine: Findings, seconds: float) -> list[Findings]:
    """What the nodes left there. An older meeting's files are passed over, by the folder's own clock."""

    def read() -> list[Findings]:
        own = report / f"{_file_name(world, mine.node)}.json"
        return read_all(report, own.stat().st_mtime - seconds)

    found, _ = within(seconds / 10, {"read": read})
    return found.get("read", [mine])
