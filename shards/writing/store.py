"""Writes a feature store: shards like those of images, each image's place taken by the features made of it.

    OUT/train-000000.tar        KEY.features.safetensors and KEY.json of the same scenes, in the same order
    OUT/train-000000.index.npy  as beside shards of images
    OUT/manifest.json           written last, with what the features are: a folder that has it is complete
    OUT/.unfinished/            while some shards are missing: what is to be written, and a note a finished shard

A shard depends on its scenes alone, so any number of parts and interruptions give the same folder. The JSONs are
copied, so that training reads a scene in one piece.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from nsi.errors import UserError
from shards import tar
from shards.index import JSON_SUFFIX, MemberPlace, index_bytes, index_path, make_index
from shards.manifest import MANIFEST, Manifest, Shard, ShardTable, StoredFeatures, read_manifest, write_manifest
from shards.temporary import remove_leftovers, temporary_mark
from shards.tokens import TOKENS_SUFFIX, Tokens, encode_tokens
from shards.writing.disk import cannot_write, sync, write_file
from shards.writing.flow import TarFlow
from shards.writing.target import PLAN, UNFINISHED, check_target, finished

_HASH_DIGITS = 64
_ERRORS = ("relative_rms_error", "largest_error")  # known at the end alone


class StoredScene(NamedTuple):
    """What is written of a scene."""

    tokens: Tokens
    json: bytes


class ErrorSums(NamedTuple):
    """What the storage's error is made of: sums over features, and the largest error of one."""

    squared_error: float = 0.0
    squares: float = 0.0
    largest: float = 0.0
    numbers: int = 0

    def plus(self, other: ErrorSums) -> ErrorSums:
        """Both together."""
        largest = max(self.largest, other.largest)
        return ErrorSums(
            self.squared_error + other.squared_error,
            self.squares + other.squares,
            largest,
            self.numbers + other.numbers,
        )


def planned_store(data: Manifest, transform: str, features: StoredFeatures) -> Manifest:
    """The manifest of a store of which no shard is written yet. `data`: that of the shards it is made of."""
    return replace(
        data, source=data.fingerprint, transform=transform, features=features, mask_size=None, splits={}, fingerprint=""
    )


def describe_store(manifest: Manifest) -> dict[str, Any]:
    """What a store is made of, by name: two that agree in it hold the same features."""
    facts = {name: value for name, value in vars(manifest.features).items() if name not in _ERRORS}
    return {"data": manifest.source, "transform": manifest.transform, **facts, "grid": list(facts["grid"])}


def begin_store(out: Path, planned: Manifest) -> Manifest | None:
    """Makes or continues OUT; the manifest of one that is complete. UserError where it holds anything else."""
    if manifest := finished(out):
        if manifest.features is None:
            raise UserError(f"{out}: holds shards of images; choose another folder for their features")
        _check_same(out, "holds", describe_store(manifest), describe_store(planned))
        return manifest
    check_target(out)
    plan = out / UNFINISHED / PLAN
    try:
        if plan.exists():
            _check_same(out, "was begun with", json.loads(plan.read_text()), describe_store(planned))
        plan.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        write_file(plan, json.dumps(describe_store(planned)).encode(), synced=True)
    except OSError as error:
        raise cannot_write(out, error) from error
    return None


def is_written(out: Path, shard: Shard) -> bool:
    """Whether the features of a shard's scenes are there, whole."""
    return _read_note(out, shard) is not None


