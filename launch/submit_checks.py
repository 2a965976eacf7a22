"""What `nsi submit` knows of a job's arguments before Slurm is asked: an iterator of findings for each script."""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import exists, isdir  # a Path's own raise where one may not look
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.nodes.sbatch import most_ranks
from launch import hub, runfolder
from nsi.errors import UsageError, UserError

if TYPE_CHECKING:
    from launch.config import BackboneConfig, TrainConfig
    from launch.evaluate import EvalConfig
    from launch.features import FeaturesConfig
    from launch.shard import ShardConfig
    from shards.manifest import Manifest

PORTS = 20_000, 30_000  # of slurm/common.sh
LOCAL = tuple(map(Path, ("/tmp", "/var/tmp", "/dev/shm")))
LAUNCHERS = "srun", "deepspeed", "torchrun", "pdsh"


@dataclass(frozen=True)
class Finding:
    """A line for the person. A warning does not keep the job from being submitted."""

    text: str
    is_warning: bool = False


@dataclass(frozen=True)
class Job:
    """What is about to be submitted."""

    script: str  # its name without the folder
    config: Any  # the verb's configuration, which the arguments make; None for a script of somebody else's
    asked: Mapping[str, str]  # sbatch's options by name
    folder: Path  # where it will run
    site: Mapping[str, str]  # NSI_* variables, of the site's file and the environment


def parse_arguments(script: str, arguments: Sequence[str]) -> Any:
    """What the script's verb will make of its arguments, with the script's own demands on them.

    Raises UsageError, or SystemExit after tyro has told what is wrong.
    """
    if script not in _CHECKS:
        return None
    if "" in arguments:
        before = arguments[arguments.index("") - 1] if arguments[0] else script
        raise UsageError(f"there is an empty word behind {before}; is a variable unset?")
    if script == "train.sbatch":
        from launch.config import check
        from launch.train import parse

        config = parse(arguments)
        check(config)
        return config
    wants_run = script == "monitor.sbatch" or (script == "eval.sbatch" and list(arguments[:1]) != ["--help"])
    if wants_run and (not arguments or arguments[0].startswith("-")):
        raise UsageError(f"give RUN, the --log_path of a training, first behind {script} (is a variable unset?)")
    if script == "monitor.sbatch":
        if len(arguments) > 1:
            raise UsageError(f"{script} takes one RUN and no more; leave {shlex.join(arguments[1:])} out")
        return Path(arguments[0])
    import tyro

    module, kind, verb = _VERBS[script]
    verbs = importlib.import_module(module)
    return tyro.cli(getattr(verbs, kind), args=list(arguments), prog=f"nsi {verb}", use_underscores=True)


def findings(job: Job) -> Iterator[Finding]:
    """All that is not well."""
    yield from _place(job.folder, job, "the folder to run in,", writes=True)
    if checks := _CHECKS.get(job.script):
        yield from checks(job)


def port_findings(ports: str) -> Iterator[Finding]:
    """`ports`: the two numbers of the kernel's ip_local_port_range, or nothing where it has none."""
    first, last = (int(number) for number in ports.split() or (0, 0))
    if first <= PORTS[1] and last >= PORTS[0]:
        yield Finding(
            f"ranks meet on a port of {PORTS[0]} to {PORTS[1]}, and this machine gives {first} to {last} to any "
            "program; if nodes do so too and a job finds its port taken, let the site set "
            "net.ipv4.ip_local_port_range to 32768 60999",
            is_warning=True,
        )


def _train(job: Job) -> Iterator[Finding]:
    config: TrainConfig = job.config
    ranks, batch = most_ranks(job.asked), config.optim.batch_size
    if batch < ranks:
        yield Finding(f"--batch_size {batch}: the job may have {ranks} ranks, and some would have no scene; raise it")
    yield from _shards(config.data_path, "data_path", job, batch)
    if config.data.features:
        yield from _shards(config.data.features, "features", job)
    named = {
        "backbone_weights": config.backbone.backbone_weights,
        "checkpoint_path": config.checkpoint_path,
        "deepspeed_config": config.engine.deepspeed_config,
    }
    for flag, path in named.items():
        if path and not exists(job.folder / path):
            yield Finding(f"--{flag} {path}: no such file; correct the path")
    if not config.data.features:
        yield from _from_the_hub(config.backbone)
    yield from _place(config.log_path, job, "--log_path", writes=True)
    launcher = job.site.get("NSI_LAUNCHER") or LAUNCHERS[0]
    if launcher not in LAUNCHERS:
        yield Finding(f"NSI_LAUNCHER={launcher}: must be {', '.join(LAUNCHERS[:-1])} or {LAUNCHERS[-1]}")
    if job.site.get("NSI_STAGE") == "1" and not job.site.get("NSI_SCRATCH"):
        yield Finding("NSI_STAGE=1, but no NSI_SCRATCH; name a folder on the nodes' own disks in slurm/site.sh")


