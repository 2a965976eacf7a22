"""What a run goes on from: one choice for all ranks, nothing damaged taken, and no silent beginning anew."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from cluster.checkpoints.attempt import is_replaced, read_attempts, take_attempt
from cluster.checkpoints.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from cluster.checkpoints.folder import COMPLETE, STATE, checkpoint_path
from cluster.world import World
from launch.training.choose import Choice, choose, load_chosen, saved_since
from launch.training.prepare import begin, catch_up
from nsi.errors import UserError
from tests.launch.prepared import prepared
from tests.launch.test_resume import checkpointed, configured
from tests.making import make_shards


def edit(path: Path) -> None:
    """One byte of a file, somewhere in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def refused(shards: Path, run: Path, *more: object) -> str:
    """The one line that a start says before it ends."""
    with pytest.raises(UserError) as error:
        prepared(configured(shards, run, *more))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def run(shards: Path, tmp_path: Path) -> Path:
    """A run with checkpoints of steps 0 and 2."""
    first = read_checkpoint(checkpointed(shards, tmp_path / "run"))
    write_checkpoint(tmp_path / "run" / "checkpoints", Checkpoint(2, 1, first.training, first.facts))
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "complete.json"])
def test_an_edited_byte_falls_back_to_the_one_before(
    shards: Path, run: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    newest = checkpoint_path(run / "checkpoints", 2)
    edit(newest / name)
    parts = prepared(configured(shards, run))
    assert parts.restored is not None
    assert parts.restored.step == 0
    said = capsys.readouterr().err
    assert said.startswith(f"nsi train: passed over a checkpoint: {newest}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "complete.json"])
def test_nothing_begins_anew_where_all_is_damaged(shards: Path, run: Path, name: str) -> None:
    for step in (0, 2):
        edit(checkpoint_path(run / "checkpoints", step) / name)
    before = sorted(run.rglob("*"))
    said = refused(shards, run)
    assert "have been damaged (step-00000000, step-00000002)" in said
    assert said.endswith("or remove the folder to begin at step 0")
    assert sorted(run.rglob("*")) == before
    shutil.rmtree(run / "checkpoints")
    assert prepared(configured(shards, run)).restored is None


def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    shards: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert choose(configured(shards, tmp_path / "none")) == Choice(None)
    shutil.rmtree(checkpoint_path(run / "checkpoints", 0))
    (checkpoint_path(run / "checkpoints", 2) / COMPLETE).unlink()  # killed just before it
    assert choose(configured(shards, run)) == Choice(None)
    assert "step-00000002: not complete" in capsys.readouterr().err
    shutil.rmtree(checkpoint_path(run / "checkpoints", 2))
    assert choose(configured(shards, run)) == Choice(None)


def test_a_newer_format(shards: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = read_checkpoint(checkpoint_path(run / "checkpoints", 2))
    monkeypatch.setattr("cluster.checkpoints.checkpoint.FORMAT", 2)
    write_checkpoint(run / "checkpoints", Checkpoint(4, 1, checkpoint.training, checkpoint.facts))
    monkeypatch.undo()
    assert refused(shards, run).endswith("format 2, but this version reads 1; upgrade the program")


def test_only_the_rank_that_chooses_reads_every_byte(shards: Path, run: Path) -> None:
    choice = choose(configured(shards, run))
    assert (choice.step, choice.attempt) == (2, 1)
    path = checkpoint_path(run / "checkpoints", 2) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the last number: who hashed the file would see it
    path.write_bytes(data)
    found = load_chosen(run, choice)
    assert found is not None
    assert found.step == 2


def test_a_later_write_changes_no_choice(shards: Path, run: Path) -> None:
    choice = choose(configured(shards, run))
    found = read_checkpoint(checkpoint_path(run / "checkpoints", 2))
    write_checkpoint(run / "checkpoints", Checkpoint(4, 1, found.training, found.facts))
    loaded = load_chosen(run, choice)
    assert loaded is not None
    assert loaded.step == 2


def test_a_node_that_sees_another_folder_says_so(shards: Path, run: Path, tmp_path: Path) -> None:
    choice = choose(configured(shards, run))
    for other in ("empty", "older"):
        shutil.copytree(run, tmp_path / other)
    shutil.rmtree(tmp_path / "empty" / "checkpoints")
    state = checkpoint_path(tmp_path / "older" / "checkpoints", 2) / STATE
    state.write_text(json.dumps({**json.loads(state.read_text()), "attempt": 7}))
    for other in ("empty", "older"):
        with pytest.raises(UserError, match="is not the same folder on node .*step-00000002 of attempt 1") as error:
            load_chosen(tmp_path / other, choice)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="it holds checkpoints here and none there"):
        load_chosen(run, Choice(None))
    assert load_chosen(tmp_path / "empty", Choice(None)) is None


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--batch_size", 6), "--batch_size was 12, is 6: a run keeps these"),
        (("--num_slots", 5), "--num_slots was 4, is 5: a run keeps these"),
        (("--patch_size", 16), "--patch_size was 8, is 16: a run keeps these"),
    ],
)
def test_a_run_of_another_batch_or_model(shards: Path, run: Path, more: tuple[object, ...], line: str) -> None:
    assert line in refused(shards, run, *more)


