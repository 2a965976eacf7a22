"""`nsi verify SHARDS`: every byte, count and picture of a folder of shards is checked, every fault named."""

from __future__ import annotations

import os
from dataclasses import dataclass

import tyro

from launch.progress import progress
from nsi.errors import UsageError, UserError
from shards.manifest import Manifest
from shards.processes import process_pool
from shards.reading.dataset import load_manifest
from shards.reading.storage import open_storage
from shards.verify import verify


@dataclass(frozen=True)
class VerifyConfig:
    """Check a folder of shards: checksums, counts, vocabulary, and that every image and mask can be decoded."""

    shards: tyro.conf.Positional[str]
    """Folder of shards, written by `nsi shard`: a path, s3://bucket/folder or http(s)://host/folder."""
    workers: int = os.cpu_count() or 1
    """Processes that read and decode."""


def run(config: VerifyConfig) -> None:
    """Prints every fault, a line each. Raises UserError where there are any."""
    if config.workers < 1:
        raise UsageError("--workers must be at least 1")
    storage = open_storage(config.shards)
    manifest = load_manifest(storage)
    total = sum(manifest.samples(split) for split in manifest.splits)
    with process_pool(config.workers, config.shards) as pool, progress("verifying", total, unit="samples") as advance:
        faults = verify(storage, pool, advance)
    for fault in faults:
        print(fault)
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError(f"{config.shards}: {count}; restore what is named above, or {_write_again(manifest)}")
    print(f"{config.shards}: {total} samples, all as they were written (fingerprint {manifest.fingerprint[:12]})")


def _write_again(manifest: Manifest) -> str:
    if manifest.features:
        return "make the store anew in another folder"
    return (
        "remove those tars and give the command again that wrote them (made straight from an archive: into another "
        "folder, to copy them from there)"
    )
