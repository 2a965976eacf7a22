"""What `nsi train` can be told: one frozen dataclass a part, all flags flat. Names and defaults are those of the
public NSI code wherever it has them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from cluster.engine.config import EngineConfig
from nsi.backbone import DCT
from nsi.errors import UsageError, UserError
from nsi.model import ModelConfig

RecipeName = Literal["default", "reference", "demo"]
Config = TypeVar("Config")
Flat = tyro.conf.OmitArgPrefixes


@dataclass(frozen=True)
class DataConfig:
    """How scenes become batches."""

    image_size: int = 224
    """Images are resized once, from the source, to this many pixels square."""
    squash_size: int = 0
    """Make images this many pixels square first (Hamming filter) and then --image_size (bicubic), as the public code's
    data are (128); 0 does not."""
    features: str | None = None
    """A feature store, written by `nsi features` from these shards: training reads it in place of images, and does
    without the backbone. A path or URL, as --data_path."""
    max_program_len: int = 10
    """Most objects in a scene."""
    num_workers: int = 1
    """Processes a rank that read and decode ahead of the training step."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """A scene whose bytes are damaged stops the run with its shard, key and offset; or it is an empty row, counted and
    noted in RUN/ledger, up to --bad_sample_limit."""
    bad_sample_limit: int = 100
    """How many damaged scenes --on_bad_sample skip bears in one start of the run."""
    cache_path: Path | None = None
    """A folder on the node's own disk that keeps copies of the shards in use, for all ranks of the node. Without it
    shards behind s3:// or http:// are read by ranges, and those in a folder where they lie."""
    cache_gb: float = 50.0
    """How large that folder may grow; `nsi plan` says what is needed."""


@dataclass(frozen=True)
class BackboneConfig:
    """The feature extractor, frozen unless told otherwise."""

    backbone: str = "vit_base_patch8_224.dino"
    """Any timm ViT by name, or "dct": fixed statistics of each patch, which need no weights."""
    backbone_weights: Path | None = None
    """The weights of the ViT (.safetensors, or a state dict saved by torch); without it they come from the hub."""
    normalization: Literal["timm", "none"] = "timm"
    """What a ViT is shown: colours in [0, 1] normalised as its weights were trained, or as they are, as the public code
    does. Without effect on "dct"."""
    patch_size: int = 8
    """Patch size of the backbone "dct"; a ViT has its own."""
    backbone_trainable: bool = False
    """Train a copy of the ViT too: slots are made of its features, and reconstruct those of the ViT as it was, which
    stays frozen beside it (Didolkar et al. 2025, FT-DINOSAUR). Its dropout and stochastic depth stay off."""
    backbone_lr: float = 1e-5
    """Peak learning rate of a trained backbone; it rises and falls as that of --lr does."""


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss and the reconstruction loss."""

    tau: float = 0.1
    """Temperature: scores are divided by it."""
    beta: float = 1.0
    """Weight of the reconstruction loss. By default that loss is the mean over the F features, in --recipe reference
    their sum (--reconstruction sum), so the same beta means another thing there: the public code's 1.0 weighs as much
    as F (768 for ViT-B) by default."""
    reconstruction: Literal["mean", "sum"] = "mean"
    """Squared error averaged over the features, or summed over them as the public code does."""
    score: Literal["sum", "mean"] = "sum"
    """Score of an image and a schema: sum over the schema's objects, or their mean, which keeps large scenes from
    outweighing small ones."""


@dataclass(frozen=True)
class OptimConfig:
    """How long, how fast, in which portions."""

    seed: int = 0
    """Decides the initial weights, the order of the data and all noise."""
    batch_size: int = 128
    """The GLOBAL batch, on any number of GPUs: a command means the same training everywhere."""
    micro_batch_size: int | Literal["auto"] = 0
    """Rows a rank takes through the model at once; 0 means all its rows, auto as many as fit into its memory. Smaller
    ones cost a second forward of all but the decoder and change no result: every row still sees all negatives."""
    epochs: int = 300
    """Passes over the training split."""
    max_steps: int = 0
    """Stop after so many steps instead; 0 means by --epochs. The schedule ends where training ends."""
    lr: float = 4e-4
    """Peak learning rate of AdamW."""
    lr_warmup_steps: int = 10000
    """Steps over which the learning rate rises linearly."""
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    """After the warm-up: cosine to zero, halve after --patience stale validations, or stay."""
    patience: int = 4
    """Validations without a better loss before --schedule plateau halves the learning rate."""
    plateau_in_warmup: bool = False
    """Let --schedule plateau count and halve during the warm-up too, as the public code does."""
    grad_clip: float = 1.0
    """Largest gradient norm of what --clip_scope says; 0 does not clip."""
    clip_scope: Literal["all", "slot_encoder"] = "all"
    """Whose gradient is clipped: that of all parameters by one norm, or, as in the public code, that of slot attention,
    decoder and slot embedding (and of a trained backbone) by its own norm, and the schema encoder's never."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, which without it is Adam. Norms, biases and tables are spared."""