def test_a_run_of_another_data_set_or_schema(shards: Path, run: Path, scenes: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    paths = sorted(copy.rglob("CLEVRTEX*.json"))
    victim = json.loads(paths[0].read_text())["objects"][0]["material"]
    shutil.rmtree(paths[-1].parent)
    make_shards(copy, tmp_path / "fewer")
    assert "was trained on other shards than" in refused(tmp_path / "fewer", run)
    for path in paths[:-1]:
        if f'"{victim}"' in path.read_text():
            shutil.rmtree(path.parent)
    make_shards(copy, tmp_path / "poorer")
    assert "was trained on another schema" in refused(tmp_path / "poorer", run)


def test_what_was_saved_while_a_start_prepared_is_not_undone(shards: Path, run: Path) -> None:
    """By an attempt that is alive still, on a node that was cut off, say: it ends, and the start goes on from there."""
    config = configured(shards, run)
    alone = World(0, 1, 0, 1, "127.0.0.1", 0, "none")
    first = take_attempt(run / "attempts", 1, "none", 0)
    choice, parts = choose(config), prepared(config)
    assert choice.step == 2
    found = read_checkpoint(checkpoint_path(run / "checkpoints", 2))
    write_checkpoint(run / "checkpoints", Checkpoint(4, 1, found.training, found.facts))
    attempt = begin(config, alone, parts, choice, time.time())
    assert attempt is not None
    assert (attempt.number, attempt.restored_step) == (2, 4)  # so that step 4 is not void
    assert is_replaced(run / "attempts", first)
    again = choose(config)
    assert again.step == 4
    assert saved_since(run, again) is None
    assert catch_up(config, alone, prepared(config), attempt) == attempt
    assert [each.restored_step for each in read_attempts(run / "attempts")] == [0, 4]


def test_checkpoints_of_another_folder_are_older(shards: Path, run: Path) -> None:
    """They were copied without their attempts, whose numbers must not come again: they would be a newer attempt's."""
    found = read_checkpoint(checkpoint_path(run / "checkpoints", 2))
    write_checkpoint(run / "checkpoints", Checkpoint(4, 5, found.training, found.facts))
    config = configured(shards, run)
    alone = World(0, 1, 0, 1, "127.0.0.1", 0, "none")
    numbers = []
    for _ in range(2):
        attempt = begin(config, alone, prepared(config), choose(config), time.time())
        assert attempt is not None
        numbers.append(attempt.number)
    assert numbers == [6, 7]


def test_a_state_that_could_not_be_read_for_a_moment_is_not_a_later_checkpoint(shards: Path, run: Path) -> None:
    """Its attempt was not known at the choice, and is afterwards."""
    config, state = configured(shards, run), checkpoint_path(run / "checkpoints", 0) / STATE
    whole = state.read_bytes()
    state.write_bytes(b"")
    choice = choose(config)
    state.write_bytes(whole)
    assert choice.step == 2
    assert saved_since(run, choice) is None
