"""The ledger: what was written is read, what was damaged is named, what was done anew is void."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.checkpoints.attempt import Attempt, is_superseded
from cluster.records.appender import Appender
from cluster.records.ledger import Damage, LedgerWriter, Skipped, first_gap, lost_steps, read_ledger, standing_steps
from nsi.errors import UserError

SKIPPED = Skipped(90, 3, "train-000001.tar", "scene_3", 'the JSON said {"first_step": 1} and "more"\nß')


def write(folder: Path, attempt: int, first: int, *counts: int) -> Path:
    """A flush of each count, from step `first` on; a step's digest is the step. Returns the file."""
    appender = Appender()
    writer = LedgerWriter(folder, attempt, 8, appender)
    for count in counts:
        writer.write(first, range(first, first + count))
        first += count
    appender.close()
    return folder / f"attempt-{attempt:04d}.jsonl"


def attempts(*restored: int) -> list[Attempt]:
    return [Attempt(number, 0.0, 1, "none", step) for number, step in enumerate(restored, 1)]


def spans(folder: Path) -> list[tuple[int, int]]:
    return [(entry.first_step, entry.stop_step) for entry in read_ledger(folder).entries]


def gap(folder: Path, restored: list[Attempt], told: int = 0) -> tuple[int, str] | None:
    ledger = read_ledger(folder)
    return first_gap(ledger, standing_steps(ledger, restored), lost_steps(ledger, restored), told)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    appender = Appender()
    writer = LedgerWriter(tmp_path / "ledger", 3, 8, appender)
    writer.write(10, [0, 2**64 - 1, 5], [SKIPPED])
    writer.sync()
    writer.write(13, [])
    writer.write(13, [-1, 2**64 + 7])  # sums of int64 that wrapped around
    appender.close()
    one, two = read_ledger(tmp_path / "ledger").entries
    assert (one.attempt, one.line, one.first_step, one.stop_step, one.batch_size) == (3, 1, 10, 13, 8)
    assert one.digests_K.tolist() == [0, 2**64 - 1, 5]
    assert one.skipped == (SKIPPED,)
    assert (two.line, two.first_step, two.digests_K.tolist(), two.skipped) == (2, 13, [2**64 - 1, 7], ())
    assert two.where == "ledger/attempt-0003.jsonl line 2"


def test_the_line_is_frozen(tmp_path: Path) -> None:
    """Ledgers outlive versions: other programs read these lines."""
    appender = Appender()
    writer = LedgerWriter(tmp_path, 1, 8, appender)
    writer.write(40, [1, 2**63], [SKIPPED])
    appender.close()
    (line,) = (tmp_path / "attempt-0001.jsonl").read_text().splitlines()
    said, check = line.split(', "check": ')
    assert check == f'"{xxhash.xxh3_64_hexdigest(said.encode())}"}}'
    assert json.loads(line) == {
        "first_step": 40,
        "steps": 2,
        "batch_size": 8,
        "digests": "00000000000000018000000000000000",
        "skipped": [vars(SKIPPED)],
        "check": "dc5117e4b273d622",
    }


def test_attempts_come_in_order(tmp_path: Path) -> None:
    for attempt in (10000, 9999, 2):
        write(tmp_path, attempt, attempt, 1)
    (tmp_path / "attempt-notes.txt").write_text("mine")
    assert [entry.attempt for entry in read_ledger(tmp_path).entries] == [2, 9999, 10000]


def test_no_ledger_is_an_empty_one(tmp_path: Path) -> None:
    found = read_ledger(tmp_path / "ledger")
    assert (found.entries, found.damages) == ((), ())
    assert len(standing_steps(found, []).steps_N) == 0


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, 1, 0, 2, 2, 2)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for at in range(len(lines[0]), len(lines[0]) + len(lines[1]) - 1):
        for bit in (1, 32):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            found = read_ledger(tmp_path)
            assert spans(tmp_path) == [(0, 2), (4, 6)]
            assert found.damages[0] == Damage(path, 2, 1, 2, torn=False)
            missing = gap(tmp_path, attempts(0))
            assert missing == (2, f"is not in the ledger; {tmp_path.name}/attempt-0001.jsonl line 2 is damaged")


def test_a_file_cut_anywhere_keeps_its_whole_lines(tmp_path: Path) -> None:
    path = write(tmp_path, 1, 0, 2, 2, 2)
    whole = path.read_bytes()
    ends = [at for at, byte in enumerate(whole) if byte == ord("\n")]
    for at in range(len(whole)):
        path.write_bytes(whole[:at])
        found = read_ledger(tmp_path)
        complete = sum(at >= end for end in ends)  # the newline may be missing
        assert spans(tmp_path) == [(0, 2), (2, 4), (4, 6)][:complete]
        at_an_edge = at == 0 or at in ends or at - 1 in ends
        step = 2 * complete or None
        torn = [] if at_an_edge else [Damage(path, complete + 1, 1, step, torn=True)]
        assert list(found.damages) == torn
        assert gap(tmp_path, attempts(0)) is None  # what a kill leaves is no fault...
        lacks = gap(tmp_path, attempts(0), told=6)  # ...unless the steps are known to have been done
        assert lacks is None if complete == 3 else lacks is not None and lacks[0] == 2 * complete


def test_a_torn_line_does_not_hide_what_is_glued_to_it(tmp_path: Path) -> None:
    path = write(tmp_path, 1, 0, 2, 2)
    first, second = path.read_bytes().splitlines()
    for cut in range(1, len(first)):
        path.write_bytes(first + b"\n" + second[:cut] + second + b"\n" + first[:cut] + first)
        assert spans(tmp_path) == [(0, 2), (2, 4), (0, 2)]
        assert [(damage.line, damage.step, damage.torn) for damage in read_ledger(tmp_path).damages] == [
            (2, 2, False),
            (3, 4, True),
        ]


