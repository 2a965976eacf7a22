"""Storage that fails under a real run: full, read-only, slow, or with files that vanish or cannot be read.

Steps go on, a metric tells, no good checkpoint gives way to a bad one, and once the storage is well again the run is
what it would have been without: the same losses, bit for bit, and a ledger that is proven.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.checkpoints.attempt import read_attempts
from cluster.records.goodput import goodput
from launch import runfolder
from launch.runfolder import read_lines
from tests.chaos.chaos import ROWS, command, loss_difference
from tests.chaos.disks import TMPFS, Island, compiled, fill, island
from tests.chaos.watched import Watched, Whole
from tests.chaos.world import ROOT, Zygote
from tests.launch.outside import done, nsi, refused
from tests.launch.test_training import environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux has these file systems"),
]

LONG = 1_000_000  # steps: such a run ends when it is told to
SHIM = Path(__file__).with_name("slow_disk.c")
SLOW_S = 0.2
EVENTS = "attempt-0001-rank-00000.jsonl"


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Island]:
    """A mount namespace to run in."""
    with island(tmp_path_factory.mktemp("island")) as made:
        if made is None:
            pytest.skip("no mount namespace is granted here, neither to root nor by a user namespace")
        yield made


@pytest.fixture(scope="module")
def whole(mother: Zygote, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(mother, shards, tmp_path_factory.mktemp("whole"))


def torn(run: Path) -> set[str]:
    """Files with a line that is none."""
    found = set()
    for path in [*run.glob("*.jsonl"), *run.glob("*/*.jsonl")]:
        *lines, rest = path.read_text().split("\n")
        if len(read_lines(path.parent, path.name)) < len(lines) or rest:
            found.add(str(path.relative_to(run)))
    return found


def check_proven(run: Path, whole: Whole) -> None:
    """Each step is in the ledger, in the log and in its attempt's events, with the loss that it must have."""
    steps = [line["step"] for line in runfolder.standing_lines(run, runfolder.METRICS)]
    assert steps == list(range(1, steps[-1] + 1))
    assert f"{steps[-1]} of {ROWS} samples, none missing, none twice" in done(nsi("audit", run))
    last = read_attempts(run / runfolder.ATTEMPTS)[-1]
    events = read_lines(run / runfolder.EVENTS, f"attempt-{last.number:04d}-rank-00000.jsonl")
    told = [event["step"] for event in events if event["kind"] == "steps"]
    assert told == steps[last.restored_step :]
    assert loss_difference(run, whole.upto(steps[-1])) == 0


@pytest.fixture
def start(shards: Path, tmp_path: Path) -> Iterator[Callable[..., Watched]]:
    """Starts runs, and ends those that are left."""
    begun: list[Watched] = []

    def begin(mother: Zygote, run: Path, seen: Path, steps: int = LONG) -> Watched:
        log = tmp_path / f"log-{len(begun)}"
        begun.append(Watched(mother, command(shards, run, 1, steps), seen, log))
        return begun[-1]

    yield begin
    for each in begun:
        each.ranks.kill()