@dataclass(frozen=True)
class WatchConfig:
    """What is kept and shown along the way."""

    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    keep_last: int = 2
    """How many of the newest checkpoints are kept, besides the best one."""
    keep_every_hours: float = 0.0
    """Keep, for good, the first checkpoint of every so many hours too; 0 keeps none."""
    validate_every: int = 0
    """Steps between two validations; 0 means once an epoch."""
    select_by: Literal["retrieval", "loss"] = "retrieval"
    """Which validation is the best, whose weights are kept: highest R@5, or lowest total loss, as in the public
    code."""
    time_limit: float = 0.0
    """Minutes after which the run has saved and ended, to be continued by the same command; 0 means no limit of its
    own. The end of a Slurm job counts too, where Slurm tells it."""
    grace_seconds: float = 120.0
    """How long before that limit the run stops: what a checkpoint may take, with a margin. A run that is asked to stop
    and has not ended by itself so long afterwards is ended as it is."""
    hang_seconds: float = 600.0
    """How long a rank may stand still before the run is ended, with the stacks of all ranks in RUN/stacks; before the
    first step three times as long. The scheduler starts it again."""
    straggler_factor: float = 2.0
    """A rank that takes so many times as long as the median rank for its own part of a step is named in the log."""
    nonfinite_limit: int = 3
    """Steps in a row whose loss or gradient is no finite number that are left out, the weights unchanged. One more
    stops the run, with the scenes and the largest norms in RUN/nonfinite-STEP.json."""
    prometheus_port: int = 0
    """Port of rank 0's Prometheus endpoint, the next ones for further ranks of the node; 0 takes any free port, which
    RUN/prometheus/ then names."""


@dataclass(frozen=True)
class TrainConfig:
    """Train Neural Slot Interpreters on shards.

    Start it alone, or with deepspeed, torchrun, accelerate launch or srun; RUN goes on by itself where it was cut.
    """

    data_path: str
    """Folder of shards, written by `nsi shard`: a path, s3://bucket/folder or http(s)://host/folder."""
    log_path: Path
    """Run folder: configuration, metrics, checkpoints. One that has checkpoints is continued."""
    checkpoint_path: Path | None = None
    """A checkpoint folder whose weights start a fresh run."""
    recipe: RecipeName = "default"
    """A named set of values. Flags given beat the recipe, the recipe beats the defaults."""
    data: Flat[DataConfig] = field(default_factory=DataConfig)
    backbone: Flat[BackboneConfig] = field(default_factory=BackboneConfig)
    model: Flat[ModelConfig] = field(default_factory=ModelConfig)
    loss: Flat[LossConfig] = field(default_factory=LossConfig)
    optim: Flat[OptimConfig] = field(default_factory=OptimConfig)
    engine: Flat[EngineConfig] = field(default_factory=EngineConfig)
    watch: Flat[WatchConfig] = field(default_factory=WatchConfig)