def _shard(job: Job) -> Iterator[Finding]:
    config: ShardConfig = job.config
    if len(config.paths) < (1 if config.merge else 2):
        yield Finding("give a SOURCE and an OUT (is a variable unset?); as in: slurm/shard.sbatch SCENES SHARDS")
        return
    for source in config.sources:
        yield from _source(source, job)
    yield from _place(config.out, job, "OUT", writes=True)


def _features(job: Job) -> Iterator[Finding]:
    config: FeaturesConfig = job.config
    yield from _shards(config.shards, "SHARDS", job)
    weights = config.backbone.backbone_weights
    if weights and not exists(job.folder / weights):
        yield Finding(f"--backbone_weights {weights}: no such file; correct the path")
    yield from _from_the_hub(config.backbone)
    yield from _place(config.out, job, "OUT", writes=True)


def _from_the_hub(backbone: BackboneConfig) -> Iterator[Finding]:
    """Weights that a node without internet would look for in vain, as far as this account's cache tells."""
    if backbone.backbone_weights:
        return
    try:
        place = hub.place_of(backbone.backbone)
    except UserError as error:
        yield Finding(str(error))
        return
    if place and not hub.cached(place):
        text = f"{hub.missing(backbone.backbone)}, and nodes without internet cannot fetch them"
        yield Finding(f"{text}; {hub.remedy(backbone.backbone)}", is_warning=True)


def _evaluate(job: Job) -> Iterator[Finding]:
    config: EvalConfig = job.config
    if not exists(job.folder / config.run / runfolder.CONFIG):
        # It may still be trained by a job that this one waits for.
        waits = bool(job.asked.get("dependency"))
        yield Finding(f"{config.run}: no run (it has no {runfolder.CONFIG}); give the --log_path of a training", waits)


def _monitor(job: Job) -> Iterator[Finding]:
    yield from _place(job.config, job, "RUN", writes=True)


_CHECKS: dict[str, Callable[[Job], Iterator[Finding]]] = {
    "train.sbatch": _train,
    "shard.sbatch": _shard,
    "features.sbatch": _features,
    "eval.sbatch": _evaluate,
    "monitor.sbatch": _monitor,
}


_VERBS = {
    "shard.sbatch": ("launch.shard", "ShardConfig", "shard"),
    "features.sbatch": ("launch.features", "FeaturesConfig", "features"),
    "eval.sbatch": ("launch.evaluate", "EvalConfig", "eval"),
}


def _shards(location: str, flag: str, job: Job, batch_size: int = 0) -> Iterator[Finding]:
    """A folder of shards that can be read from here, with the splits that training needs."""
    from shards.reading.dataset import load_manifest
    from shards.reading.storage import Retries, open_storage

    if "://" not in location:
        yield from _place(Path(location), job, flag if flag.isupper() else f"--{flag}")
        location = str(job.folder / location)
    try:
        manifest = load_manifest(open_storage(location, Retries(limit=2, timeout_s=5.0)))
    except UserError as error:
        yield Finding(str(error))
        return
    yield from _splits(manifest, location, batch_size)


def _splits(manifest: Manifest, location: str, batch_size: int) -> Iterator[Finding]:
    there = {name: manifest.samples(name) for name in manifest.splits}
    for split in ("train", "val"):
        if not there.get(split):
            told = ", ".join(f"{name} {count}" for name, count in there.items())
            yield Finding(f"{location}: has no scenes in its split {split!r} ({told}); training needs them")
    if 0 < there.get("train", 0) < batch_size:
        yield Finding(f"--batch_size {batch_size}: the train split of {location} has {there['train']} scenes; lower it")


def _source(source: str, job: Job) -> Iterator[Finding]:
    if "://" in source:
        return
    if not exists(job.folder / source):
        yield Finding(f"{source}: no such folder or file; give what holds the scenes")
    yield from _place(Path(source), job, "SOURCE")


def _place(path: Path, job: Job, what: str, writes: bool = False) -> Iterator[Finding]:
    """A folder that all nodes must see, and that the job may have to write to."""
    where = Path(os.path.abspath(job.folder / path))
    if writes and (why := unwritable(where)):
        yield Finding(f"{what} {path}: {why}; choose another folder")
    scratch = job.site.get("NSI_SCRATCH")
    if scratch and where.is_relative_to(os.path.abspath(scratch)):
        text = f"{what} {path}: lies in NSI_SCRATCH, of which each node has its own; choose a folder that all nodes see"
        yield Finding(text, is_warning=not writes)
    elif local := next((each for each in LOCAL if where.is_relative_to(each)), None):
        yield Finding(f"{what} {path}: {local} is each node's own on most clusters; is it one folder here?", True)


def unwritable(path: Path) -> str:
    """Why a folder, which may not be there yet, cannot be written to; or nothing."""
    there = next(each for each in (path, *path.parents) if exists(each))
    if not isdir(there):
        return f"{there} is no folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"you cannot write to {there}"
