"""What a run goes on from, checked against what is asked for now; and what it leaves for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.checkpoints.checkpoint import Checkpoint, load_checkpoint
from launch.config import TrainConfig, from_json, science, to_json
from launch.training.schedule import Plateau
from nsi.errors import UserError
from nsi.finetuned import fitted
from nsi.model import NeuralSlotInterpreter, load_trained
from nsi.schema import Vocabulary
from shards.reading.dataset import Split

# Of `science`, what the weights of a model mean and their shapes do not show.
MODEL = (
    *("activation", "num_iterations", "num_heads", "num_slot_heads", "attend_padding", "padding_labels"),
    *("position_dims", "slot_start", "bilevel", "score", "tau", "backbone", "normalization", "squash_size"),
)


@dataclass
class Progress:
    """What changes from step to step besides the engine; checkpoints keep it."""

    step: int
    plateau: Plateau
    best: dict[str, float]  # {"step", "R@5", "loss"} of the best validation, empty before the first


def progress_of(checkpoint: Checkpoint) -> Progress:
    """How far a checkpoint's run had come."""
    facts = checkpoint.facts
    return Progress(checkpoint.step, Plateau(**facts["plateau"]), dict(facts["best"]))


def check_belongs(
    restored: Checkpoint, config: TrainConfig, train: Split, backbone_hash: str, warn: Callable[[str], None]
) -> None:
    """Raises UserError unless a run's checkpoint belongs to this configuration and data; `warn` is told what has
    changed and may change."""
    folder = config.log_path
    _check_schema(folder, restored, train)
    if restored.facts["fingerprint"] != train.manifest.fingerprint:
        raise UserError(f"{folder}: was trained on other shards than {config.data_path}; choose another --log_path")
    before = science(from_json(TrainConfig, restored.facts["config"]))
    changed = [
        f"--{name} was {before[name]}, is {value}" for name, value in science(config).items() if before[name] != value
    ]
    if changed:
        raise UserError(f"{folder}: {'; '.join(changed)}: a run keeps these; choose another --log_path or change back")
    if restored.facts["backbone_hash"] != backbone_hash:
        raise UserError(f"{folder}: was trained on a backbone with other weights; give the same --backbone_weights")
    then = restored.facts["config"]["optim"]
    if (then["max_steps"], then["epochs"]) != (config.optim.max_steps, config.optim.epochs):
        warn("training ends elsewhere than before (--max_steps, --epochs), so the learning rate takes another course")


def load_start(
    model: NeuralSlotInterpreter,
    path: Path,
    config: TrainConfig,
    train: Split,
    backbone_hash: str,
    warn: Callable[[str], None],
) -> None:
    """Weights of another run's checkpoint, verified before, into a fresh model; `warn` is told what else than shapes
    does not agree."""
    start = load_checkpoint(path)
    _check_schema(path, start, train)
    before, now = science(from_json(TrainConfig, start.facts["config"])), science(config)
    if before["learned_tau"] and now["learned_tau"] and before["tau"] != now["tau"]:
        raise UserError(
            f"{path}: learned its temperature relative to --tau {before['tau']}, this run has {now['tau']}; "
            f"give --tau {before['tau']} as the checkpoint's run had"
        )
    try:
        load_trained(model, fitted(model, start.training.parameters))
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(
            f"{path}: does not fit this model ({reason}); give the flags that it was trained with"
        ) from None
    changed = [f"--{name} was {before[name]}, is {now[name]}" for name in MODEL if before[name] != now[name]]
    if before["backbone_trainable"] and not now["backbone_trainable"]:
        changed.append("the backbone that it trained is left out, the frozen one stands in its place")
    if start.facts["backbone_hash"] != backbone_hash:
        changed.append("the backbone has other weights or patches")
    if changed:
        warn(f"{path}: trained otherwise than this run, so its weights mean less here: {'; '.join(changed)}")


def checkpoint_facts(
    config: TrainConfig, fingerprint: str, vocabulary: Vocabulary, backbone_hash: str, now: Progress
) -> dict[str, Any]:
    """What a checkpoint says besides the training state; `fingerprint` is that of the shards."""
    return {
        "seed": config.optim.seed,
        "batch_size": config.optim.batch_size,
        "fingerprint": fingerprint,
        "vocabulary": {name: list(names) for name, names in vars(vocabulary).items()},
        "vocabulary_fingerprint": vocabulary.fingerprint(),
        "backbone_hash": backbone_hash,
        "plateau": vars(now.plateau),
        "best": now.best,
        "config": to_json(config),
    }


def is_better(figures: Mapping[str, float], best: Mapping[str, float], select_by: str) -> bool:
    """Whether a validation's figures beat the best so far, if there is one."""
    if select_by == "loss":
        return not best or figures["loss"] < best["loss"]
    return not best or figures["R@5"] > best["R@5"]


def _check_schema(path: Path, found: Checkpoint, train: Split) -> None:
    if found.facts["vocabulary_fingerprint"] != train.manifest.vocabulary.fingerprint():
        raise UserError(
            f"{path}: was trained on another schema (other sizes, shapes or materials) than {train.folder} has; "
            "its ids mean other things, so use the shards it was trained on"
        )
