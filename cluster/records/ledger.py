"""The ledger: what each step really read, a line a flush, written by rank 0 of every attempt.

    RUN/ledger/attempt-0001.jsonl
        {"first_step": 40, "steps": 2, "batch_size": 128, "digests": "0f3a...", "skipped": [...], "check": "91c2..."}

Steps are counted from 0: step s read the batch s of the order, so `first_step` is how many steps were done before.
`digests` has 16 hexadecimal digits a step (see shards/coverage.py). `check` is the xxh3-64 of the line before it, so
that a damaged line is noticed; what a killed write left is told apart from what follows it.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from cluster.checkpoints.attempt import Attempt, is_superseded
from cluster.records.appender import Appender
from nsi.errors import UserError

_WRAP = (1 << 64) - 1
_DIGITS = 16  # of a digest
_NAME = re.compile(r"attempt-(\d+)\.jsonl")
_ENTRY_START = re.compile(rb'(?=\{"first_step": )')  # cannot stand inside a JSON string, whose quotes are escaped
_ENTRY = re.compile(rb'(\{"first_step": .*), "check": "([0-9a-f]{16})"\}')


@dataclass(frozen=True)
class Skipped:
    """A row of a batch that was not read, and why: `sample` is its place in the split."""

    position: int  # step * G + row
    sample: int
    shard: str
    key: str
    fault: str


@dataclass(frozen=True, eq=False)
class Entry:
    """What one line says of the steps [first_step, first_step + K)."""

    path: Path
    line: int  # from 1
    attempt: int
    first_step: int
    batch_size: int
    digests_K: np.ndarray  # uint64
    skipped: tuple[Skipped, ...]

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return _where(self.path, self.line)

    @property
    def stop_step(self) -> int:
        """The step after the last."""
        return self.first_step + len(self.digests_K)


@dataclass(frozen=True)
class Damage:
    """A piece of a ledger that is no entry."""

    path: Path
    line: int  # from 1
    attempt: int
    step: int | None  # where the readable entry before it in its file ends; None where there is none
    torn: bool  # the unfinished end of a file: what a killed write leaves

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return _where(self.path, self.line)


@dataclass(frozen=True)
class Ledger:
    """All that a run's attempts wrote down, in the order of attempts and lines."""

    entries: tuple[Entry, ...]
    damages: tuple[Damage, ...]


@dataclass(frozen=True, eq=False)
class Standing:
    """What no later attempt made void: N steps, sorted, and the rows among them that were not read."""

    steps_N: np.ndarray  # int64
    digests_N: np.ndarray  # uint64
    entries_N: np.ndarray  # int64, places in the ledger's entries
    skipped: tuple[Skipped, ...]  # by position


class LedgerWriter:
    """The ledger of one attempt."""

    def __init__(self, folder: Path, attempt: int, batch_size: int, appender: Appender) -> None:
        self._path = folder / f"attempt-{attempt:04d}.jsonl"
        self._batch_size, self._appender = batch_size, appender
        appender.append(self._path, b"")  # a file says that there was a ledger, be it empty

    def write(self, first_step: int, digests: Sequence[int], skipped: Sequence[Skipped] = ()) -> None:
        """Appends what the steps first_step, first_step + 1, ... read; nothing where there are no digests.

        A digest may be any integer that is right modulo 2^64: a sum of int64 that wrapped around, say.
        """
        if digests:
            self._appender.append(self._path, _line(first_step, self._batch_size, digests, skipped))

    def sync(self) -> None:
        """Returns when all that was written lies on disk: before a checkpoint is committed, so that none outruns it.

        Raises OSError where it cannot.
        """
        self._appender.sync(self._path)


def read_ledger(folder: Path) -> Ledger:
    """All entries of a run, and what is damaged, be it torn, glued to what follows it, or changed.

    A folder that is not there gives an empty ledger. Raises UserError where a file cannot be read.
    """
    entries: list[Entry] = []
    damages: list[Damage] = []
    named = [(int(match[1]), path) for path in folder.glob("attempt-*") if (match := _NAME.fullmatch(path.name))]
    for attempt, path in sorted(named):
        step = None
        for line, piece, torn in _pieces(path):
            entry = _parse(piece, path, line, attempt)
            if entry is None:
                damages.append(Damage(path, line, attempt, step, torn))
            else:
                entries.append(entry)
                step = entry.stop_step
    return Ledger(tuple(entries), tuple(damages))


