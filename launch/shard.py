"""`nsi shard SOURCE OUT`: CLEVRTex, in whatever form it is had, becomes WebDataset shards with a manifest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from launch.parts import parse_part
from launch.progress import progress, reading
from nsi.errors import UsageError, UserError
from shards.manifest import MANIFEST, Manifest, read_manifest
from shards.processes import process_pool, without_gc
from shards.reading.dataset import open_splits
from shards.sources.fetch import label
from shards.sources.find import check_parts_can_share, list_sources
from shards.sources.legacy import is_legacy, list_legacy
from shards.sources.listing import Folder, is_scene_json
from shards.sources.stream import first_scene, is_stream
from shards.writing.cut import Settings, may_be_cut_so
from shards.writing.splits import SplitRule
from shards.writing.survey import Survey, survey_folders, survey_scenes
from shards.writing.target import UNFINISHED, check_target, finished, leaving_nothing
from shards.writing.transform import Encoding, Transform, parse_size
from shards.writing.write import Part, count_scenes, merge_shards, write_shards

_SPOOL = "spool"


@dataclass(frozen=True)
class ShardConfig:
    """Turn CLEVRTex scenes into WebDataset shards.

    SOURCE is one of: a folder of scenes (v1 or v2 layout); an archive as it was published, on disk or behind http(s)
    (.tar, .tar.gz; several where a data set comes in parts), read without unpacking it; or the folder of HDF5 files
    that the public NSI code trains from. The same scenes give the same shards, byte for byte, in whatever form they
    come, with any number of workers and interruptions. A run that was cut goes on where it stopped.

    What can only be read front to back (.tar.gz, http) is read once; the images, masks and JSONs are kept in
    OUT/.unfinished until the shards are complete, so that takes their size on disk twice for a while.

    Many machines: run `--part 1/N` to `--part N/N` (a Slurm job array, say), then once `--merge`.
    """

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE [SOURCE ...] OUT")]
    """Where the scenes are, one or more, and last the folder to write to, which is made if it is missing. With --merge
    OUT alone; with --to_hdf5 the folder of shards and the folder to write to."""
    splits: SplitRule = "official"
    """official: the first tenth of the indices is test, the next val, the rest train; all of the OOD variant is test
    (CLEVRTex). reference: as the public NSI code cuts them; its train split holds the official test split. test: all
    is test. HDF5 files keep the splits they have."""
    shard_samples: int = 500
    """Scenes in a shard; the last of a split has fewer."""
    shard_mb: float = 0.0
    """Cut shards by size instead: each holds at most so many megabytes of the source's files."""
    image: Encoding = "keep"
    """keep: the image's bytes as they are. Otherwise it is decoded once and encoded anew."""
    resize: str = ""
    """Size of an image that is encoded anew: 224 squashes it to a square, as training does; 320x240 is also possible.
    Masks keep their size."""
    quality: int = 95
    """Quality of jpg and webp, from 1 to 100."""
    part: str = ""
    """i/N: write the i-th of N parts, i from 1, and no manifest."""
    merge: tyro.conf.FlagCreatePairsOff[bool] = False
    """Check that all parts are there and write the manifest."""
    to_hdf5: tyro.conf.FlagCreatePairsOff[bool] = False
    """The way back: write the files that the public NSI code trains from (images.h5 with 128x128 images in float64,
    the labels, the three JSONs)."""
    workers: int = os.cpu_count() or 1
    """Processes that read and write."""

    @property
    def sources(self) -> tuple[str, ...]:
        """All paths but the last."""
        return self.paths[:-1]

    @property
    def out(self) -> Path:
        """The last path."""
        return Path(self.paths[-1])


def run(config: ShardConfig) -> None:
    """Finds and surveys the scenes, then writes the shards; or one of the other things that were asked for."""
    part = _check(config)
    if config.to_hdf5:
        _write_hdf5(Path(config.sources[0]), config.out)
    elif config.merge:
        _tell(config.out, merge_shards(config.out))
    else:
        _shard(config, part)


