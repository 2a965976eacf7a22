"""`nsi export RUN OUT`: a trained model as safetensors and a config, which load without DeepSpeed (launch/exported.py).

OUT is written aside and renamed, so it is whole or not there.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from safetensors.torch import save_file

from cluster.checkpoints.checkpoint import Checkpoint
from cluster.durable import file_hash, sync
from launch.config import TrainConfig, from_json, to_json
from launch.exported import CONFIG, FORMAT, MODEL
from launch.training.choose import trained_checkpoint
from launch.training.validation import VALIDATION_STEP
from nsi.backbone import build_backbone
from nsi.errors import UserError


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's model as model.safetensors and config.json, which load without DeepSpeed."""

    run: tyro.conf.Positional[Path]
    """Run folder, written by `nsi train`."""
    out: tyro.conf.Positional[Path]
    """Folder to make."""
    checkpoint: str = "best"
    """best: the step with the best validation (`nsi train --select_by`); last: the newest one; or a step's number."""


def run(config: ExportConfig) -> None:
    """Writes OUT; nothing is overwritten. Raises UserError where OUT is there with other content."""
    checkpoint = trained_checkpoint(
        config.run, config.checkpoint, lambda text: print(f"nsi export: {text}", file=sys.stderr)
    )
    out = config.out.absolute()
    aside = out.with_name(f".{out.name}.export")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(checkpoint.training.parameters, aside / MODEL)
        content = {**_content(checkpoint), "model_sha256": file_hash(aside / MODEL)}
        (aside / CONFIG).write_text(json.dumps(content, indent=1) + "\n")
        for path in (aside / MODEL, aside / CONFIG, aside):
            sync(path)
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            same = _same(aside, out)
            shutil.rmtree(aside)
            if not same:
                raise UserError(f"{out}: is there already with other content; give another folder, or remove it")
        else:
            aside.rename(out)
            sync(out.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{out}: cannot be written ({error.strerror}); make room or give another folder") from None
    parameters = sum(tensor.numel() for tensor in checkpoint.training.parameters.values())
    print(f"{config.out}: step {checkpoint.step}, {parameters:,} parameters; launch/README.md shows how to use it")


def _content(checkpoint: Checkpoint) -> dict[str, Any]:
    """What config.json says: all that the weights mean."""
    facts = checkpoint.facts
    trained = from_json(TrainConfig, facts["config"])
    images = trained.data.image_size
    # For its sizes and colours, so without weights.
    normalize = trained.backbone.normalization == "timm"
    backbone = build_backbone(trained.backbone.backbone, images, None, trained.backbone.patch_size, normalize)
    colours = {name: getattr(backbone, f"{name}_C11", None) for name in ("mean", "std")}
    return {
        "format": FORMAT,
        "step": checkpoint.step,
        "data_fingerprint": facts["fingerprint"],
        "model": to_json(trained.model),
        "tau": trained.loss.tau,
        "score": trained.loss.score,
        "max_program_len": trained.data.max_program_len,
        "noise_seed": trained.optim.seed,
        "noise_step": VALIDATION_STEP,
        "vocabulary": facts["vocabulary"],
        "backbone": {
            "name": trained.backbone.backbone,
            "hash": facts["backbone_hash"],  # of the frozen weights, or of those that it was trained from
            "trained": trained.backbone.backbone_trainable,
            "image_size": images,
            "squash_size": trained.data.squash_size,
            "normalization": trained.backbone.normalization,
            **{name: tensor.flatten().tolist() for name, tensor in colours.items() if tensor is not None},
            "patch_size": trained.backbone.patch_size,  # of "dct" alone
            "grid": backbone.grid,
            "feature_dim": backbone.feature_dim,
        },
    }


def _same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same export and nothing else."""
    if not other.is_dir() or {path.name for path in other.iterdir()} != {MODEL, CONFIG}:
        return False
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in (MODEL, CONFIG))