def check(config: TrainConfig) -> None:
    """Raises UsageError for values that no run could use."""
    for name, value in flag_values(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name} {value}: must be a finite number")
    positive = {
        "batch_size": config.optim.batch_size,
        "lr": config.optim.lr,
        "backbone_lr": config.backbone.backbone_lr,
        "tau": config.loss.tau,
        "image_size": config.data.image_size,
        "max_program_len": config.data.max_program_len,
        "log_every": config.watch.log_every,
        "checkpoint_every": config.watch.checkpoint_every,
        "keep_last": config.watch.keep_last,
        "patience": config.optim.patience,
        "epochs": config.optim.epochs,
        "num_workers": config.data.num_workers,
        "cache_gb": config.data.cache_gb,
        "hang_seconds": config.watch.hang_seconds,
        "straggler_factor": config.watch.straggler_factor,
    }
    for name, value in positive.items():
        if not value > 0:
            raise UsageError(f"--{name} {value}: must be above 0")
    not_negative = {
        "micro_batch_size": 0 if config.optim.micro_batch_size == "auto" else config.optim.micro_batch_size,
        "max_steps": config.optim.max_steps,
        "lr_warmup_steps": config.optim.lr_warmup_steps,
        "grad_clip": config.optim.grad_clip,
        "weight_decay": config.optim.weight_decay,
        "beta": config.loss.beta,
        "validate_every": config.watch.validate_every,
        "seed": config.optim.seed,
        "bad_sample_limit": config.data.bad_sample_limit,
        "nonfinite_limit": config.watch.nonfinite_limit,
        "time_limit": config.watch.time_limit,
        "grace_seconds": config.watch.grace_seconds,
        "keep_every_hours": config.watch.keep_every_hours,
        "squash_size": config.data.squash_size,
    }
    for name, value in not_negative.items():
        if not value >= 0:
            raise UsageError(f"--{name} {value}: must be at least 0")
    if config.backbone.backbone_trainable and config.backbone.backbone == DCT:
        raise UsageError(f"--backbone_trainable: the backbone {DCT!r} has no weights to train; give --backbone a ViT")
    if config.backbone.backbone_trainable and config.data.features:
        raise UsageError("--backbone_trainable: needs images, a feature store has none; leave one of the two flags out")
    if not 0 <= config.watch.prometheus_port < 65536:
        raise UsageError(f"--prometheus_port {config.watch.prometheus_port}: must be a port number, or 0 for any")


def science(config: TrainConfig) -> dict[str, Any]:
    """The values that a run may not change on its way, by flag: they decide what is computed, not where or how."""
    kept = {"batch_size", "seed", "lr", "lr_warmup_steps", "schedule", "patience", "grad_clip", "weight_decay"}
    kept |= {"plateau_in_warmup", "clip_scope"}
    return {
        **vars(config.model),
        **vars(config.loss),
        "backbone": config.backbone.backbone,
        "normalization": config.backbone.normalization,
        "patch_size": config.backbone.patch_size,
        "backbone_trainable": config.backbone.backbone_trainable,
        "backbone_lr": config.backbone.backbone_lr,
        "image_size": config.data.image_size,
        "squash_size": config.data.squash_size,
        "max_program_len": config.data.max_program_len,
        "select_by": config.watch.select_by,
        **{name: value for name, value in vars(config.optim).items() if name in kept},
    }


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(kind: type[Config], content: dict[str, Any]) -> Config:
    """A configuration from its JSON. Raises UserError naming a key that this version does not know."""
    hints = typing.get_type_hints(kind, include_extras=True)
    values = {}
    for name, value in content.items():
        if name not in hints:
            raise UserError(f"config.json: this version knows no {name!r}; use the version that wrote the run")
        values[name] = _revive(hints[name], value)
    return kind(**values)


def _revive(hint: Any, value: Any) -> Any:
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value)
    if typing.get_origin(hint) is tuple:  # JSON has lists alone
        return tuple(value)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return Path(value) if Path in options and value is not None else value


def flag_values(config: Any) -> dict[str, Any]:
    """Every flag's value, by its name."""
    values: dict[str, Any] = {}
    for each in fields(config):
        value = getattr(config, each.name)
        values.update(flag_values(value) if is_dataclass(value) else {each.name: value})
    return values
