"""Shards for tests, made by the product as `nsi shard` makes them, in this process."""

from __future__ import annotations

from pathlib import Path

from shards.manifest import Manifest
from shards.processes import process_pool
from shards.sources.folder import list_folder
from shards.writing.cut import Settings
from shards.writing.survey import Survey, survey_folders
from shards.writing.write import write_shards


def silent(done: int) -> None:
    """Progress nobody watches."""


def survey(scenes: Path) -> Survey:
    """The survey of a folder of scenes."""
    with process_pool(1, scenes) as pool:
        return survey_folders(list_folder(scenes), pool, silent)


def write(found: Survey, out: Path, workers: int = 1, **settings) -> Manifest:
    """Writes the shards of surveyed scenes, ten in a shard unless told otherwise."""
    with process_pool(workers, out) as pool:
        manifest = write_shards(found, Settings(**{"shard_samples": 10, **settings}), out, pool, silent)
    assert manifest is not None
    return manifest


def make_shards(scenes: Path, out: Path, **settings) -> Manifest:
    """Shards of a folder of scenes."""
    return write(survey(scenes), out, **settings)
