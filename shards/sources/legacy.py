"""The files that the public NSI code trains from, as a source of scenes.

    FOLDER/images.h5                      data sets train, val, test: (n, H, W, 3), floats in [0, 1] or uint8
    FOLDER/{train,val,test}_labels.npy    a scene a row: a list of (size id, shape id, material id, x, y, z)
    FOLDER/label2program.json, program2label.json    {"sizes": {id: name}, ...} and its inverse

The public build script numbers materials as `os.listdir` gives them, so ids mean what the JSONs beside them say and
nothing else. `program_space.json` says the same a third time and is not read. There are no masks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import xxhash

from nsi.errors import UserError
from nsi.schema import Primitive
from shards.picture import PIXEL_LIMIT
from shards.sources.labels import read_labels
from shards.sources.listing import Names
from shards.sources.scene import HdfRow, Scene

if TYPE_CHECKING:
    import h5py

IMAGES = "images.h5"
SPLITS = ("train", "val", "test")
KINDS = ("sizes", "shapes", "materials")  # in the order of a label's ids
LABEL_TO_PROGRAM, PROGRAM_TO_LABEL = "label2program.json", "program2label.json"
_ROUNDING = 1e-6  # how far a float32 that was resized may lie outside [0, 1]

_Vocabulary = tuple[Mapping[int, str], ...]  # id to name, for each of KINDS


def labels_name(split: str) -> str:
    """The file that holds a split's labels."""
    return f"{split}_labels.npy"


def is_legacy(folder: Path) -> bool:
    """Whether a folder holds the public code's files."""
    return (folder / IMAGES).is_file()


def list_legacy(folder: Path) -> tuple[list[Scene], Names]:
    """Every scene of the three splits, numbered through in the order train, val, test, and the names they use.

    A split that has neither pictures nor labels is passed over. Of each picture a few lines are read. Raises
    UserError, naming the file and the scene, for anything that training could not use.
    """
    vocabulary = _read_vocabulary(folder)
    sizes = _picture_sizes(folder)
    scenes: list[Scene] = []
    names = Names({}, {}, {})
    for split in SPLITS:
        if (labels_path := folder / labels_name(split)).exists() != (split in sizes):
            missing = labels_path if split in sizes else f"{folder / IMAGES}: its data set {split!r}"
            raise UserError(f"{missing} is missing, and the rest of the split is there; restore it")
        if split not in sizes:
            continue
        rows, size = sizes[split]
        labels = read_labels(labels_path)
        if len(labels) != rows:
            raise UserError(
                f"{labels_path}: has {len(labels)} scenes, but {IMAGES} has {rows} pictures in {split!r}; "
                "take both from one run of the build script"
            )
        glimpses = _glimpses(folder / IMAGES, split)
        for row, (primitives, glimpse) in enumerate(zip(labels, glimpses, strict=True)):
            where = f"{labels_path}: scene {row}"
            data = _scene_json(primitives, len(scenes), vocabulary, names, where)
            image = HdfRow(str(folder / IMAGES), split, row, size, glimpse)
            key, digest = f"LEGACY_{split}_{row:06d}", xxhash.xxh3_128_digest(data)
            scenes.append(Scene(key, len(scenes), data, image, None, len(primitives), "full", digest, split))
    if not scenes:
        raise UserError(f"{folder / IMAGES}: holds no pictures in {', '.join(SPLITS)}; restore the file")
    return scenes, names


def read_rows(rows: Sequence[HdfRow]) -> Iterator[np.ndarray]:
    """The pictures of some rows, (H, W, 3) uint8 each. A file is opened once for rows that follow one another.

    Raises UserError, naming the row, for values that are no colours.
    """
    for path, group in groupby(rows, key=lambda row: row.path):
        with open_images(Path(path)) as file:
            for row in group:
                where = f"{path}: {row.split}[{row.row}]"
                images = _data_set(file, row.split, path)
                if row.row >= len(images):
                    raise UserError(f"{where} is missing, the data set has {len(images)} rows; restore the file")
                yield _to_bytes(_pixels(images, row.row, 1, where), where)


def read_row(row: HdfRow) -> np.ndarray:
    """The picture of one row, (H, W, 3) uint8. Raises UserError as `read_rows` does."""
    (pixels_HW3,) = read_rows([row])
    return pixels_HW3


@contextmanager
def open_images(path: Path) -> Iterator[h5py.File]:
    """An `images.h5`, open for reading. Raises UserError where it cannot be."""
    import h5py  # here, so that other sources need not load it

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else "it is no HDF5 file, or was cut"
        raise UserError(f"{path}: cannot be read ({reason}); restore the file") from None
    with file:
        yield file


