"""A real run, killed twice and gone on with in other worlds, is proven as one; one changed digest is named."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cluster.checkpoints.attempt import read_attempts
from cluster.checkpoints.checkpoint import COMPLETE
from cluster.records.appender import Appender
from cluster.records.ledger import Entry, LedgerWriter, read_ledger
from launch.runfolder import read_lines
from tests.launch.outside import done, nsi, refused
from tests.launch.test_training import BIN, ROOT, SMALL, call, environment

ROWS = 10  # a step: no divisor of the 48 scenes, nor a multiple of three ranks


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux tells whose children processes are")
def test_a_run_that_was_killed_twice(shards: Path, tmp_path: Path) -> None:
    """Two ranks are killed, one is killed, three come to the end: all is proven. Then ledgers are tampered with."""
    run = tmp_path / "run"
    train_and_kill(shards, run, 2)
    last = train_and_kill(shards, run, 1)
    found = call(*command(shards, run, 3, "--max_steps", str(last + 7)))
    assert found.returncode == 0, found.stderr
    check_proof(run, last + 7)
    for attempt in (1, 2, 3):
        for change in (change_a_digit, forge_a_digest):
            copy = tmp_path / f"{change.__name__}-{attempt}"
            shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
            named = change(standing_entry(copy, attempt))
            assert named in refused(nsi("audit", copy))


def command(shards: Path, run: Path, world: int, *more: str) -> list[str]:
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(world), "launch/train.py"]
    start = [sys.executable, "-m", "launch", "train"] if world == 1 else torchrun
    flags = ["--batch_size", str(ROWS), "--checkpoint_every", "10", "--validate_every", "100000"]
    flags += ["--schedule", "constant", *more]
    return [*start, "--data_path", str(shards), "--log_path", str(run), *SMALL, *flags]


def train_and_kill(shards: Path, run: Path, world: int) -> int:
    """Kills all of a world some steps after a checkpoint of its own. Returns how many steps it did."""
    attempt = len(list((run / "attempts").glob("*.json"))) + 1
    before = {path.name for path in (run / "checkpoints").glob("step-*")}
    process = subprocess.Popen(
        command(shards, run, world, "--max_steps", "100000"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def is_beyond_a_checkpoint() -> bool:
        saved = [int(path.parent.name[5:]) for path in (run / "checkpoints").glob(f"step-*/{COMPLETE}")]
        new = [step for step in saved if f"step-{step:08d}" not in before]
        return bool(new) and steps_of(run, attempt) > max(new) + 2

    limit = time.monotonic() + 120
    try:
        while not is_beyond_a_checkpoint():
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.01)
    finally:
        kill(family(process.pid))
        process.wait()
    return steps_of(run, attempt)


def steps_of(run: Path, attempt: int) -> int:
    """The last step that an attempt logged."""
    return max((line["step"] for line in read_lines(run, "metrics.jsonl") if line["attempt"] == attempt), default=0)


def family(process: int) -> list[int]:
    """A process and all that it started: torchrun puts its ranks into sessions of their own."""
    children = []
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            children += [int(child) for child in path.read_text().split()]
    return [process, *(each for child in children for each in family(child))]


def kill(processes: list[int]) -> None:
    """Kills some processes, and returns when they are dead."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    for process in processes:
        while is_alive(process):
            time.sleep(0.005)


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return False
    return state not in "ZX"


def check_proof(run: Path, steps: int) -> None:
    attempts, ledger = read_attempts(run / "attempts"), read_ledger(run / "ledger")
    assert [attempt.world_size for attempt in attempts] == [2, 1, 3]
    assert 0 == attempts[0].restored_step < attempts[1].restored_step < attempts[2].restored_step
    recorded = sum(len(entry.digests_K) for entry in ledger.entries)
    whole, begun = divmod(steps * ROWS, 48)
    *proof, time_spent = done(nsi("audit", run)).splitlines()
    assert time_spent.startswith("  time  ")
    assert proof == [
        f"{run}: proven: every sample was read exactly once an epoch",
        f"  steps     {steps} of {ROWS} samples, none missing, none twice",
        f"  epochs    {whole} whole ones of 48 samples, and {begun} samples of the next",
        f"  samples   {steps * ROWS} read, 0 skipped",
        "  attempts  3, on 2, 1, 3 ranks",
        f"  replayed  {recorded - steps} steps, which later attempts did anew",
    ]


def standing_entry(run: Path, attempt: int) -> Entry:
    """The entry of the step that an attempt did first, which no later one did anew."""
    restored = read_attempts(run / "attempts")[attempt - 1].restored_step
    (entry,) = [
        entry
        for entry in read_ledger(run / "ledger").entries
        if entry.attempt == attempt and entry.first_step <= restored < entry.stop_step
    ]
    return entry


def change_a_digit(entry: Entry) -> str:
    """Changes one digit of a step's digest. Returns what an audit must say."""
    lines = entry.path.read_text().splitlines(keepends=True)
    digests = json.loads(lines[entry.line - 1])["digests"]
    lines[entry.line - 1] = lines[entry.line - 1].replace(digests, f"{int(digests[0], 16) ^ 1:x}{digests[1:]}")
    entry.path.write_text("".join(lines))
    return f"step {entry.first_step} (from 0) is not in the ledger; {entry.where} is damaged"


def forge_a_digest(entry: Entry) -> str:
    """Writes another digest as the program itself writes it, check value and all."""
    with tempfile.TemporaryDirectory() as folder:
        appender = Appender()
        writer = LedgerWriter(Path(folder), 1, ROWS, appender)
        writer.write(entry.first_step, [int(entry.digests_K[0]) ^ 1, *map(int, entry.digests_K[1:])])
        appender.close()
        lines = entry.path.read_bytes().splitlines(keepends=True)
        lines[entry.line - 1] = (Path(folder) / "attempt-0001.jsonl").read_bytes()
    entry.path.write_bytes(b"".join(lines))
    return f"step {entry.first_step} (from 0) did not read the samples that the order gives ({entry.where})"
