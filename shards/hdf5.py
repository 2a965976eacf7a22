"""Shards back to the files that the public NSI code trains from; `shards/sources/legacy.py` draws them.

    OUT/images.h5               written last: a folder that has it is complete
    OUT/.unfinished-SOURCE/     all of them, while a run is on its way; SOURCE are the shards and the size

`images.h5` notes its SOURCE too, where the public code does not look.
"""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nsi.errors import UsageError, UserError
from nsi.schema import Vocabulary
from shards.decode import decode_image
from shards.manifest import read_manifest
from shards.reading.dataset import Split, open_split
from shards.schema_json import decode_schema
from shards.sources.legacy import (
    IMAGES,
    KINDS,
    LABEL_TO_PROGRAM,
    PROGRAM_TO_LABEL,
    SPLITS,
    labels_name,
    open_images,
)
from shards.writing.disk import held, sync

PUBLIC_SIZE = 128  # what the public build script squashes pictures to
PROGRAM_SPACE = "program_space.json"
_UNFINISHED = ".unfinished-"
_SOURCE = "source"  # the attribute of images.h5 that says what it was made from
_PIXEL_BYTES = 3 * 8  # float64


def write_hdf5(shards: Path, out: Path, size: int = PUBLIC_SIZE, *, report: Callable[[int], None]) -> None:
    """Writes the splits train, val and test of some shards, pictures squashed to size x size pixels.

    Memory holds one picture and the labels of one split (about 2 KB a scene: the format has them in one piece). A
    run that was cut begins again; a folder that is complete is left as it is. `report` is told how many scenes are
    done. Raises UserError where OUT holds anything else, where another run is writing in it, or where it cannot be
    written.
    """
    if size < 1:
        raise UsageError(f"pictures of {size} pixels: give 1 or more, {PUBLIC_SIZE} as the public code does")
    manifest = read_manifest(shards)
    splits = [open_split(shards, name) for name in SPLITS if name in manifest.splits]
    if not splits:
        raise UserError(f"{shards}: has none of the splits {', '.join(SPLITS)}; shard the scenes with a rule that cuts")
    names = [PROGRAM_SPACE, PROGRAM_TO_LABEL, LABEL_TO_PROGRAM, *(labels_name(split.name) for split in splits), IMAGES]
    source = f"{manifest.fingerprint[:16]}-{size}"
    if _is_complete(out, names, source):
        report(sum(map(len, splits)))
        return
    _check_target(out, source)
    try:
        unfinished = out / f"{_UNFINISHED}{source}"
        unfinished.mkdir(parents=True, exist_ok=True)
        with held(out, shared=False):
            (unfinished / IMAGES).unlink(missing_ok=True)  # before the free space is counted
            _check_space(out, sum(map(len, splits)) * size**2 * _PIXEL_BYTES)
            _write_names(unfinished, manifest.vocabulary)
            _write_scenes(unfinished, splits, size, source, report)
            for name in names:
                (unfinished / name).rename(out / name)
                sync(out)  # so that no crash leaves the images alone
            shutil.rmtree(unfinished)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"{error.filename or out}: cannot be written ({reason}); mend that and run the same command again"
        ) from error


def _write_scenes(folder: Path, splits: Sequence[Split], size: int, source: str, report: Callable[[int], None]) -> None:
    """Writes images.h5 and the label files, sample by sample."""
    import h5py  # here, so that other verbs need not load it

    done = 0
    with _Disk(folder / IMAGES, "w+") as disk:
        with h5py.File(disk, "w") as file:
            file.attrs[_SOURCE] = source
            for split in splits:
                images = file.create_dataset(split.name, (len(split), size, size, 3), np.float64)
                labels = np.empty(len(split), object)  # filled one by one: numpy would make 3-D of equal lengths
                for sample in range(len(split)):
                    images[sample], labels[sample] = _decode(split, sample, size)
                    disk.raise_failure()
                    done += 1
                    report(done)
                with (folder / labels_name(split.name)).open("wb") as label_file:
                    np.save(label_file, labels, allow_pickle=True)
                    _flush(label_file)
        disk.raise_failure()
        os.fsync(disk.fileno())


def _decode(split: Split, sample: int, size: int) -> tuple[np.ndarray, list[list[float]]]:
    """The picture (size, size, 3) in [0, 1], and for each object size, shape and material id, x, y and z."""
    pixels_HW3 = split.decode(sample, "image", functools.partial(decode_image, size=size))
    primitives = split.decode(sample, "json", decode_schema).primitives
    return pixels_HW3 / 255, [[each.size, each.shape, each.material, *map(float, each.position)] for each in primitives]


class _Disk(io.FileIO):
    """A file whose failures HDF5 does not see, since it crashes the process on a full disk; they are kept for us."""

    _failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        left = memoryview(data).cast("B")
        try:
            while left and not self._failure:
                left = left[super().write(left) :]
        except OSError as error:
            self._failure = error
        return memoryview(data).nbytes

    def truncate(self, size: int | None = None, /) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self._failure = self._failure or error
            return self.tell()

    def raise_failure(self) -> None:
        """Raises the first failure, if there was one."""
        if self._failure:
            raise self._failure


def _write_names(folder: Path, vocabulary: Vocabulary) -> None:
    """The three JSONs that say what ids mean: the places of the vocabulary's names."""
    names = dict(zip(KINDS, vocabulary.names(), strict=True))
    contents = {
        PROGRAM_SPACE: {kind: names[kind] for kind in ("shapes", "sizes", "materials")},
        PROGRAM_TO_LABEL: {kind: {name: place for place, name in enumerate(names[kind])} for kind in KINDS},
        LABEL_TO_PROGRAM: {kind: dict(enumerate(names[kind])) for kind in KINDS},  # JSON makes strings of these ids
    }
    for name, content in contents.items():
        with (folder / name).open("w") as file:
            json.dump(content, file)
            _flush(file)


def _is_complete(out: Path, names: Sequence[str], source: str) -> bool:
    """Whether an earlier run has written everything. Raises UserError where OUT has other images."""
    if not (out / IMAGES).exists():
        return False
    with open_images(out / IMAGES) as file:
        same = file.attrs.get(_SOURCE) == source
    if not same or not all((out / name).exists() for name in names):
        raise UserError(f"{out}: holds the files of other shards or another size; choose another folder")
    shutil.rmtree(out / f"{_UNFINISHED}{source}", ignore_errors=True)
    return True


def _check_target(out: Path, source: str) -> None:
    """Raises UserError where OUT is there and holds something else than what a run on its way left."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose a folder to write to")
    if out.exists() and not (out / f"{_UNFINISHED}{source}").exists():
        names = [path.name for path in out.iterdir()]
        if any(name.startswith(_UNFINISHED) for name in names):
            raise UserError(f"{out}: was begun with other shards or another size; remove it or choose another folder")
        if names:
            raise UserError(f"{out}: is not empty; choose another folder")


def _check_space(out: Path, wanted: int) -> None:
    """Raises UserError where the pictures will not fit, now rather than in an hour."""
    if (free := shutil.disk_usage(out).free) < wanted:
        raise UserError(
            f"{out}: the pictures need {wanted / 1e9:.1f} GB and there are {free / 1e9:.1f} GB free; make room, or "
            "choose another folder or size"
        )


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