def _picture_sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """How many pictures each split has, and how many bytes each of them."""
    with open_images(folder / IMAGES) as file:
        found = {split: _data_set(file, split, str(folder / IMAGES)) for split in SPLITS if split in file}
        return {split: (len(images), int(np.prod(images.shape[1:]))) for split, images in found.items()}


def _glimpses(path: Path, split: str) -> Iterator[bytes]:
    """A digest over about four lines of each picture of a split: other pictures, made later, have others."""
    with open_images(path) as file:
        images = _data_set(file, split, str(path))
        for row in range(len(images)):
            lines_LW3 = _pixels(images, row, max(1, images.shape[1] // 4), f"{path}: {split}[{row}]")
            yield xxhash.xxh3_128_digest(lines_LW3.tobytes())


def _pixels(images: Any, row: int, every: int, where: str) -> np.ndarray:
    """Every `every`-th line of a picture. Raises UserError where it cannot be read."""
    try:
        return images[row, ::every]
    except (OSError, RuntimeError) as error:
        raise UserError(f"{where} cannot be read ({_first_line(error)}); restore the file") from None


def _data_set(file: h5py.File, split: str, path: str) -> Any:
    try:
        images: Any = file[split]
        shape, dtype = images.shape or (), images.dtype
    except (KeyError, AttributeError, OSError, RuntimeError):
        raise UserError(f"{path}: has no data set {split!r}; restore the file") from None
    is_picture = len(shape) == 4 and shape[3] == 3 and 0 < shape[1] * shape[2] <= PIXEL_LIMIT
    if not is_picture or not (dtype.kind == "f" or dtype == np.uint8):
        raise UserError(
            f"{path}: {split} has shape {shape} of {dtype}, not (n, height, width, 3) of floats or uint8; "
            "make it again from the scenes"
        )
    return images


def _to_bytes(pixels_HW3: np.ndarray, where: str) -> np.ndarray:
    if pixels_HW3.dtype == np.uint8:
        return pixels_HW3
    low, high = pixels_HW3.min(), pixels_HW3.max()
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN fails it too
        raise UserError(f"{where} has values from {low:.6g} to {high:.6g}, not from 0 to 1; make it again")
    return np.rint(pixels_HW3.astype(np.float64) * 255).clip(0, 255).astype(np.uint8)


def _scene_json(
    primitives: Sequence[Primitive], index: int, vocabulary: _Vocabulary, names: Names, where: str
) -> bytes:
    """What CLEVRTex's own JSON would say of a scene, as far as its labels tell; `names` takes the names in."""
    objects = []
    for place, primitive in enumerate(primitives):
        size, shape, material = (
            _name(known, label, kind, f"{where}: object {place}")
            for known, label, kind in zip(
                vocabulary, (primitive.size, primitive.shape, primitive.material), KINDS, strict=True
            )
        )
        for seen, name in zip(names, (size, shape, material), strict=True):
            seen.setdefault(name, where)
        labels = {"shape": shape, "size": size, "material": material}
        objects.append({**labels, "3d_coords": primitive.position, "index": place + 1})
    return orjson.dumps({"image_index": index, "split": "full", "objects": objects})


def _name(known: Mapping[int, str], label: int, kind: str, where: str) -> str:
    if label not in known:
        raise UserError(
            f"{where} has the {kind[:-1]} id {label}, and {LABEL_TO_PROGRAM} has no such id; "
            "take both from one run of the build script"
        )
    return known[label]


def _read_vocabulary(folder: Path) -> _Vocabulary:
    """The names of all ids, from the two JSONs, which must agree."""
    path = folder / LABEL_TO_PROGRAM
    to_name, to_id = _read_json(path), _read_json(folder / PROGRAM_TO_LABEL)
    try:
        vocabulary = tuple({int(label): name for label, name in to_name[kind].items()} for kind in KINDS)
        inverse = tuple({name: label for label, name in known.items()} for known in vocabulary)
        agree = inverse == tuple(to_id[kind] for kind in KINDS)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: has no ids with names under each of {', '.join(KINDS)}; restore the file") from None
    if not all(isinstance(name, str) for known in inverse for name in known):
        raise UserError(f"{path}: has a name that is no text; restore the file")
    if not agree:
        raise UserError(f"{path}: disagrees with {PROGRAM_TO_LABEL}; take both from one run of the build script")
    return vocabulary


def _read_json(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); ids mean nothing without it, restore it") from None
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: not a JSON file ({error}); restore the file") from None


def _first_line(error: Exception) -> str:
    """HDF5's messages have several."""
    return str(error).partition("\n")[0]
