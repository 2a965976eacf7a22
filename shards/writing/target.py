"""The folder that shards are written to: what may be there before, and nothing left of a run that failed at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nsi.errors import UserError
from shards.manifest import MANIFEST, Manifest, read_manifest
from shards.temporary import remove_leftovers
from shards.writing.disk import held

UNFINISHED = ".unfinished"  # what is done so far, while a run is on its way
PLAN = "plan.json"


def check_target(out: Path) -> None:
    """Raises UserError where OUT is there and holds something else than shards, before anything is read."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose a folder to write the shards to")
    ours = (out / UNFINISHED).exists() or (out / MANIFEST).exists()
    if out.exists() and not ours and any(out.iterdir()):
        raise UserError(f"{out}: is not empty and holds no shards; choose another folder")


def finished(out: Path) -> Manifest | None:
    """The manifest of a folder that is complete. What a kill at the very end left of its making is removed."""
    if not (out / MANIFEST).exists():
        return None
    manifest = read_manifest(out)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return manifest


@contextmanager
def leaving_nothing(out: Path) -> Iterator[None]:
    """Removes the folders that a run made where it fails before any of its work is there to go on from.

    Work that another run has begun in OUT is never touched.
    """
    notes = out / UNFINISHED
    made = [folder for folder in (notes, out, *out.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        # A spool that has members stays, and all above it; so does what another run is writing.
        with suppress(OSError, UserError), held(out, shared=False):
            if notes in made and not any(notes.glob("*.tar.json")) and not any(out.glob("*.tar")):
                remove_leftovers(out)
                (notes / PLAN).unlink(missing_ok=True)
                for folder in made:
                    folder.rmdir()
        raise