def on_a_small_disk(apart: Island, start: Callable[..., Watched], tmp_path: Path) -> tuple[Path, Path, Watched]:
    """A run with its second checkpoint on a disk of 64 MB: the disk, where it is seen from outside, and the run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    apart.mount(disk, *TMPFS, "-o", "size=64m", "none")
    seen = apart.seen(disk)
    run = start(apart.mother, disk / "run", seen / "run")
    run.until(lambda: run.newest() >= 8)
    return disk, seen, run


def test_a_disk_that_is_full_for_a_while(
    apart: Island, start: Callable[..., Watched], whole: Whole, tmp_path: Path
) -> None:
    disk, seen, run = on_a_small_disk(apart, start, tmp_path)
    # A neighbour takes what there is, and what a checkpoint that failed gives back.
    run.go_on_in_trouble(meanwhile=lambda: fill(seen / "neighbour"))
    before = run.newest()
    (seen / "neighbour").unlink()
    run.until(lambda: run.newest() > before)
    assert run.stop() == 0
    check_proven(run.run, whole)
    assert torn(run.run) == set()
    assert not list(disk.iterdir())  # all of it was in there


def test_a_disk_that_is_full_to_the_end(
    apart: Island, start: Callable[..., Watched], whole: Whole, tmp_path: Path
) -> None:
    disk, seen, run = on_a_small_disk(apart, start, tmp_path)
    run.go_on_in_trouble(meanwhile=lambda: fill(seen / "neighbour"))
    before, step = run.good(), run.newest()
    run.ranks.send(0, signal.SIGTERM)
    assert run.status() == 1
    (line,) = run.said()
    assert line.startswith("nsi train: ")
    assert "No space left on device" in line
    assert "make room" in line
    assert run.good() == before
    # The same command can do nothing yet, and says so.
    again = start(apart.mother, disk / "run", seen / "run", step + 20)
    assert again.status() == 1
    line = again.said()[-1]
    assert "No space left on device" in line
    assert run.good() == before
    (seen / "neighbour").unlink()
    last = start(apart.mother, disk / "run", seen / "run", step + 20)
    assert last.status() == 0, last.ranks.said()
    attempts = read_attempts(last.run / runfolder.ATTEMPTS)
    assert attempts[-1].restored_step == step
    check_proven(last.run, whole)
    assert not [name for name in torn(last.run) if f"attempt-{attempts[-1].number:04d}" in name]


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("checkpoints", ("--bind",)),
        ("", ("--bind",)),  # files that are open already can still be written
        ("", ("-t", "overlay")),  # as other files, not even these
    ],
)
def test_read_only_for_a_while(
    apart: Island,
    start: Callable[..., Watched],
    whole: Whole,
    tmp_path: Path,
    what: str,
    how: tuple[str, ...],
) -> None:
    folder, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    run = start(apart.mother, folder, apart.seen(folder))
    run.until(lambda: run.newest() >= 8)
    if how == ("--bind",):
        # Made so beside it and then laid over it: between two steps in place the run could open a file to write.
        apart.mount(empty, "--bind", str(folder / what))
        apart.mount(empty, "-o", "remount,bind,ro")
        apart.mount(folder / what, "--bind", str(empty))
    else:
        apart.mount(folder / what, *how, "-o", f"ro,lowerdir={folder / what}:{empty}", "none")
    with pytest.raises(OSError, match="Read-only file system"):
        (run.run / what / "probe").touch()
    run.go_on_in_trouble()
    before = run.newest()
    apart.unmount(folder / what)
    run.until(lambda: run.newest() > before)
    assert run.stop() == 0
    check_proven(folder, whole)
    assert torn(folder) == set()


def test_read_only_from_the_start(apart: Island, start: Callable[..., Watched], tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    apart.mount(folder, *TMPFS, "-o", "ro", "none")
    run = start(apart.mother, folder / "run", apart.seen(folder) / "run")
    assert run.status() == 1
    (line,) = run.said()
    assert line.startswith("nsi train: ")
    assert "Read-only file system" in line
    assert not run.run.exists()


def test_a_slow_disk(shards: Path, whole: Whole, tmp_path: Path) -> None:
    """Every call that writes to the run takes a fifth of a second, and none of them is a step's."""
    shim = compiled(SHIM, tmp_path)
    if shim is None:
        pytest.skip("no C compiler")
    run, notes, steps = tmp_path / "run", tmp_path / "notes", 60
    slow = {"LD_PRELOAD": str(shim), "SLOW_BELOW": str(run), "SLOW_NOTES": str(notes)}
    started = [sys.executable, "-m", "launch", *command(shards, run, 1, steps)]
    found = subprocess.run(started, cwd=ROOT, env=environment(**slow), capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    check_proven(run, whole)
    assert torn(run) == set()
    calls = [line.split() for line in notes.read_text().splitlines()]
    # The thread that trains writes before its first step alone.
    own = {Path(path).relative_to(run).parts[0] for thread, _, path in calls if thread == "main"}
    assert own <= {"attempts", "running", "config.json.tmp", "prometheus"}
    # Nor does it wait for those who write, but at the end for the last checkpoint, and now and then for the best one.
    slowed = len(calls) * SLOW_S
    stepping = goodput(run / runfolder.EVENTS, read_attempts(run / runfolder.ATTEMPTS)).seconds["step"]
    saved = [event for event in read_lines(run / runfolder.EVENTS, EVENTS) if event["kind"] == "checkpoint"]
    handing_over = sum(event["t1"] - event["t0"] for event in saved)
    assert len(saved) >= steps / 4
    assert stepping < slowed / 4
    assert handing_over < slowed / 3


def test_files_that_vanish(mother: Zygote, start: Callable[..., Watched], whole: Whole, tmp_path: Path) -> None:
    folder, gone = tmp_path / "run", tmp_path / "gone"
    gone.mkdir()
    run = start(mother, folder, folder)
    run.until(lambda: run.newest() >= 8)
    names = (runfolder.METRICS, runfolder.VALIDATION, runfolder.EVENTS, runfolder.TENSORBOARD)
    before = run.newest()
    for name in (*names, f"checkpoints/step-{before:08d}"):
        (folder / name).rename(gone / Path(name).name)
    run.until(lambda: run.newest() > before and all((folder / name).exists() for name in names))
    before = run.newest()
    run.checkpoints.rename(gone / "checkpoints")
    run.until(lambda: run.newest() > before)
    assert run.stop() == 0
    assert torn(folder) == set()
    assert any(path.stat().st_size for path in (folder / runfolder.TENSORBOARD).iterdir())
    for name in (runfolder.METRICS, f"{runfolder.EVENTS}/{EVENTS}"):  # what did not vanish is all there
        (folder / name).write_text((gone / name).read_text() + (folder / name).read_text())
    check_proven(folder, whole)


def test_a_ledger_that_vanishes(mother: Zygote, start: Callable[..., Watched], whole: Whole, tmp_path: Path) -> None:
    """What it said is not proven, and the audit says so, until somebody finds it."""
    folder, gone = tmp_path / "run", tmp_path / "gone.jsonl"
    ledger = folder / runfolder.LEDGER / "attempt-0001.jsonl"
    run = start(mother, folder, folder)
    run.until(lambda: run.newest() >= 8)
    before = run.newest()
    ledger.rename(gone)
    run.until(lambda: run.newest() > before and ledger.exists())
    assert run.stop() == 0
    assert "step 0 (from 0) is not in the ledger" in refused(nsi("audit", folder))
    ledger.write_text(gone.read_text() + ledger.read_text())
    check_proven(folder, whole)


def test_attempts_that_cannot_be_read(
    mother: Zygote, start: Callable[..., Watched], whole: Whole, tmp_path: Path
) -> None:
    """Nobody knows then whether the run has been taken over: steps go on, but no checkpoint is completed."""
    folder = tmp_path / "run"
    run = start(mother, folder, folder)
    run.until(lambda: run.newest() >= 8)
    unreadable = folder / runfolder.ATTEMPTS / "attempt-0002.json"
    unreadable.mkdir()
    run.go_on_in_trouble()
    before = run.newest()
    unreadable.rmdir()
    run.until(lambda: run.newest() > before)
    assert run.stop() == 0
    check_proven(folder, whole)


@pytest.mark.parametrize("size", ["4k", "8k", "12k", "16k"])
def test_full_from_the_start(apart: Island, start: Callable[..., Watched], tmp_path: Path, size: str) -> None:
    """Whichever of the first files does not fit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    apart.mount(folder, *TMPFS, "-o", f"size={size}", "none")
    run = start(apart.mother, folder / "run", apart.seen(folder) / "run")
    assert run.status() == 1
    (line,) = run.said()
    assert line.startswith(f"nsi train: {folder / 'run'}")
    assert "No space left on device" in line


def test_what_cannot_be_tidied_up_at_the_end_is_no_failure(
    apart: Island, start: Callable[..., Watched], whole: Whole, tmp_path: Path
) -> None:
    folder, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    run = start(apart.mother, folder, apart.seen(folder))
    run.until(lambda: run.newest() >= 8)
    apart.mount(empty, "--bind", str(folder / "prometheus"))
    apart.mount(empty, "-o", "remount,bind,ro")
    apart.mount(folder / "prometheus", "--bind", str(empty))
    assert run.stop() == 0, run.said()
    check_proven(folder, whole)