def standing_steps(ledger: Ledger, attempts: list[Attempt]) -> Standing:
    """The steps of a ledger that no later attempt did anew."""
    kept = [_kept_steps(entry, attempts) for entry in ledger.entries]
    steps = np.concatenate([np.empty(0, np.int64), *(np.arange(steps.start, steps.stop) for steps in kept)])
    digests = [entry.digests_K[: len(steps)] for entry, steps in zip(ledger.entries, kept, strict=True)]
    skipped = {
        each.position: each
        for entry, steps in zip(ledger.entries, kept, strict=True)
        for each in entry.skipped
        if each.position // entry.batch_size in steps
    }
    by_step = np.argsort(steps, kind="stable")
    return Standing(
        steps[by_step],
        np.concatenate([np.empty(0, np.uint64), *digests])[by_step],
        np.repeat(np.arange(len(kept)), [len(steps) for steps in kept])[by_step],
        tuple(skipped[position] for position in sorted(skipped)),
    )


def lost_steps(ledger: Ledger, attempts: list[Attempt]) -> list[tuple[int, Damage]]:
    """Each damaged piece that may have had standing steps, and the first step that it must have had."""
    restored = {attempt.number: attempt.restored_step for attempt in attempts}
    begins = [
        (restored.get(damage.attempt, 0) if damage.step is None else damage.step, damage) for damage in ledger.damages
    ]
    return [(step, damage) for step, damage in begins if not _is_void(step, damage.attempt, attempts)]


def first_gap(
    ledger: Ledger, standing: Standing, lost: Sequence[tuple[int, Damage]], told: int
) -> tuple[int, str] | None:
    """The first step from 0 on that does not stand exactly once, and in words why.

    `lost` is what `lost_steps` finds. `told` is how many steps the run's other records say were done; a damaged entry,
    unless a kill tore it, says so too of the step that it began with.
    """
    steps_N = standing.steps_N
    off = np.flatnonzero(steps_N != np.arange(len(steps_N)))
    place = int(off[0]) if len(off) else len(steps_N)
    if place < len(steps_N) and steps_N[place] < place:
        one, other = (ledger.entries[standing.entries_N[each]] for each in (place - 1, place))
        return place - 1, f"is in the ledger twice ({one.where} and {other.where})"
    if place == len(steps_N) and place >= max([told, *(step + 1 for step, damage in lost if not damage.torn)]):
        return None
    damaged = [f"; {damage.where} is {'torn' if damage.torn else 'damaged'}" for step, damage in lost if step == place]
    return place, "is not in the ledger" + "".join(damaged[:1])


def _kept_steps(entry: Entry, attempts: list[Attempt]) -> range:
    """The steps of an entry that are not void. Where one is, so are all later ones of the same attempt."""
    steps = range(entry.first_step, entry.stop_step)
    return steps[: bisect.bisect_left(steps, True, key=lambda step: _is_void(step, entry.attempt, attempts))]


def _is_void(step: int, attempt: int, attempts: list[Attempt]) -> bool:
    """Whether a later attempt did this step, counted from 0, anew. It is the one that made step + 1 steps done."""
    return is_superseded(step + 1, attempt, attempts)


def _line(first_step: int, batch_size: int, digests: Sequence[int], skipped: Sequence[Skipped]) -> bytes:
    content = {
        "first_step": first_step,
        "steps": len(digests),
        "batch_size": batch_size,
        "digests": "".join(f"{digest & _WRAP:0{_DIGITS}x}" for digest in digests),
        "skipped": [asdict(each) for each in skipped],
    }
    said = json.dumps(content)[:-1].encode()
    return said + f', "check": "{xxhash.xxh3_64_hexdigest(said)}"}}\n'.encode()


def _pieces(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """What may be an entry each: line number, bytes, and whether it is the unfinished end of the file."""
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    for number, line in enumerate([*lines, rest], 1):
        for piece in _ENTRY_START.split(line):
            if piece:
                yield number, piece, number > len(lines)


def _parse(piece: bytes, path: Path, line: int, attempt: int) -> Entry | None:
    match = _ENTRY.fullmatch(piece)
    if match is None or xxhash.xxh3_64_hexdigest(match[1]).encode() != match[2]:
        return None
    content = json.loads(match[1] + b"}")
    digests_K = np.frombuffer(bytes.fromhex(content["digests"]), ">u8").astype(np.uint64)
    skipped = tuple(Skipped(**each) for each in content["skipped"])
    return Entry(path, line, attempt, content["first_step"], content["batch_size"], digests_K, skipped)


def _where(path: Path, line: int) -> str:
    return f"{path.parent.name}/{path.name} line {line}"
