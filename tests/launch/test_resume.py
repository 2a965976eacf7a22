"""Weights that start a fresh run: what their shapes do not show is told, and what would change them is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cluster.checkpoints.checkpoint import Checkpoint, write_checkpoint
from cluster.engine.state import MOMENTS, TrainingState
from launch.config import BackboneConfig, TrainConfig
from launch.train import parse
from launch.training.build import make_backbone
from launch.training.prepare import Parts
from launch.training.resume import Progress, checkpoint_facts
from launch.training.schedule import Plateau
from nsi.errors import UserError
from tests.launch.prepared import prepared
from tests.launch.test_training import SMALL


def configured(shards: Path, run: Path, *more: object) -> TrainConfig:
    return parse([str(each) for each in ("--data_path", shards, "--log_path", run, *SMALL, *more)])


def started(shards: Path, folder: Path, start: Path, *more: object) -> Parts:
    """A fresh run made of another one's weights, up to its first step."""
    return prepared(configured(shards, folder / "new", "--checkpoint_path", start, *more))


def checkpointed(shards: Path, folder: Path, *more: object) -> Path:
    """A checkpoint of a run's beginning, as training writes it."""
    config = configured(shards, folder, *more)
    parts = prepared(config)
    parameters = {name: value.detach() for name, value in parts.model.named_parameters() if value.requires_grad}
    moments = {moment: {name: torch.zeros_like(value) for name, value in parameters.items()} for moment in MOMENTS}
    manifest, now = parts.train.manifest, Progress(0, Plateau(), {})
    facts = checkpoint_facts(config, manifest.fingerprint, manifest.vocabulary, parts.backbone_hash, now)
    return write_checkpoint(folder / "checkpoints", Checkpoint(0, 0, TrainingState(parameters, moments, 0), facts))


def test_the_same_model_starts_in_silence(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    start = checkpointed(shards, tmp_path / "old")
    parts = started(shards, tmp_path, start, "--seed", "3", "--lr", "1e-5", "--batch_size", "6")
    again = started(shards, tmp_path, start)
    assert all(map(torch.equal, parts.model.parameters(), again.model.parameters()))  # those of the checkpoint
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "more",
    [
        "--num_iterations 3",
        "--num_heads 2",
        "--num_slot_heads 2",
        "--attend_padding",
        "--padding_labels 1 0 0",
        "--bilevel",
        "--activation silu",
        "--score sum",
        "--tau 0.3",
        "--squash_size 16",
        "--normalization none",
    ],
)
def test_what_shapes_do_not_show_is_told(
    more: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    start = checkpointed(shards, tmp_path / "old")
    started(shards, tmp_path, start, *more.split())
    said = capsys.readouterr().err
    assert said.startswith(f"nsi train: {start}: trained otherwise than this run")
    assert f": {more.split()[0]} was " in said
    assert said.count("\n") == said.count(" was ") == 1


def test_all_is_told_in_one_line(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    start = checkpointed(shards, tmp_path / "old")
    started(shards, tmp_path, start, "--tau", "0.3", "--score", "sum", "--patch_size", "16", "--image_size", "64")
    said = capsys.readouterr().err
    assert said.endswith("--score was mean, is sum; --tau was 0.5, is 0.3; the backbone has other weights or patches\n")
    assert said.count("\n") == 1


def test_a_learned_temperature_keeps_its_beginning(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    start = checkpointed(shards, tmp_path / "old", "--learned_tau", "--tau", "0.2")
    with pytest.raises(UserError, match="give --tau 0.2 as the checkpoint's run had") as error:
        started(shards, tmp_path, start, "--learned_tau", "--tau", "0.1")
    assert "\n" not in str(error.value)
    started(shards, tmp_path, start, "--learned_tau", "--tau", "0.2")
    assert capsys.readouterr().err == ""


def test_how_half_precision_comes_about_is_told_once(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """At the start, and where a run goes on in another precision than before; not at every start."""
    note = "nsi train: precision bf16 at ZeRO stage 0: through torch.autocast, weights and Adam in float32\n"
    half = ("--precision", "bf16", "--zero_stage", "0")
    checkpointed(shards, tmp_path / "half", *half)
    assert capsys.readouterr().err == note
    prepared(configured(shards, tmp_path / "half", *half))
    assert capsys.readouterr().err == ""
    checkpointed(shards, tmp_path / "full")
    prepared(configured(shards, tmp_path / "full", *half))
    assert capsys.readouterr().err == note


class Touch:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_backbone_weights_that_are_none(tmp_path: Path) -> None:
    """Torch's own words advise to run the code in the file; they are not passed on."""
    torch.save({"extra": Touch(tmp_path / "was-run")}, tmp_path / "evil.pt")
    for name, content in (("text.pt", b"hello"), ("empty.pt", b""), ("text.safetensors", b"hello")):
        (tmp_path / name).write_bytes(content)
    for name in ("evil.pt", "text.pt", "empty.pt", "text.safetensors"):
        with pytest.raises(UserError, match="not a weights file, or cut; code in a file is not executed") as error:
            make_backbone(BackboneConfig("test_vit", tmp_path / name), 64)
        assert "weights_only" not in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "was-run").exists()
    with pytest.raises(UserError, match="cannot be read"):
        make_backbone(BackboneConfig("test_vit", tmp_path), 64)
    with pytest.raises(UserError, match="no such file"):
        make_backbone(BackboneConfig("test_vit", tmp_path / "none.pt"), 64)
