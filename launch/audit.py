"""`nsi audit RUN`: proves from the ledger that every sample was read exactly once an epoch, or names what is off first.

What an attempt wrote of steps that a successor did anew is void. The rest must have each step once, from the first to
the last that the run tells of; each step's digest must be the one that the order, the shards' index and the skipped
rows give; and in the order itself each sample must come once an epoch. Steps are counted from 0, as in the ledger.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from cluster.checkpoints.attempt import Attempt, is_superseded, read_attempts
from cluster.records.goodput import goodput
from cluster.records.ledger import Ledger, Standing, first_gap, lost_steps, read_ledger, standing_steps
from launch import runfolder
from launch.progress import progress
from nsi.errors import UserError
from shards.coverage import first_fault, split_digests
from shards.order import Order
from shards.reading.dataset import Split, open_split


@dataclass(frozen=True)
class AuditConfig:
    """Prove from a run's ledger that it read every sample exactly once an epoch, over all its restarts."""

    run: tyro.conf.Positional[Path]
    """Run folder, written by `nsi train`."""
    data_path: str | None = None
    """Where the shards it was trained on are, as `nsi train` takes it; without it where they were then."""


class _Recorded(NamedTuple):
    """What a run's config.json says of its data."""

    data_path: str
    fingerprint: str
    seed: int
    batch_size: int


def run(config: AuditConfig) -> None:
    """Prints what is proven. Raises UserError with the first step that is off and what is wrong with it."""
    recorded = _read_config(config.run)
    split = _open_data(config, recorded)
    attempts = read_attempts(config.run / runfolder.ATTEMPTS)
    told = _steps_told(config.run, attempts)  # before the ledger, which may grow meanwhile
    ledger = _read_ledger(config.run, attempts)
    order = Order(split.shard_samples, recorded.seed, recorded.batch_size)
    standing, lost = standing_steps(ledger, attempts), lost_steps(ledger, attempts)
    gap = first_gap(ledger, standing, lost, told)
    steps = gap[0] if gap else len(standing.steps_N)
    fault = _first_fault(order, split, ledger, standing, steps) or gap
    if fault:
        raise UserError(
            f"{config.run}: step {fault[0]} (from 0) {fault[1]}; no later step is proven: restore the ledger, "
            f"or remove the checkpoints of more than {fault[0]} steps and train on"
        )
    if not steps:
        raise UserError(f"{config.run}: its ledger has no step yet; audit it when it has trained")
    print("\n".join(_summary(config.run, order, ledger, standing, attempts)))
    for step, damage in lost:
        if step == steps:
            print(f"  torn      {damage.where}: a kill cut it off, so nothing is known of the steps from {step} on")


def _read_config(run: Path) -> _Recorded:
    path = run / runfolder.CONFIG
    try:
        content = json.loads(path.read_text())
        data, optim = content["data"], content["config"]["optim"]
        return _Recorded(data["path"], data["fingerprint"], optim["seed"], optim["batch_size"])
    except FileNotFoundError:
        raise UserError(f"{run}: no run (it has no {path.name}); give the --log_path of `nsi train`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error!r}); restore it") from None


def _open_data(config: AuditConfig, recorded: _Recorded) -> Split:
    """The train split, if it is the one that the run was trained on."""
    place = config.data_path or recorded.data_path
    split = open_split(place, "train")
    if split.manifest.fingerprint != recorded.fingerprint:
        raise UserError(
            f"{place}: its fingerprint is {split.manifest.fingerprint[:12]}, but {config.run} was trained on shards "
            f"with {recorded.fingerprint[:12]}; give these with --data_path"
        )
    return split


def _read_ledger(run: Path, attempts: list[Attempt]) -> Ledger:
    folder = run / runfolder.LEDGER
    if not folder.is_dir():
        raise UserError(f"{folder}: missing, so nothing is proven; restore it, or train with a version that keeps one")
    ledger = read_ledger(folder)
    unknown = {each.attempt for each in (*ledger.entries, *ledger.damages)} - {each.number for each in attempts}
    if unknown:
        raise UserError(
            f"{run / runfolder.ATTEMPTS}: attempt {min(unknown)} is missing or damaged, but the ledger has its steps; "
            "restore its file, which says what it went on from"
        )
    return ledger


def _steps_told(run: Path, attempts: list[Attempt]) -> int:
    """How many steps were done, as the other files tell: logged ones, the mark of a stop, what attempts went on from.

    Each is written after the ledger has these steps.
    """
    told = [line["step"] for line in runfolder.standing_lines(run, runfolder.METRICS)]
    told += [each.restored_step for each in attempts if not is_superseded(each.restored_step, each.number, attempts)]
    stopped = run / runfolder.STOPPED
    if stopped.is_file() and (text := stopped.read_text().strip()).isdecimal():
        told.append(int(text))
    return max(told, default=0)


def _first_fault(order: Order, split: Split, ledger: Ledger, standing: Standing, steps: int) -> tuple[int, str] | None:
    """The first of so many steps that did not read what it should have, with the entry that says so."""
    with progress("auditing", steps, unit="steps") as report:
        fault = first_fault(
            order,
            _digests(split),
            standing.digests_N[:steps],
            np.array([each.position for each in standing.skipped], np.int64),
            np.array([each.sample for each in standing.skipped], np.int64),
            report,
        )
    if fault is None:
        return None
    step, what = fault
    entry = ledger.entries[standing.entries_N[step]]
    if entry.batch_size != order.batch_size:
        what = f"was done with a batch of {entry.batch_size}, not of {order.batch_size}"
    return step, f"{what} ({entry.where})"


def _digests(split: Split) -> np.ndarray:
    """What every sample of a split leaves when it is read: (n,) uint64."""
    return np.concatenate(
        [split_digests(index["key"], index["image"]["xxh3"], index["json"]["xxh3"]) for index in split.indexes()]
    )


def _summary(run: Path, order: Order, ledger: Ledger, standing: Standing, attempts: list[Attempt]) -> list[str]:
    steps, recorded = len(standing.steps_N), sum(len(entry.digests_K) for entry in ledger.entries)
    rows = steps * order.batch_size
    epochs, begun = divmod(rows, order.samples)
    worlds = ", ".join(str(attempt.world_size) for attempt in attempts)
    but = f", but for {len(standing.skipped)} that were skipped" if standing.skipped else ""
    lines = [
        f"{run}: proven: every sample was read exactly once an epoch{but}",
        f"  steps     {steps} of {order.batch_size} samples, none missing, none twice",
        f"  epochs    {epochs} whole ones of {order.samples} samples, and {begun} samples of the next",
        f"  samples   {rows - len(standing.skipped)} read, {len(standing.skipped)} skipped",
        f"  attempts  {len(attempts)}, on {worlds} ranks",
        f"  replayed  {recorded - steps} steps, which later attempts did anew",
    ]
    spent = goodput(run / runfolder.EVENTS, attempts)
    parts = [f"{bucket} {seconds:.1f}" for bucket, seconds in spent.seconds.items() if seconds >= 0.05]
    if parts:
        lines.append(f"  time      {spent.wall_s:.1f} s: {', '.join(parts)}")
    lines += [
        f"  skipped   step {each.position // order.batch_size}, sample {each.sample}: {each.fault}"
        for each in standing.skipped
    ]
    return lines