class StoreWriter:
    """Writes shards, one after another. One thread at a time may use it."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._open: _OpenShard | None = None

    def write(self, name: str, scenes: Iterable[StoredScene], sums: ErrorSums, is_last: bool) -> None:
        """Adds scenes to a shard; with the last ones it is finished. Raises UserError where it cannot be written."""
        try:
            if self._open is None:
                self._open = _OpenShard(self._out / name)
            for scene in scenes:
                self._open.add(scene)
            self._open.sums = self._open.sums.plus(sums)
            if is_last:
                self._open.finish()
                self._open = None
        except OSError as error:
            if not (isinstance(error, FileNotFoundError) and (self._out / MANIFEST).exists()):
                raise cannot_write(self._out, error) from error
            self.close()  # another run beside this one was first, and has tidied up: all shards are there
            self._open = None

    def close(self) -> None:
        """Removes the shard that is not finished."""
        if self._open:
            self._open.discard()


class _OpenShard:
    """A tar under a temporary name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f"{path.name}.{temporary_mark()}")
        self._file = self._temporary.open("wb", buffering=0)
        self._flow = TarFlow(self._file.fileno())
        self._places: dict[str, dict[str, MemberPlace]] = {}
        self.sums = ErrorSums()

    def add(self, scene: StoredScene) -> None:
        key = scene.tokens.key
        places = self._places[key] = {}
        members = (("image", TOKENS_SUFFIX, encode_tokens(scene.tokens)), ("json", JSON_SUFFIX, scene.json))
        for member, suffix, data in members:
            self._flow.begin(len(data))[:] = data
            try:
                places[member] = self._flow.end(f"{key}.{suffix}")
            except tar.Damage as error:
                raise UserError(f"{self._path}: {error}; shard the scenes again under shorter names") from None

    def finish(self) -> None:
        """Syncs the tar and gives it its name; the note is last, so tar and index are whole."""
        size, digest = self._flow.finish()
        self._file.close()
        index, path = index_bytes(make_index(self._places)), self._path
        shard = Shard(path.name, len(self._places), size, digest, hashlib.sha256(index).hexdigest())
        sync(self._temporary)
        write_file(index_path(path), index, synced=True)
        self._temporary.rename(path)
        note = json.dumps({"shard": shard, "sums": self.sums}).encode()
        write_file(_note(path.parent, path.name), note, synced=True)

    def discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def finish_store(out: Path, planned: Manifest, tables: Sequence[ShardTable]) -> Manifest | None:
    """Writes the manifest over all shards; None where some are missing still. `tables`: those they were made of.

    Several parts may come to it at the same time: they write the same bytes.
    """
    notes = [[_read_note(out, shard) for shard in table] for table in tables]
    if not all(note for part in notes for note in part):
        return finished(out)  # another part may have been first, and has taken the notes away
    sums = ErrorSums()
    for note in (note for part in notes for note in part if note):
        sums = sums.plus(note.sums)
    assert planned.features is not None
    rms = math.sqrt(sums.squares / sums.numbers) or 1.0
    errors = (math.sqrt(sums.squared_error / sums.numbers) / rms, sums.largest / rms)
    # Four digits: the others change with the number of threads that summed up.
    features = replace(planned.features, **{name: float(f"{e:.4g}") for name, e in zip(_ERRORS, errors, strict=True)})
    splits = {
        table.split: ShardTable.of(table.split, [note.shard for note in part if note])
        for table, part in zip(tables, notes, strict=True)
    }
    try:
        write_manifest(out, replace(planned, features=features, splits=splits))
        sync(out)
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # another part may be at it too
    except OSError as error:
        raise cannot_write(out, error) from error
    return read_manifest(out)


class _Note(NamedTuple):
    shard: Shard
    sums: ErrorSums


def _note(out: Path, name: str) -> Path:
    return out / UNFINISHED / f"{name}.json"


def _read_note(out: Path, source: Shard) -> _Note | None:
    """The note of a finished shard; None where it is not finished, or not whole."""
    path = out / source.name
    try:
        content = json.loads(_note(out, source.name).read_text())
        note = _Note(Shard(*content["shard"]), ErrorSums(*content["sums"]))
        index = hashlib.sha256(index_path(path).read_bytes()).hexdigest()
        whole = path.stat().st_size == note.shard.bytes and index == note.shard.index_sha256
    except (OSError, ValueError, KeyError, TypeError):  # not written yet, or torn by a crash of the machine
        return None
    return note if whole and note.shard.samples == source.samples else None


def _check_same(out: Path, how: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    def short(value: Any) -> Any:
        return f"{value[:12]}..." if isinstance(value, str) and len(value) == _HASH_DIGITS else value

    differing = [
        f"{name} {short(found.get(name))}, not {short(value)}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if differing:
        raise UserError(f"{out}: {how} other features ({'; '.join(differing)}); choose another folder, or remove it")
