"""A complete folder that has lost shards since: those are written again, from the scenes they were made of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from nsi.errors import UserError
from shards.manifest import Manifest
from shards.processes import as_they_end
from shards.temporary import remove_leftovers
from shards.writing.cut import ShardPlan
from shards.writing.disk import cannot_write, is_whole, place, sync
from shards.writing.pack import Job, pack_shard
from shards.writing.transform import Transform


def mend(out: Path, manifest: Manifest, shards: Sequence[ShardPlan], transform: Transform, pool: Executor) -> None:
    """Writes those of some shards again that are missing or cut; the manifest says what they must be.

    Raises UserError where the scenes give other bytes than they gave then.
    """
    wanted = {shard.name: shard for table in manifest.splits.values() for shard in table}
    damaged = [shard for shard in shards if not is_whole(out, wanted[shard.name])]
    if not damaged:
        return
    jobs = [Job(str(out), shard, manifest.vocabulary, transform) for shard in damaged]
    try:
        remove_leftovers(out)
        for packed in as_they_end(pool, pack_shard, jobs):
            if packed.shard != wanted[packed.shard.name]:
                os.unlink(packed.temporary)
                raise UserError(
                    f"{out / packed.shard.name}: missing or cut, and its scenes have other bytes than those it was "
                    "made of; restore it, or remove the folder and write it again"
                )
            place(out, packed)
        sync(out)
    except OSError as error:
        raise cannot_write(out, error) from error
