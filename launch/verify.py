"""`nsi verify SHARDS`: every byte, count and picture of a folder of shards is checked, every fault named."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from launch.progress import progress
from nsi.errors import UserError
from shards.manifest import read_manifest
from shards.verify import verify


@dataclass(frozen=True)
class VerifyConfig:
    """Check a folder of shards: checksums, counts, vocabulary, and that every image and mask can be decoded."""

    shards: tyro.conf.Positional[Path]
    """Folder of shards, written by `nsi shard`."""
    workers: int = os.cpu_count() or 1
    """Threads that read and decode."""


def run(config: VerifyConfig) -> None:
    """Prints every fault, a line each. Raises UserError where there are any."""
    manifest = read_manifest(config.shards)
    total = sum(manifest.samples(split) for split in manifest.splits)
    with progress("verifying", total, unit="samples") as advance:
        faults = verify(config.shards, max(1, config.workers), advance)
    for fault in faults:
        print(fault)
    if faults:
        raise UserError(f"{config.shards}: {len(faults)} faults; restore what is named above or write the shards again")
    print(f"{config.shards}: {total} samples, all as they were written (fingerprint {manifest.fingerprint[:12]})")
