"""Writes surveyed scenes as shards, all of them or one part of many, and the manifest last.

    OUT/train-000000.tar        samples, readable by plain webdataset
    OUT/train-000000.index.npy  where each member lies, and its checksum
    OUT/manifest.json           written last: a folder that has it is complete
    OUT/.unfinished/            what is done so far, while a run is on its way: a note a shard, and what is planned

A shard's bytes depend on its scenes alone. So any number of workers, of parts, of machines and of interruptions give
the same folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nsi.errors import UserError
from nsi.schema import Vocabulary
from shards.index import INDEX_SUFFIX, index_path
from shards.manifest import MANIFEST, Manifest, Shard, ShardTable, read_manifest, write_manifest
from shards.processes import as_they_end
from shards.temporary import TEMPORARY, remove_leftovers
from shards.writing.cut import Plan, Settings, ShardPlan, cut
from shards.writing.disk import cannot_write, held, is_whole, place, sync, write_file
from shards.writing.mend import mend
from shards.writing.pack import Job, Packed, pack_shard
from shards.writing.survey import Survey
from shards.writing.target import PLAN, UNFINISHED, check_target, finished

_SYNCERS = 2  # shards that are written to the disk while the next ones are packed
Report = Callable[[int], None]


@dataclass(frozen=True)
class Part:
    """One of many that write a folder together: every `count`-th shard, beginning with number `number` from 1."""

    number: int = 1
    count: int = 1

    def share(self, shards: Sequence[Any]) -> Sequence[Any]:
        """What this part writes."""
        return shards[self.number - 1 :: self.count]


@dataclass(frozen=True)
class Note:
    """A finished shard: what it was made of, and what the manifest has to say of it."""

    scenes: str
    shard: Shard
    image_size: tuple[int, int]
    mask_size: tuple[int, int] | None
    objects: int


def write_shards(
    survey: Survey, settings: Settings, out: Path, pool: Executor, report: Report, part: Part | None = None
) -> Manifest | None:
    """Writes the shards of surveyed scenes and, last, the manifest; with a `part` its shards alone and no manifest.

    A run that was cut is continued; a folder that is complete is left as it is, but for shards that it has lost since.
    `report` is told how many scenes are done. Raises UserError where the folder holds anything else, where another run
    is writing in it, where scenes are damaged, or where it cannot be written.
    """
    plan = cut(survey, settings)
    mine = part.share(plan.shards) if part else plan.shards
    if manifest := finished(out):
        if manifest.source != plan.digest:
            raise UserError(f"{out}: holds the shards of other scenes or settings; choose another folder")
        with held(out, shared=part is not None):
            mend(out, manifest, mine, settings.transform, pool)
        report(sum(len(shard.scenes) for shard in mine))
        return manifest
    check_target(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with held(out, shared=part is not None):
            notes = _open_folder(out, survey, settings, plan, part)
            _write_missing(out, notes, mine, survey.vocabulary, settings, pool, report)
            return None if part else merge_shards(out)
    except (OSError, UserError) as error:
        if not part and (manifest := finished(out)) and manifest.source == plan.digest:
            return manifest  # a merge beside this run was first, and has taken the notes away
        raise (cannot_write(out, error) if isinstance(error, OSError) else error) from error


def count_scenes(survey: Survey, settings: Settings, part: Part | None) -> int:
    """How many scenes `write_shards` has to write."""
    return sum(len(shard.scenes) for shard in part.share(cut(survey, settings).shards)) if part else len(survey.scenes)


def merge_shards(out: Path) -> Manifest:
    """Writes the manifest over the shards of all parts. Raises UserError, naming them, where some are missing."""
    if manifest := finished(out):
        return manifest
    notes = out / UNFINISHED
    try:
        plan = json.loads((notes / PLAN).read_text())
        plan["shards"]  # a feature store under way has none
    except (OSError, ValueError, KeyError):
        raise UserError(f"{out}: holds no parts; write them with `nsi shard SOURCE {out} --part 1/N` ...") from None
    done = [_read_note(out, notes, name, scenes) for name, scenes in plan["shards"]]
    _check_all_there(out, plan, done)
    whole = [note for note in done if note]
    first = whole[0]
    for note in whole:
        if (note.image_size, note.mask_size) != (first.image_size, first.mask_size):
            raise UserError(
                f"{out / note.shard.name}: its pictures are {note.image_size[0]}x{note.image_size[1]}, those of "
                f"{first.shard.name} {first.image_size[0]}x{first.image_size[1]}; shard each data set on its own"
            )
    try:
        manifest = Manifest(
            variant=plan["variant"],
            image_size=first.image_size,
            mask_size=first.mask_size,
            max_objects=max(note.objects for note in whole),
            transform=plan["transform"],
            split_rule=plan["split_rule"],
            source=plan["digest"],
            vocabulary=Vocabulary(**{name: tuple(names) for name, names in plan["vocabulary"].items()}),
            splits={
                split: ShardTable.of(split, [note.shard for note in whole if _split_of(note.shard.name) == split])
                for split in dict.fromkeys(_split_of(note.shard.name) for note in whole)
            },
        )
        _remove_strangers(out, notes, {note.shard.name for note in whole})
        write_manifest(out, manifest)
        sync(out)
        shutil.rmtree(notes)
    except OSError as error:
        raise cannot_write(out, error) from error
    return read_manifest(out)


def _write_missing(
    out: Path,
    notes: Path,
    shards: Sequence[ShardPlan],
    vocabulary: Vocabulary,
    settings: Settings,
    pool: Executor,
    report: Report,
) -> None:
    digests = {shard.name: shard.digest for shard in shards}
    missing = [shard for shard in shards if not _read_note(out, notes, shard.name, shard.digest)]
    done = sum(len(shard.scenes) for shard in shards) - sum(len(shard.scenes) for shard in missing)
    report(done)
    jobs = [Job(str(out), shard, vocabulary, settings.transform) for shard in missing]
    # The disk is waited for here, by threads, so that the workers pack the next shards meanwhile.
    with ThreadPoolExecutor(_SYNCERS) as syncers:
        waiting: list[Future[int]] = []
        for packed in as_they_end(pool, pack_shard, jobs):
            waiting.append(syncers.submit(_finish, out, notes, packed, digests[packed.shard.name]))
            for finished in [each for each in waiting if each.done()]:
                waiting.remove(finished)
                done += finished.result()
                report(done)
        for each in waiting:
            done += each.result()
            report(done)


def _finish(out: Path, notes: Path, packed: Packed, scenes: str) -> int:
    """Syncs a packed shard and gives it its name; the note is last, so tar and index are whole. Returns its samples."""
    try:
        place(out, packed)
        note = Note(scenes, packed.shard, packed.image_size, packed.mask_size, packed.objects)
        write_file(notes / f"{packed.shard.name}.json", json.dumps(asdict(note)).encode(), synced=False)
    except FileNotFoundError:
        if not (out / MANIFEST).exists():
            raise
        # Another run beside this one was first, and has tidied up: all shards are there, and they are the same.
    return packed.shard.samples


def _read_note(out: Path, notes: Path, name: str, scenes: str) -> Note | None:
    """The note of a shard that is done; None where it is not, or was made of other scenes."""
    try:
        content = json.loads((notes / f"{name}.json").read_text())
        note = Note(
            content["scenes"],
            Shard(*content["shard"]),
            tuple(content["image_size"]),
            tuple(content["mask_size"]) if content["mask_size"] else None,
            content["objects"],
        )
    except (OSError, ValueError, KeyError, TypeError):  # not written yet, or torn by a crash of the machine
        return None
    return note if note.scenes == scenes and is_whole(out, note.shard) else None


def _open_folder(out: Path, survey: Survey, settings: Settings, plan: Plan, part: Part | None) -> Path:
    """Begins or continues OUT and returns its folder of notes. Raises UserError where it was begun with others."""
    notes = out / UNFINISHED
    notes.mkdir(exist_ok=True)
    remove_leftovers(out)
    content = {
        "variant": survey.variant,
        "settings": str(settings),
        "parts": part.count if part else 0,
        "split_rule": plan.split_rule,
        "transform": settings.transform.describe(),
        "digest": plan.digest,
        "vocabulary": asdict(survey.vocabulary),
        "shards": [(shard.name, shard.digest) for shard in plan.shards],
    }
    _check_begun(out, notes / PLAN, content, part)
    write_file(notes / PLAN, json.dumps(content).encode(), synced=True)
    return notes


def _check_begun(out: Path, path: Path, content: dict[str, Any], part: Part | None) -> None:
    """Raises UserError where the folder was begun with something that does not go together with this run.

    Scenes that were mended since are no such thing, but where parts work side by side they must all see the same.
    """
    if not path.exists():
        return
    begun = json.loads(path.read_text())
    if any(begun.get(name) != content[name] for name in ("variant", "settings")):
        raise UserError(f"{out}: was begun with other scenes or settings; remove it or choose another folder")
    if part and begun["parts"] and begun["digest"] != content["digest"]:
        raise UserError(
            f"{out}: part {part.number}/{part.count} sees other scenes than the parts before it; give all the same "
            f"source, or remove {out / UNFINISHED} to begin again"
        )
    if part and begun["parts"] not in (0, part.count):
        raise UserError(f"{out}: was begun in {begun['parts']} parts, not {part.count}; keep their number")


def _check_all_there(out: Path, plan: dict[str, Any], done: list[Note | None]) -> None:
    missing = [number for number, note in enumerate(done) if note is None]
    if not missing:
        return
    names = [plan["shards"][number][0] for number in missing]
    parts = plan["parts"]
    which = f"part {', '.join(f'{i + 1}/{parts}' for i in sorted({n % parts for n in missing}))}: " if parts else ""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise UserError(
        f"{out}: {len(missing)} of {len(done)} shards are missing ({which}{shown}); write them, then merge again"
    )


def _split_of(name: str) -> str:
    return name.rpartition("-")[0]


def _remove_strangers(out: Path, notes: Path, names: set[str]) -> None:
    """Removes shards that we wrote and that the plan has no more (a scene was taken out), and temporary files.

    All shards are there by now, so nobody needs what he is writing still.
    """
    for note in notes.glob("*.tar.json"):
        name = note.name.removesuffix(".json")
        if name not in names:
            (out / name).unlink(missing_ok=True)
            index_path(out / name).unlink(missing_ok=True)
    for pattern in (f"*-*.tar.*{TEMPORARY}", f"*-*{INDEX_SUFFIX}.*{TEMPORARY}"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)
