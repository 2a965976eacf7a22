"""A run that is killed again and again and goes on, and what became of it.

Every attempt has another world and ZeRO stage. What is found out holds for any moment of any fault: nothing here
waits for a state that a slower machine might not reach.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.checkpoints.attempt import read_attempts
from cluster.checkpoints.checkpoint import COMPLETE, newest_verified
from cluster.records.goodput import goodput
from cluster.records.ledger import read_ledger, standing_steps
from launch import runfolder
from launch.runfolder import read_lines, standing_lines
from tests.chaos.faults import CUT, FROZEN_S, STOPS, Fault, draw
from tests.chaos.world import RankProcesses, Zygote
from tests.launch.outside import nsi
from tests.launch.test_training import SMALL

ROWS = 10  # a step: no divisor of the 48 scenes, nor a multiple of three ranks
LIFE_S = 120.0  # no attempt takes so long to come to its fault, nor to end after it
LAUNCHER_S = 3.0  # after which a launcher ends the ranks that have not met yet
FLAGS = [
    *SMALL,
    *("--batch_size", str(ROWS), "--lr", "1e-5", "--schedule", "constant"),
    *("--checkpoint_every", "4", "--validate_every", "7"),
]


@dataclass
class Outcome:
    """What one fault did."""

    fault: Fault
    moment: str  # what the run was doing, as far as its folder tells
    struck: bool = True  # not where the run had ended before
    survived: bool = False  # a later attempt went on, from the newest checkpoint that verifies
    by_itself: bool = True  # the other ranks ended without a launcher
    samples_repeated: int = 0
    samples_lost: int = 0
    gone_s: float = 0.0  # from the fault until no rank is left
    saved_s: float | None = None  # from the fault to the next checkpoint of a later attempt, if there was one


@dataclass(frozen=True)
class Round:
    """What a run came to."""

    run: Path
    steps: int
    outcomes: list[Outcome]
    audit: str  # empty, or why it is not proven
    missing_steps: int
    left: int  # processes that outlived their attempt
    wrong_restores: tuple[str, ...]
    unaccounted_s: float  # wall time in no bucket of goodput, or in two


def command(shards: Path, run: Path, stage: int, steps: int) -> list[str]:
    """`nsi train`, as every attempt of a run is started."""
    where = ["--data_path", str(shards), "--log_path", str(run)]
    return ["train", *where, *FLAGS, "--zero_stage", str(stage), "--max_steps", str(steps)]


def torment(mother: Zygote, shards: Path, folder: Path, seed: int, kills: int) -> Round:
    """A run that goes through so many faults, and comes to its end a few steps after the last."""
    return torment_with(mother, shards, folder, [draw(each) for each in [random.Random(seed)] for _ in range(kills)])


def torment_with(mother: Zygote, shards: Path, folder: Path, faults: Sequence[Fault]) -> Round:
    """The same with faults of one's choice."""
    run = folder / "run"
    folder.mkdir()
    outcomes: list[Outcome] = []
    struck: list[tuple[float, int]] = []  # when, and how many attempts there were by then
    left, wrong = 0, []
    last = Fault("", 2, 0, 0, 0, 0.0)
    for number, fault in enumerate([*faults, last]):
        restorable = _restorable(run)
        end = max((line["step"] for line in read_lines(run, runfolder.METRICS)), default=0) + 6
        note = folder / f"cut-{number:03d}"
        cut = {"number": fault.cut, "below": str(run / fault.below), "note": str(note)} if fault.kind == CUT else None
        before = len(_attempt_files(run))
        ranks = RankProcesses(
            mother,
            fault.world,
            command(shards, run, fault.stage, end if fault is last else 1_000_000),
            folder / f"attempt-{number:03d}",
            {fault.rank: cut} if cut else {},
        )
        try:
            if fault is last:
                assert ranks.wait(LIFE_S), ranks.said()
            else:
                outcome = _strike(ranks, run, fault, before)
                struck.append((time.time() - outcome.gone_s, len(_attempt_files(run))))
                if note.exists():
                    outcome.moment = f"at {note.read_text()}"
                outcomes.append(outcome)
        finally:
            ranks.kill()
        left += len(_lasting(ranks))
        attempt = _newest_attempt(run, before)
        if fault is last:
            assert not any(ranks.statuses.values()), ranks.said()
        if attempt and attempt.restored_step != restorable:
            wrong.append(f"attempt {attempt.number} took {attempt.restored_step}, not {restorable}")
    steps = max(line["step"] for line in read_lines(run, runfolder.METRICS))
    audit = nsi("audit", run)
    missing = _missing(run, steps)
    _look_back(run, outcomes, struck, missing)
    why = audit.err if audit.status else ""
    return Round(run, steps, outcomes, why, missing, left, tuple(wrong), _unaccounted(run))


def loss_difference(run: Path, whole: Path) -> float:
    """The largest relative difference of a standing loss to the uninterrupted run's. A step logged once is enough:
    what a kill tore out of the log is void or in the ledger."""
    expected = {line["step"]: line["loss"] for line in standing_lines(whole, runfolder.METRICS)}
    lines = standing_lines(run, runfolder.METRICS)
    return max(abs(line["loss"] - expected[line["step"]]) / abs(expected[line["step"]]) for line in lines)


