"""`nsi train --backbone_trainable` from first to last: trained, cut and gone on with elsewhere, evaluated, refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from cluster.checkpoints.checkpoint import read_checkpoint
from launch import cli
from launch.config import TrainConfig, check, from_json
from launch.runfolder import read_lines
from launch.train import parse
from launch.training.build import make_backbone, make_model
from nsi.backbone import parameters_hash
from nsi.errors import UsageError
from nsi.finetuned import BACKBONE, FinetunedInterpreter
from shards.reading.dataset import open_split
from tests.launch.test_resume import checkpointed, started
from tests.launch.test_training import BIN, call, losses, one_line, train

TORCHRUN = (str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags of a small ViT whose weights lie in a file."""
    import timm

    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "vit.pt"
    torch.save(timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=32).state_dict(), path)
    return "--backbone", "test_vit", "--backbone_weights", str(path)


@pytest.fixture(scope="module")
def trainable(vit: tuple[str, ...]) -> tuple[str, ...]:
    return (*vit, "--backbone_trainable", "--backbone_lr", "1e-4", "--weight_decay", "0.01")


@pytest.fixture(scope="module")
def whole(shards: Path, trainable: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process from its beginning to its end."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    found = train(shards, run, *trainable)
    assert found.returncode == 0, found.stderr
    return run


def test_checkpoints_hold_the_trained_backbone_alone(whole: Path, vit: tuple[str, ...]) -> None:
    checkpoint = read_checkpoint(whole / "checkpoints" / "step-00000006")
    config = from_json(TrainConfig, checkpoint.facts["config"])
    backbone = make_backbone(config.backbone, config.data.image_size)
    assert checkpoint.facts["backbone_hash"] == parameters_hash(backbone)  # of the weights that it began with
    assert not any(name.startswith("target.") for name in checkpoint.training.parameters)
    begun = {f"{BACKBONE}{name}": parameter for name, parameter in backbone.named_parameters()}
    for name, began in begun.items():
        change = (checkpoint.training.parameters[name] - began).abs().max().item()
        assert 0 < change < 6 * 1.1e-4, name  # Adam's steps are of the learning rate's size: the backbone's own
    others = {name for name in checkpoint.training.parameters if name not in begun}
    assert others
    recorded = json.loads((whole / "config.json").read_text())
    assert recorded["parameters"] == sum(tensor.numel() for tensor in checkpoint.training.parameters.values())
    assert recorded["backbone"]["feature_dim"] == 64


def test_it_begins_as_with_the_frozen_backbone_and_then_parts(
    shards: Path, whole: Path, vit: tuple[str, ...], tmp_path: Path
) -> None:
    found = train(shards, tmp_path / "run", *vit, "--weight_decay", "0.01")
    assert found.returncode == 0, found.stderr
    frozen, trained = losses(tmp_path / "run"), losses(whole)
    assert trained[0] == pytest.approx(frozen[0], rel=1e-6)
    assert abs(trained[-1] / frozen[-1] - 1) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param("0", marks=pytest.mark.long), "3"])
def test_another_world_and_stage_go_on(
    shards: Path, whole: Path, trainable: tuple[str, ...], tmp_path: Path, stage: str
) -> None:
    """Three steps alone at stage 1, three on two ranks in micro-batches; as all six alone."""
    run, course = tmp_path / "run", ("--schedule", "constant")
    found = train(shards, run, *trainable, *course, "--max_steps", "3")
    assert found.returncode == 0, found.stderr
    more = ("--zero_stage", stage, "--micro_batch_size", "4")
    found = train(shards, run, *trainable, *course, *more, launcher=TORCHRUN)
    assert found.returncode == 0, found.stdout + found.stderr
    assert [line["world_size"] for line in read_lines(run, "metrics.jsonl")] == [1, 1, 1, 2, 2, 2]
    other = tmp_path / "other"
    assert train(shards, other, *trainable, *course).returncode == 0
    assert losses(run) == pytest.approx(losses(other), rel=1e-4)
    ours, theirs = (read_lines(each, "validation.jsonl")[-1] for each in (run, other))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_evaluation_has_the_trained_backbone(shards: Path, whole: Path) -> None:
    """The figures of training's own last validation, and a report."""
    for verb in (["eval", str(whole), "--split", "val", "--checkpoint", "6"], ["report", str(whole)]):
        found = call(sys.executable, "-m", "launch", *verb)
        assert found.returncode == 0, found.stderr
    figures = json.loads((whole / "eval-val.json").read_text())["retrieval"]
    last = read_lines(whole, "validation.jsonl")[-1]
    assert figures["schema_to_image"]["R@5"] == pytest.approx(last["schema_to_image_R@5"])
    assert figures["image_to_schema"]["R@5"] == pytest.approx(last["image_to_schema_R@5"])


