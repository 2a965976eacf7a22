"""What a person names as a source, and how its scenes are found: a folder, an archive on disk, or a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from nsi.errors import UsageError
from shards.sources.archive import is_archive, list_archives
from shards.sources.fetch import label
from shards.sources.folder import walk_folder
from shards.sources.listing import Folder
from shards.sources.stream import Progress, is_stream, list_stream


def list_sources(sources: Sequence[str], spool: Path, report: Progress) -> Iterator[Folder]:
    """The members of all sources, folder by folder, as they are found.

    What can only be read front to back is kept in `spool` meanwhile, and `report` told how much has been read.
    Raises UserError for a source that is missing, damaged or holds no scene.
    """
    paths = [Path(source) for source in sources if not is_stream(source)]
    for path in paths:
        if not is_archive(path):
            yield from walk_folder(path)
    if archives := list(filter(is_archive, paths)):
        yield from list_archives(archives)
    if streams := [source for source in sources if is_stream(source)]:
        yield from list_stream(streams, spool, report)


def check_parts_can_share(sources: Sequence[str]) -> None:
    """Raises UsageError for sources that every part of many would have to read from end to end."""
    for source in sources:
        if is_stream(source):
            raise UsageError(
                f"--part: {label(source)} can only be read front to back, so every part would read all of it; "
                "run without --part, or unpack it first"
            )