def test_entries_without_a_newline_between_them(tmp_path: Path) -> None:
    path = write(tmp_path, 1, 0, 2, 2)
    path.write_bytes(path.read_bytes().replace(b"\n", b""))
    assert spans(tmp_path) == [(0, 2), (2, 4)]
    assert not read_ledger(tmp_path).damages


def test_an_end_of_zeros_is_torn(tmp_path: Path) -> None:
    """What a file system may leave where the power went."""
    path = write(tmp_path, 1, 0, 2)
    path.write_bytes(path.read_bytes() + bytes(4096))
    assert read_ledger(tmp_path).damages == (Damage(path, 2, 1, 2, torn=True),)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which says that the disk is full")
def test_a_full_disk_holds_the_ledger_back_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "attempt-0001.jsonl"
    path.symlink_to("/dev/full")
    appender = Appender(retry_s=0.01)
    writer = LedgerWriter(tmp_path, 1, 8, appender)
    writer.write(0, [1])
    with pytest.raises(OSError, match="No space left on device"):
        writer.sync()
    path.unlink()  # room again
    writer.write(1, [2])
    assert appender.close() == 0
    assert [entry.first_step for entry in read_ledger(tmp_path).entries] == [0, 1]
    (trouble,) = appender.troubles()
    assert trouble == f"{path}: cannot be written (No space left on device); its lines wait in memory"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "attempt-0001.jsonl").mkdir()
    with pytest.raises(UserError, match="attempt-0001.jsonl: cannot be read"):
        read_ledger(tmp_path)


def test_what_a_successor_did_anew_is_void(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, 4, 4)
    write(tmp_path, 2, 6, 3)  # went on from 6
    ledger = read_ledger(tmp_path)
    standing = standing_steps(ledger, attempts(0, 6))
    assert standing.steps_N.tolist() == list(range(9))
    assert standing.digests_N.tolist() == list(range(9))
    assert standing.entries_N.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert standing.steps_N.dtype == np.int64
    assert standing.digests_N.dtype == np.uint64
    assert gap(tmp_path, attempts(0, 6)) is None
    assert gap(tmp_path, attempts(0, 6), told=10) == (9, "is not in the ledger")


def test_a_skipped_row_is_void_with_its_step(tmp_path: Path) -> None:
    for attempt, first, skips in ((1, 0, (0, 1, 2)), (2, 1, (2,))):  # step 1 could be read in the end
        appender = Appender()
        writer = LedgerWriter(tmp_path, attempt, 8, appender)
        writer.write(first, range(first, 3), [Skipped(8 * step + 7, step, "", "", str(attempt)) for step in skips])
        appender.close()
    standing = standing_steps(read_ledger(tmp_path), attempts(0, 1))
    assert [(row.position, row.fault) for row in standing.skipped] == [(7, "1"), (23, "2")]


@given(
    history=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=5),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_a_step_stands_unless_it_is_superseded(
    history: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    tried = attempts(*(restored for restored, _ in history))
    for attempt, (restored, count) in zip(tried, history, strict=True):
        write(folder, attempt.number, restored, (count + 1) // 2, count // 2)
    expected = sorted(
        (step, attempt.number)
        for attempt, (restored, count) in zip(tried, history, strict=True)
        for step in range(restored, restored + count)
        if not is_superseded(step + 1, attempt.number, tried)  # with it, step + 1 steps were done
    )
    ledger = read_ledger(folder)
    standing = standing_steps(ledger, tried)
    found = [ledger.entries[place].attempt for place in standing.entries_N]
    assert list(zip(standing.steps_N.tolist(), found, strict=True)) == expected


def test_the_first_gap_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1, 1, 2)
    assert gap(tmp_path, attempts(0)) == (0, "is not in the ledger")
    write(tmp_path, 1, 0, 1)
    assert gap(tmp_path, attempts(0)) is None
    write(tmp_path, 1, 4, 2)
    assert gap(tmp_path, attempts(0)) == (3, "is not in the ledger")
    write(tmp_path, 1, 2, 2)  # step 2 again, and step 3
    file = f"{tmp_path.name}/attempt-0001.jsonl"
    assert gap(tmp_path, attempts(0)) == (2, f"is in the ledger twice ({file} line 1 and {file} line 4)")


def test_damage_is_a_fault_only_where_steps_are_lost(tmp_path: Path) -> None:
    first, second = write(tmp_path, 1, 0, 2, 2, 2), write(tmp_path, 2, 4, 2, 2)
    for path, line, found in (
        (first, 3, None),  # its steps were done anew
        (first, 2, 2),
        (second, 1, 4),  # nothing readable before it: it began where the attempt did
        (second, 2, 6),  # the last line, but whole: a kill does not leave that
    ):
        whole = path.read_bytes()
        lines = whole.splitlines(keepends=True)
        lines[line - 1] = lines[line - 1].replace(b"steps", b"stops")
        path.write_bytes(b"".join(lines))
        where = f"is not in the ledger; {tmp_path.name}/{path.name} line {line} is damaged"
        assert gap(tmp_path, attempts(0, 4)) == (None if found is None else (found, where))
        path.write_bytes(whole)


def test_damage_beyond_what_a_successor_has_done_so_far(tmp_path: Path) -> None:
    path = write(tmp_path, 1, 0, 2, 2, 2)
    path.write_bytes(path.read_bytes()[:-5] + b"\n")
    write(tmp_path, 2, 1, 1)
    assert gap(tmp_path, attempts(0, 1)) is None  # the damaged entry's steps 4 and 5 are void
    assert gap(tmp_path, attempts(0, 2)) is not None