def _shard(config: ShardConfig, part: Part | None) -> None:
    settings = Settings(
        config.splits,
        config.shard_samples,
        config.shard_mb,
        Transform(config.image, parse_size(config.resize), config.quality),
    )
    check_target(config.out)
    if any(map(is_stream, config.sources)) and (config.out / MANIFEST).exists():
        _check_made_from(config, settings)
        return
    # Where parts work side by side, a plan is not one run's to remove.
    tidy = nullcontext() if part else leaving_nothing(config.out)
    with without_gc(), tidy, process_pool(config.workers, config.out) as pool:
        survey = _survey(config, pool)
        with progress("writing shards", count_scenes(survey, settings, part), unit="scenes") as advance:
            manifest = write_shards(survey, settings, config.out, pool, advance, part)
    if part:
        print(f"{config.out}: part {part.number}/{part.count} is there; when all are: nsi shard {config.out} --merge")
    if manifest:
        _tell(config.out, manifest)


def _check_made_from(config: ShardConfig, settings: Settings) -> None:
    """Says that OUT is complete. Archives that can only be read front to back are asked for their first scene alone.

    Raises UserError where that is not in OUT.
    """
    manifest = finished(config.out)
    assert manifest is not None
    splits = open_splits(config.out, list(manifest.splits))
    try:
        for split in splits:
            split.check_complete()
    except UserError as error:
        raise UserError(f"{error} (the same archive, written into another folder, has the same shards)") from None
    for source in filter(is_stream, config.sources):
        key, raw = first_scene(source)
        found = [split.read(sample, "json") for split in splits if (sample := split.find(key)) is not None]
        if not may_be_cut_so(manifest, settings) or not found or raw.strip() not in found[0]:
            raise UserError(f"{config.out}: holds the shards of other scenes or settings; choose another folder")
    _tell(config.out, manifest)
    print(f"{config.out}: is complete already; of {', '.join(map(label, config.sources))} the first scene was compared")


def _survey(config: ShardConfig, pool: Executor) -> Survey:
    if len(config.sources) == 1 and is_legacy(Path(config.sources[0])):
        return survey_scenes(*list_legacy(Path(config.sources[0])))
    count, advance = 0, None

    def folders() -> Iterator[Folder]:
        nonlocal count
        with reading() as advance_reading:
            for folder in list_sources(config.sources, config.out / UNFINISHED / _SPOOL, advance_reading):
                count += sum(map(is_scene_json, folder.members))
                yield folder

    with ExitStack() as shown:

        def report(done: int) -> None:  # first called when all scenes are counted
            nonlocal advance
            advance = advance or shown.enter_context(progress("checking scenes", count, unit="scenes"))
            advance(done)

        return survey_folders(folders(), pool, report)


def _write_hdf5(shards: Path, out: Path) -> None:
    from shards.hdf5 import write_hdf5  # here, not above: h5py takes as long to import as all the rest

    manifest = read_manifest(shards)
    total = sum(manifest.samples(split) for split in manifest.splits)
    with progress("writing images.h5", total, unit="scenes") as advance:
        write_hdf5(shards, out, report=advance)
    print(f"{out}: images.h5, labels and the JSONs of {total} scenes, as the public NSI code reads them")


def _check(config: ShardConfig) -> Part | None:
    """The part that is asked for. Raises UsageError for what does not go together."""
    if config.workers < 1:
        raise UsageError("--workers must be at least 1")
    if sum((bool(config.part), config.merge, config.to_hdf5)) > 1:
        raise UsageError("--part, --merge and --to_hdf5 are three different things to do; give one of them")
    if not config.paths:
        raise UsageError("give a SOURCE and an OUT: nsi shard clevrtexv2_full SHARDS")
    if "://" in config.paths[-1]:
        raise UsageError(f"{config.paths[-1]}: shards are written to a folder; copy it there when it is complete")
    if config.merge and config.sources:
        raise UsageError("--merge wants OUT alone: nsi shard OUT --merge")
    if (config.to_hdf5 and "://" in config.paths[0]) or any(source.startswith("s3://") for source in config.sources):
        raise UsageError(f"{config.paths[0]}: not read from there by this verb; copy it to a folder first")
    if config.to_hdf5 and len(config.sources) != 1:
        raise UsageError("--to_hdf5 wants one folder of shards and one to write to: nsi shard --to_hdf5 SHARDS OUT")
    if not config.sources and not config.merge:
        raise UsageError("give a SOURCE and an OUT: nsi shard clevrtexv2_full SHARDS")
    part = parse_part(config.part)
    if part:
        check_parts_can_share(config.sources)
    return part


def _tell(out: Path, manifest: Manifest) -> None:
    splits = ", ".join(f"{name} {manifest.samples(name)}" for name in manifest.splits)
    shards = sum(len(part) for part in manifest.splits.values())
    print(f"{out}: {shards} shards; scenes: {splits}; {len(manifest.vocabulary.materials)} materials")