def test_a_run_keeps_its_way_of_training(
    shards: Path, whole: Path, vit: tuple[str, ...], trainable: tuple[str, ...]
) -> None:
    decay = ("--weight_decay", "0.01", "--backbone_lr", "1e-4")
    assert "--backbone_trainable was True, is False: a run keeps these" in one_line(train(shards, whole, *vit, *decay))
    said = one_line(train(shards, whole, *trainable, "--backbone_lr", "2e-4"))
    assert "--backbone_lr was 0.0001, is 0.0002: a run keeps these" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--backbone dct", "--backbone_trainable: the backbone 'dct' has no weights to train; give --backbone a ViT"),
        ("--features STORE", "--backbone_trainable: needs images, a feature store has none"),
        ("--backbone_lr 0", "--backbone_lr 0.0: must be above 0"),
        ("--backbone_lr nan", "--backbone_lr nan: must be a finite number"),
    ],
)
def test_refused(given: str, said: str) -> None:
    config = parse(["--data_path", "D", "--log_path", "L", "--backbone_trainable", *given.split()])
    with pytest.raises(UsageError) as error:
        check(config)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_its_features_cannot_be_stored(
    shards: Path, vit: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.run(["features", str(shards), str(tmp_path / "store"), *vit, "--backbone_trainable"]) == 2
    assert "only a frozen backbone's features can be stored" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_it_starts_from_a_frozen_runs_weights_in_silence(
    shards: Path, vit: tuple[str, ...], trainable: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    start = checkpointed(shards, tmp_path / "frozen", *vit)
    given = read_checkpoint(start).training.parameters
    parts = started(shards, tmp_path, start, *trainable, "--seed", "3")
    assert isinstance(parts.model, FinetunedInterpreter)
    for name, parameter in parts.model.named_parameters():
        inner = name.removeprefix(BACKBONE).removeprefix("target.")
        expected = given[name] if name in given else parts.model.target.get_parameter(inner)
        assert torch.equal(parameter, expected), name
    assert capsys.readouterr().err == ""


def test_a_frozen_run_leaves_a_trained_backbone_out_and_says_so(
    shards: Path, vit: tuple[str, ...], trainable: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    start = checkpointed(shards, tmp_path / "trained", *trainable)
    parts = started(shards, tmp_path, start, *vit)
    given = read_checkpoint(start).training.parameters
    assert all(torch.equal(parameter, given[name]) for name, parameter in parts.model.named_parameters())
    said = capsys.readouterr().err
    assert "the backbone that it trained is left out, the frozen one stands in its place" in said
    assert said.count("\n") == 1


def test_the_seed_decides_the_same_weights_with_either_backbone(
    shards: Path, vit: tuple[str, ...], trainable: tuple[str, ...], tmp_path: Path
) -> None:
    vocabulary, models = open_split(str(shards), "train").manifest.vocabulary, []
    for flags in (vit, trainable):
        config = parse(["--data_path", str(shards), "--log_path", str(tmp_path), "--image_size", "32", *flags])
        models.append(make_model(config, vocabulary, make_backbone(config.backbone, 32)))
    frozen, trained = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(parameter, trained[name]) for name, parameter in frozen.items())
