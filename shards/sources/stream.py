"""Scenes in archives that can only be read front to back: compressed ones, and those on a web server.

Each source is read once, in bounded memory, and nothing is unpacked into files: the members that scenes are made of,
6 of 93 GB, are appended to a spool (`spool.py`), and places point there. A run that was cut goes on: from the last
member on where the source can be entered there, else from the start, passing over what is in the spool.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

import xxhash

from nsi.errors import UserError
from shards import tar
from shards.reading.storage import Retries
from shards.sources.fetch import Changed, Identity, check_same, fetch, is_url, label, name_of
from shards.sources.forward import Forward, unpack
from shards.sources.listing import Folder, is_scene_json
from shards.sources.members import Members, wanted_name
from shards.sources.scene import Place
from shards.sources.spool import Entry, Spool, open_spool

PATIENCE = Retries(limit=8)  # a minute in all without a single byte

Progress = Callable[[str, int, int], None]  # a source, how many of its bytes have been read, how many it has


def is_stream(source: str) -> bool:
    """Whether a source can only be read front to back, by its name."""
    return is_url(source) or source.endswith((".tar.gz", ".tgz"))


def list_stream(sources: Sequence[str], spool: Path, report: Progress, retries: Retries = PATIENCE) -> list[Folder]:
    """Every folder inside some archives that holds a scene's JSON, with its members, whose bytes are in `spool`.

    The archives are parts of one data set: a folder may go on in the next. `report` is told of each how many bytes
    have been read and of how many, 0 where nobody knows. Raises UserError where an archive cannot be had, is cut or
    damaged, holds what no archive of scenes has, is not the one that the spool was begun with, or where the disk is
    full.
    """
    members = Members()
    for number, source in enumerate(sources):
        try:
            with open_spool(spool, number) as part:
                _list_part(source, part, members, report, retries)
        except Changed as error:
            raise UserError(
                f"{label(source)}: {error}, so it is not what {spool} was begun with; remove that folder to start anew"
            ) from None
        except tar.Damage as error:
            raise UserError(f"{label(source)}: {error}; get the archive again from where it was published") from None
    if not members.scenes:
        raise UserError(f"{', '.join(map(label, sources))}: no CLEVRTEX*.json inside; give archives of CLEVRTex")
    return members.folders()


def first_scene(source: str, retries: Retries = PATIENCE) -> tuple[str, bytes]:
    """Key and JSON of an archive's first scene; no more of it is read. Raises UserError as `list_stream` does."""
    try:
        with closing(fetch(source, 0, retries, lambda found: None)) as raw:
            stream = Forward(unpack(raw)[0], 0)
            for member in tar.walk(stream, stream.skip):
                name = posixpath.basename(wanted_name(member) or "")
                if is_scene_json(name):
                    return name.removesuffix(".json"), b"".join(_bytes_of(member, stream))
    except tar.Damage as error:
        raise UserError(f"{label(source)}: {error}; get the archive again from where it was published") from None
    raise UserError(f"{label(source)}: no CLEVRTEX*.json inside; give archives of CLEVRTex")


def _list_part(source: str, part: Spool, members: Members, report: Progress, retries: Retries) -> None:
    """Adds the members of one source: those in its spool, then those that are still to come."""
    check_same(part.head or {}, name_of(source))
    path, known_as = str(part.path), label(source)

    def add(name: str, header: int, offset: int, size: int) -> None:
        members.add(known_as, name, header, Place(path, offset, size, known_as))

    for entry in part.entries:
        header = entry.next - tar.padding(entry.size) - entry.size - tar.BLOCK
        add(entry.name, header, entry.offset, entry.size)
    if part.is_complete:
        _check_still_same(source, part)
    else:
        _read_on(source, part, add, report, retries)
        part.finish()


def _check_still_same(source: str, part: Spool) -> None:
    """Raises Changed where a source is another than its complete spool was made from, as far as it can be asked."""
    with (
        suppress(UserError),
        closing(fetch(source, 0, Retries(1), lambda found: check_same(part.head or {}, found))) as raw,
    ):
        next(raw, None)  # one that is gone, or out of reach, is not needed any more


def _read_on(
    source: str, part: Spool, add: Callable[[str, int, int, int], None], report: Progress, retries: Retries
) -> None:
    """Reads a source to its end; members that the spool lacks are added and appended to it."""
    known = tuple(part.entries)
    identity: dict[str, str | int | None] = {}

    def meet(found: Identity) -> None:
        check_same(part.head or {}, found)
        identity.update(found)

    start = known[-1].next if part.head and known and not part.head["packed"] else 0

    def counted(raw: Iterator[bytes]) -> Iterator[bytes]:
        done = start
        for piece in raw:
            done += len(piece)
            report(label(source), done, int(identity.get("size") or 0))
            yield piece

    with closing(fetch(source, start, retries, meet)) as raw:
        pieces, is_packed = (counted(raw), False) if start else unpack(counted(raw))
        if not part.head:
            part.begin({**name_of(source), **identity, "packed": is_packed})
        stream = Forward(pieces, start)
        passed = iter(() if start else known)
        for member in tar.walk(stream, stream.skip):
            name = wanted_name(member)
            if name is None:
                continue
            next_header = member.offset + member.size + tar.padding(member.size)
            if entry := next(passed, None):
                _check_entry(entry, name, _bytes_of(member, stream), next_header)
            else:
                add(name, member.offset - tar.BLOCK, part.end, member.size)
                part.append(name, _bytes_of(member, stream), next_header)
        if next(passed, None):
            raise Changed("it has fewer members than it had")


def _check_entry(entry: Entry, name: str, pieces: Iterator[bytes], next_header: int) -> None:
    """Raises Changed where a member is not the one that an earlier run has copied."""
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    if (entry.name, entry.next, entry.xxh3) != (name, next_header, digest.intdigest()):
        raise Changed(f"it has {name} where it had {entry.name}, or other bytes in it")


def _bytes_of(member: tar.Member, stream: Forward) -> Iterator[bytes]:
    yield from stream.pieces(member.size)
    if stream.tell() != member.offset + member.size:
        raise tar.Damage(f"it ends at offset {stream.tell()} in the middle of {member.name}, so it was cut")
