"""`nsi import-reference FILE RUN`: a model that the public NSI code trained, as a run that can be evaluated.

    RUN/config.json             as `nsi train --recipe reference` writes it, with the sizes found in FILE
    RUN/backbone.safetensors    the frozen ViT out of FILE
    RUN/checkpoints/            step 0: FILE's weights, ids changed from its vocabulary's order to ours

RUN is written aside and renamed, so it is whole or not there.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import torch
import tyro
from safetensors.torch import save_file

from cluster.checkpoints.checkpoint import Checkpoint, checkpoint_path, write_checkpoint
from cluster.engine.state import MOMENTS, TrainingState
from launch import runfolder
from launch.config import TrainConfig, flag_values
from launch.recipes import recipe_defaults
from launch.training.build import make_model
from launch.training.prepare import record
from launch.training.resume import Progress, checkpoint_facts
from launch.training.schedule import Plateau
from nsi.backbone import Backbone, TimmBackbone, parameters_hash
from nsi.errors import UsageError, UserError
from nsi.model import NeuralSlotInterpreter
from nsi.reference_names import FROZEN, from_reference
from nsi.reference_sizes import reference_sizes, size_along
from nsi.schema import LABELS, Vocabulary
from shards.manifest import Manifest
from shards.reading.dataset import load_manifest
from shards.reading.storage import open_storage
from shards.sources.legacy import KINDS, PROGRAM_TO_LABEL

MODULES = ("slot_encoder", "program_encoder")
STEP = 0  # of the one checkpoint: how long the public code trained, its best_model.pt does not say


class Names(NamedTuple):
    """A program2label.json: the public ids by name, for each of `LABELS`."""

    path: Path
    ids: tuple[Mapping[str, int], ...]


@dataclass(frozen=True)
class ImportConfig:
    """Make a run of a model that the public NSI code trained: `nsi eval RUN` and `nsi report RUN` work on it.

    Sizes come from the weights. What leaves no trace in them is asked for, with the public code's defaults.
    """

    file: tyro.conf.Positional[Path]
    """best_model.pt or checkpoint.pt.tar, as the public code saves them. Nothing in it is executed."""
    run: tyro.conf.Positional[Path]
    """Run folder to make."""
    program2label: Path | None = None
    """The program2label.json that it was trained with, which says what its ids mean; without it the one beside FILE."""
    data_path: str = ""
    """Shards for `nsi eval`, whose names decide which of FILE's are kept. Without it all are kept, and `nsi eval RUN
    --data_path SHARDS` needs shards with just these names."""
    backbone: str = "vit_base_patch8_224.dino"
    """timm's name of the frozen ViT."""
    num_slots: int = 15
    """Slots an image."""
    num_iterations: int = 5
    """Rounds of slot attention."""
    num_slot_heads: int = 1
    """Heads of slot attention."""
    num_heads: int = 8
    """Attention heads of the schema encoder."""
    max_program_len: int = 10
    """Most objects in a scene. The public code attends to padding, so this too decides what it computes."""


def run(config: ImportConfig) -> None:
    """Reads FILE, and writes RUN or raises UserError with the key, the shapes or the name that does not fit."""
    if config.run.exists() and not (config.run.is_dir() and not any(config.run.iterdir())):
        raise UserError(f"{config.run}: is there already, and nothing is overwritten; choose another folder")
    if config.max_program_len < 1:
        raise UsageError(f"--max_program_len {config.max_program_len}: must be above 0")
    theirs, passed_over = _read_file(config.file)
    names = _read_names(config.program2label or config.file.parent / PROGRAM_TO_LABEL)
    manifest = load_manifest(open_storage(config.data_path)) if config.data_path else None
    if manifest and manifest.max_objects > config.max_program_len:
        raise UserError(
            f"{config.data_path}: has scenes of {manifest.max_objects} objects, more than --max_program_len "
            f"{config.max_program_len}; give the one that the model was trained with"
        )
    vocabulary = manifest.vocabulary if manifest else Vocabulary.of(*names.ids)
    left_out = _to_our_ids(theirs, config, names, vocabulary)
    frozen = {key.removeprefix(FROZEN): theirs.pop(key) for key in list(theirs) if key.startswith(FROZEN)}
    try:
        backbone, image_size = _backbone(config.backbone, frozen, theirs)
        trained = _train_config(config, theirs, _padding_labels(names, vocabulary), image_size)
        model = make_model(trained, vocabulary, backbone)
        parameters = from_reference(model, theirs)
    except UsageError:
        raise
    except UserError as error:
        raise UserError(f"{config.file}: {error}") from None
    model.load_state_dict(parameters)
    _write(trained, manifest, vocabulary, backbone, model)
    for line in left_out:
        print(line)
    if passed_over:
        print(f"passed over in {config.file}: {', '.join(passed_over)}")
    print(_summary(trained, model, backbone, vocabulary))


def _read_file(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of both state dicts, by module and key, and what else the file holds."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give best_model.pt or checkpoint.pt.tar") from None
    except Exception as error:  # torch raises a dozen kinds for a file that is not its own
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path}: holds {refused[1]}, and reading that would run code; save the two state dicts alone: "
                'torch.save({"slot_encoder": ..., "program_encoder": ...}, FILE)'
            ) from None
        raise UserError(f"{path}: not a file that torch.save wrote, or cut; copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no dictionary of {' and '.join(MODULES)}, but a {type(content).__name__}")
    theirs: dict[str, torch.Tensor] = {}
    for module in MODULES:
        state = content.get(module)
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise UserError(f"{path}: has no state dict {module!r}; it has {', '.join(map(str, content)) or 'nothing'}")
        # DataParallel puts the module that it wraps under this name.
        theirs |= {f"{module}.{str(key).removeprefix('module.')}": value for key, value in state.items()}
    for key, value in theirs.items():
        if not value.isfinite().all():
            raise UserError(f"{path}: {key} holds numbers that are not finite; take another checkpoint of that run")
    return theirs, [str(name) for name in content if name not in MODULES]


def _read_names(path: Path) -> Names:
    """A program2label.json. Raises UserError where it cannot be read or is none."""
    try:
        content = orjson.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give --program2label the file that the model was trained with"
        ) from None
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: not a JSON file ({error}); restore it") from None
    try:
        ids = tuple(dict(content[kind]) for kind in KINDS)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: has no names with ids under each of {', '.join(KINDS)}; restore it") from None
    for kind, known in zip(KINDS, ids, strict=True):
        whole = [label for label in known.values() if type(label) is int and label >= 0]
        if not known or len(set(whole)) != len(known):
            raise UserError(f"{path}: its {kind} do not have an id each, a whole number of its own; restore it")
    return Names(path, ids)


def _to_our_ids(
    theirs: dict[str, torch.Tensor], config: ImportConfig, names: Names, vocabulary: Vocabulary
) -> list[str]:
    """Puts the rows of the three tables in the order of our ids, in place; returns a line for each that loses rows."""
    lines = []
    for label, ours, ids in zip(LABELS, vocabulary.names(), names.ids, strict=True):
        if unknown := [name for name in ours if name not in ids]:
            raise UserError(
                f"{names.path}: has no {label} {unknown[0]!r}, which {config.data_path} has; "
                "give the shards and the file that belong to the model"
            )
        key = f"program_encoder.{label}_embedding.weight"
        if key not in theirs or theirs[key].ndim != 2:
            raise UserError(f"{config.file}: lacks {key}, a table")
        rows, last = len(theirs[key]), max(ours, key=lambda name, ids=ids: ids[name])
        if ids[last] >= rows:
            raise UserError(
                f"{config.file}: {key} has the shape {tuple(theirs[key].shape)}, "
                f"but {names.path} gives {last!r} the id {ids[last]}"
            )
        theirs[key] = theirs[key][[ids[name] for name in ours]]
        if rows > len(ours):
            lines.append(f"left out: {rows - len(ours)} of the {rows} rows of {key}, which no name of the shards has")
    return lines


def _padding_labels(names: Names, vocabulary: Vocabulary) -> tuple[int, int, int]:
    """Our ids of the public 0, 0, 0, the object that its padding is."""
    first = []
    for label, ours, ids in zip(LABELS, vocabulary.names(), names.ids, strict=True):
        zero = next((name for name, place in ids.items() if place == 0), None)
        if zero not in ours:
            raise UserError(
                f"padding is an object of the {label} with id 0 ({zero!r}), which the shards lack; take all of "
                "the data's shards, or leave --data_path out"
            )
        first.append(zero)
    return vocabulary.encode(*first)


def _backbone(
    name: str, frozen: dict[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]
) -> tuple[TimmBackbone, int]:
    """The frozen ViT, and the size of its images: as many patches as the decoder has positions, in a square."""
    if not frozen:
        raise UserError(f"lacks {FROZEN}*, the weights of the frozen ViT")
    positions = size_along(theirs, "slot_encoder.decoder.postional_encoding.weight", 0)
    side = math.isqrt(positions)
    if side**2 != positions:
        raise UserError(f"slot_encoder.decoder.postional_encoding.weight has {positions} rows, which are no square")
    image_size = side * size_along(frozen, "patch_embed.proj.weight", 3, FROZEN)
    return TimmBackbone(name, image_size, frozen, normalize=False), image_size


def _train_config(
    config: ImportConfig, theirs: Mapping[str, torch.Tensor], padding: tuple[int, int, int], image_size: int
) -> TrainConfig:
    """The reference recipe in the sizes of the weights."""
    reference = recipe_defaults("reference", TrainConfig(config.data_path, config.run))
    model = replace(
        reference.model,
        num_slots=config.num_slots,
        num_iterations=config.num_iterations,
        num_slot_heads=config.num_slot_heads,
        num_heads=config.num_heads,
        padding_labels=padding,
        **reference_sizes(theirs),
    )
    return replace(
        reference,
        data=replace(reference.data, image_size=image_size, max_program_len=config.max_program_len),
        backbone=replace(
            reference.backbone,
            backbone=config.backbone,
            backbone_weights=config.run.resolve() / runfolder.BACKBONE,
        ),
        model=model,
    )


def _write(
    trained: TrainConfig,
    manifest: Manifest | None,
    vocabulary: Vocabulary,
    backbone: TimmBackbone,
    model: NeuralSlotInterpreter,
) -> None:
    """Writes the run folder aside, and renames it."""
    run, backbone_hash = trained.log_path, parameters_hash(backbone)
    fingerprint = manifest.fingerprint if manifest else ""
    facts = checkpoint_facts(trained, fingerprint, vocabulary, backbone_hash, Progress(STEP, Plateau(), {}))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    # Adam has not begun, so that training may go on from here as from its own start.
    moments = {moment: {name: torch.zeros_like(value) for name, value in parameters.items()} for moment in MOMENTS}
    content = record(trained, manifest, vocabulary, backbone, backbone_hash, model)
    aside = run.with_name(f".{run.name}.import")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(backbone.model.state_dict(), aside / runfolder.BACKBONE)
        (aside / runfolder.CONFIG).write_text(json.dumps(content, indent=1))
        checkpoint = Checkpoint(STEP, 0, TrainingState(parameters, moments, 0), facts)
        write_checkpoint(aside / runfolder.CHECKPOINTS, checkpoint)
        aside.rename(run)
    except OSError as error:
        raise UserError(f"{run}: cannot be written ({error.strerror}); make room or choose another folder") from None


def _summary(trained: TrainConfig, model: NeuralSlotInterpreter, backbone: Backbone, vocabulary: Vocabulary) -> str:
    run, sizes = trained.log_path, trained.model
    data = "" if trained.data_path else " --data_path SHARDS"
    return "\n".join(
        [
            f"{run}: {sum(p.numel() for p in model.parameters()):,} parameters, {sizes.num_blocks} blocks of width "
            f"{sizes.d_model}, slots of {sizes.slot_dim}, embeddings of {sizes.embed_dim}, "
            f"{' x '.join(map(str, backbone.grid))} patches of {trained.backbone.backbone}, "
            f"images of {trained.data.image_size}, {' + '.join(map(str, vocabulary.counts()))} names",
            f"asked for, not found in the file: {sizes.num_slots} slots, {sizes.num_iterations} iterations, "
            f"{sizes.num_slot_heads} slot heads, {sizes.num_heads} heads, --max_program_len "
            f"{trained.data.max_program_len}",
            f"next: nsi eval {run} --split test{data}, then nsi report {run}; training starts from it with",
            f"  {_start_command(trained)}",
        ]
    )


def _start_command(trained: TrainConfig) -> str:
    """How to train on from the imported weights: every flag that the recipe would set otherwise."""
    recipe = flag_values(recipe_defaults("reference", TrainConfig("", Path())))
    start = checkpoint_path(trained.log_path / runfolder.CHECKPOINTS, STEP)
    flags: dict[str, Any] = {"recipe": "reference", "data_path": trained.data_path or "SHARDS", "log_path": "NEW_RUN"}
    flags["checkpoint_path"] = start
    flags |= {
        name: value for name, value in flag_values(trained).items() if name not in flags and value != recipe[name]
    }
    words = [[f"--{name}", *map(str, value if isinstance(value, tuple) else [value])] for name, value in flags.items()]
    return shlex.join(["nsi", "train", *(word for each in words for word in each)])
