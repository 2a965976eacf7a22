"""`nsi train --backbone_trainable` end to end: from a frozen run's weights, cut and continued elsewhere, evaluated."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from cluster.checkpoint import newest_verified, read_checkpoint
from cluster.training_state import TrainingState
from launch.build import make_backbone
from launch.prepare import Parts, prepare
from launch.runfolder import read_lines
from nsi.backbone import parameters_hash
from nsi.errors import UserError
from nsi.finetuned import BACKBONE
from tests.launch.test_resume import checkpointed, configured
from tests.launch.test_training import BIN, call, losses, train

VIT, FLAG = "test_vit", "--backbone_trainable"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags of a ViT whose weights, drawn at random, are in a file."""
    import timm

    path = tmp_path_factory.mktemp("weights") / "vit.pt"
    torch.manual_seed(0)
    torch.save(timm.create_model(VIT, img_size=32, num_classes=0).state_dict(), path)
    return "--backbone", VIT, "--backbone_weights", str(path)


def state_of(run: Path) -> TrainingState:
    newest = newest_verified(run / "checkpoints", pytest.fail)
    assert newest is not None
    return read_checkpoint(newest).training


@pytest.mark.slow
def test_a_backbone_is_trained_continued_elsewhere_and_evaluated(
    shards: Path, vit: tuple[str, ...], tmp_path: Path
) -> None:
    """Four steps of two ranks at stage 3, a checkpoint every second; then one process at stage 1 goes on to six."""
    flags = (*vit, FLAG, "--backbone_lr", "1e-3")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    found = train(shards, whole, *flags, "--schedule", "constant", "--zero_stage", "0", "--micro_batch_size", "5")
    assert found.returncode == 0, found.stderr
    two = (str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2")
    on = (*flags, "--schedule", "constant")
    found = train(shards, cut, *on, "--zero_stage", "3", "--max_steps", "4", launcher=two)
    assert found.returncode == 0, found.stdout + found.stderr
    found = train(shards, cut, *on, "--zero_stage", "1")
    assert found.returncode == 0, found.stderr
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-4)
    assert {(line["zero_stage"], line["world_size"]) for line in read_lines(cut, "metrics.jsonl")} == {(3, 2), (1, 1)}

    config = configured(shards, cut, *flags)
    initial = make_backbone(config.backbone, config.data.image_size)
    said = json.loads((cut / "config.json").read_text())
    assert said["backbone"]["hash"] == parameters_hash(initial)  # that of the weights it began with
    kept = state_of(cut).parameters
    assert not any(name.startswith("target.") for name in kept)
    assert said["parameters"] == sum(tensor.numel() for tensor in kept.values())
    for name, tensor in initial.named_parameters():
        assert not torch.equal(kept[BACKBONE + name], tensor), name

    found = call(sys.executable, "-m", "launch", "eval", str(cut), "--split", "val", "--checkpoint", "last")
    assert found.returncode == 0, found.stderr
    measured = json.loads((cut / "eval-val.json").read_text())
    last = read_lines(cut, "validation.jsonl")[-1]
    # The validation of the trained weights: with those of the beginning, slots would be others.
    assert measured["step"] == last["step"] == 6
    both = [measured["retrieval"][way]["R@1"] for way in ("schema_to_image", "image_to_schema")]
    assert sum(both) / 2 == pytest.approx(last["R@1"])


def parts_of(shards: Path, folder: Path, *more: object) -> Parts:
    return prepare(configured(shards, folder, *more), True, True)


def test_a_frozen_runs_weights_start_a_trained_backbone(
    shards: Path, vit: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    frozen = checkpointed(shards, tmp_path / "frozen", *vit, "--seed", 5)
    start = read_checkpoint(frozen).training.parameters
    parts = parts_of(shards, tmp_path / "new", *vit, FLAG, "--checkpoint_path", frozen)
    assert capsys.readouterr().err == ""
    initial = make_backbone(configured(shards, tmp_path, *vit).backbone, 32)
    for name, parameter in parts.model.named_parameters():
        own = name.removeprefix(BACKBONE).removeprefix("target.")
        assert torch.equal(parameter, start[name] if own == name else initial.get_parameter(own)), name

    trained = checkpointed(shards, tmp_path / "trained", *vit, FLAG)
    parts_of(shards, tmp_path / "again", *vit, FLAG, "--checkpoint_path", trained)
    assert capsys.readouterr().err == ""
    parts_of(shards, tmp_path / "back", *vit, "--checkpoint_path", trained)
    assert "the backbone that it trained is left out" in capsys.readouterr().err


def test_a_run_keeps_to_training_its_backbone_or_not(shards: Path, vit: tuple[str, ...], tmp_path: Path) -> None:
    checkpointed(shards, tmp_path / "run", *vit)
    with pytest.raises(UserError, match="--backbone_trainable was False, is True"):
        parts_of(shards, tmp_path / "run", *vit, FLAG)
    with pytest.raises(UserError, match="--backbone_lr was 1e-05, is 0.1"):
        parts_of(shards, tmp_path / "run", *vit, "--backbone_lr", 0.1)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "--backbone_trainable: the backbone 'dct' has no weights to train"),
        (("--backbone", VIT, "--features", "F"), "--backbone_trainable: needs images"),
        (("--backbone", VIT, "--backbone_lr", "0"), "--backbone_lr 0.0: must be above 0"),
    ],
)
def test_what_cannot_be(tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    from launch.config import check

    with pytest.raises(UserError, match=said):
        check(configured(tmp_path, tmp_path / "run", FLAG, *more))