def uninterrupted(mother: Zygote, shards: Path, folder: Path, steps: int) -> Path:
    """The run that nobody disturbs."""
    folder.mkdir()
    ranks = RankProcesses(mother, 1, command(shards, folder / "run", 0, steps), folder / "log", {})
    assert ranks.wait(LIFE_S), ranks.said()
    assert ranks.statuses == {0: 0}, ranks.said()
    return folder / "run"


def _strike(ranks: RankProcesses, run: Path, fault: Fault, attempts_before: int) -> Outcome:
    """Waits for the fault's moment, lets it happen, and waits until nobody is left."""
    first = len(read_lines(run, runfolder.METRICS))
    if fault.kind == CUT:
        ranks.wait(LIFE_S, lambda: bool(ranks.statuses) or len(read_lines(run, runfolder.METRICS)) > first + 40)
    else:
        if fault.steps:
            ranks.wait(LIFE_S, lambda: len(read_lines(run, runfolder.METRICS)) >= first + fault.steps)
        ranks.wait(fault.delay_s)
    outcome = Outcome(fault, _moment(run, attempts_before, first))
    if fault.kind.startswith("SIGSTOP"):
        outcome.struck = ranks.send(fault.rank, signal.SIGSTOP)
        ranks.wait(FROZEN_S)
    began = time.monotonic()
    if fault.kind != CUT or not ranks.statuses:
        outcome.struck = ranks.send(fault.rank, fault.signal)
    has_met = len(_attempt_files(run)) > attempts_before
    gone = ranks.wait(LIFE_S if has_met or fault.kind in STOPS else LAUNCHER_S)
    if not gone and not has_met:
        # Ranks that still wait for one another know of no death: every launcher ends them when one fails.
        outcome.by_itself = False
        ranks.kill()
        gone = True
    assert gone, f"{fault}: ranks {set(range(ranks.size)) - set(ranks.statuses)} live on\n{ranks.said()}"
    outcome.gone_s = time.monotonic() - began
    return outcome


def _moment(run: Path, attempts_before: int, lines_before: int) -> str:
    """What a run is doing, as its folder tells."""
    if len(_attempt_files(run)) == attempts_before:
        return "start, before its attempt"
    checkpoints = run / runfolder.CHECKPOINTS
    if any(checkpoints.glob(".step-*.tmp")) or any(
        not (path / COMPLETE).exists() for path in checkpoints.glob("step-*")
    ):
        return "while a checkpoint is written"
    return "training" if len(read_lines(run, runfolder.METRICS)) > lines_before else "start, before its first step"


def _look_back(run: Path, outcomes: list[Outcome], struck: list[tuple[float, int]], missing: int) -> None:
    """Fills in what only later attempts tell."""
    attempts = read_attempts(run / runfolder.ATTEMPTS)
    done: dict[int, int] = {}
    for line in read_lines(run, runfolder.METRICS):
        done[line["attempt"]] = max(line["step"], done.get(line["attempt"], 0))
    saved = [
        (event["t1"], event["step"])
        for path in (run / runfolder.EVENTS).glob("*.jsonl")
        for event in read_lines(path.parent, path.name)
        if event["kind"] == "checkpoint"
    ]
    for outcome, (moment, count) in zip(outcomes, struck, strict=True):
        before = [each for each in attempts if each.number <= count]
        after = [each for each in attempts if each.number > count]
        outcome.survived = bool(after)
        if before and after:
            reached = max(done.get(before[-1].number, 0), before[-1].restored_step)
            outcome.samples_repeated = max(0, reached - after[0].restored_step) * ROWS
        if after:
            outcome.saved_s = min((t1 - moment for t1, _ in saved if t1 > after[0].started), default=None)
        outcome.samples_lost = missing * ROWS


def _unaccounted(run: Path) -> float:
    """Between the wall time and the sum of its buckets. A bucket below 0 would hide another that is too large."""
    found = goodput(run / runfolder.EVENTS, read_attempts(run / runfolder.ATTEMPTS))
    return abs(found.wall_s - sum(found.seconds.values())) + abs(min(0.0, *found.seconds.values()))


def _missing(run: Path, steps: int) -> int:
    """Steps that stand nowhere in the ledger, though the run is beyond them."""
    standing = standing_steps(read_ledger(run / runfolder.LEDGER), read_attempts(run / runfolder.ATTEMPTS))
    return len(set(range(steps)) - set(standing.steps_N.tolist()))


def _restorable(run: Path) -> int:
    """The step that the next attempt must go on from: that of the newest checkpoint all of whose bytes are right."""
    path = newest_verified(run / runfolder.CHECKPOINTS, lambda text: None)
    return json.loads((path / "state.json").read_text())["step"] if path else 0


def _attempt_files(run: Path) -> list[Path]:
    return sorted((run / runfolder.ATTEMPTS).glob("attempt-*.json"))


def _newest_attempt(run: Path, before: int):
    attempts = read_attempts(run / runfolder.ATTEMPTS)
    return attempts[-1] if attempts and attempts[-1].number > before else None


def _lasting(ranks: RankProcesses) -> list[int]:
    """Processes that are still there some seconds after their ranks."""
    end = time.monotonic() + 5.0
    while (left := ranks.left()) and time.monotonic() < end:
        time.sleep(0.05)
    return left
