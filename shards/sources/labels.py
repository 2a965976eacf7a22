"""The label files of the public NSI code: `{train,val,test}_labels.npy`, read without running anything in them.

Such a file is a numpy array of Python lists, which numpy keeps as a pickle, and unpickling runs whatever the file
asks for. Here the pickle is replayed as a record instead: a name stands for itself, a call notes its name and its
arguments, and the few names that numpy's own arrays need are made into numbers afterwards. Any other name is refused.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.lib import format as npy

from nsi.errors import UserError
from nsi.schema import LABELS, Primitive

_NUMBERS = "iuf"  # the kinds of dtypes that a label may have
_ARRAY, _DTYPE, _SCALAR, _ENCODE = "array", "dtype", "scalar", "encode"
_KNOWN = {
    ("numpy", "ndarray"): _ARRAY,
    ("numpy", "dtype"): _DTYPE,
    ("numpy.core.multiarray", "_reconstruct"): _ARRAY,  # numpy 1
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "_reconstruct"): _ARRAY,  # numpy 2
    ("numpy._core.multiarray", "scalar"): _SCALAR,
    ("_codecs", "encode"): _ENCODE,  # how old pickles write bytes
}


def read_labels(path: Path) -> list[list[Primitive]]:
    """The primitives of every scene of a label file, in the file's order.

    Raises UserError, with the scene's number, where the file is damaged, asks for code to be run, or holds anything
    but lists of (size id, shape id, material id, x, y, z).
    """
    try:
        with path.open("rb") as file:
            scenes = _read_array(file, path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore the file") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path}: damaged, or no label file ({type(error).__name__}); restore the file") from None
    return [_scene(scene, f"{path}: scene {number}") for number, scene in enumerate(scenes)]


def _read_array(file: BinaryIO, path: Path) -> Sequence[Any]:
    """The scenes as the file has them: sequences of sequences of numbers, all still to be checked."""
    version = npy.read_magic(file)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
    shape, fortran, dtype = read_header(file)
    if dtype == np.dtype(object):
        array = _Replay(file, path).load()
        if not isinstance(array, _Call) or array.state[1] != shape:
            raise ValueError("the header has another shape than the array")
        return _array(array)
    # Scenes with equally many objects: numpy has made one array of numbers of them.
    size, left = math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size - file.tell()
    if dtype.kind not in _NUMBERS or size != left:
        raise UserError(f"{path}: says it holds {shape} of {dtype}, and holds {left} bytes; restore the file")
    return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C").tolist()


@dataclass(frozen=True)
class _Name:
    """A function or type that the pickle names. Calling it makes a note of the call."""

    name: str

    def __call__(self, *arguments: Any) -> _Call:
        return _Call(self.name, arguments)


@dataclass
class _Call:
    """What the pickle would have called, and the state it would have given to the result."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


def _set_state(replay: Any) -> None:
    """BUILD, which otherwise calls methods and sets attributes of whatever it finds."""
    state = replay.stack.pop()
    if not isinstance(replay.stack[-1], _Call):
        raise ValueError("a state for something that is no array")
    replay.stack[-1].state = state


def _refuse(replay: Any) -> None:
    raise ValueError("an instruction that no label needs")


class _Replay(pickle._Unpickler):
    """Unpickles to numbers, strings, lists and calls that were not made.

    The unpickler in Python rather than the one in C, since its every instruction can be replaced, and since memory
    follows the file's size, not numbers that the file claims. It reads 50,000 scenes in a few seconds.
    """

    dispatch: ClassVar = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: _set_state,
        pickle.EXT1[0]: _refuse,  # these three name things without find_class
        pickle.EXT2[0]: _refuse,
        pickle.EXT4[0]: _refuse,
        pickle.BYTEARRAY8[0]: _refuse,  # fills as much memory as the file claims
    }

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> _Name:
        if known := _KNOWN.get((module, name)):
            return _Name(known)
        raise UserError(
            f"{self._path}: asks for {f'{module}.{name}'[:200]!r}, which no label needs, so it may mean harm; nothing "
            "of it was run: make the file again from the scenes, and do not np.load this one"
        )


def _array(call: _Call) -> list[Any]:
    """An array's content as nested lists, from the call and the state that would have made it."""
    _, shape, described, fortran, content = call.state
    dtype = _dtype(described)
    if dtype == np.dtype(object):
        if not isinstance(content, list) or len(content) != math.prod(shape):
            raise ValueError("an array of another size than its content")
        for width in reversed(shape[1:]):
            content = [content[begin : begin + width] for begin in range(0, len(content), width)]
        return content
    return np.frombuffer(_bytes(content), dtype).reshape(shape, order="F" if fortran else "C").tolist()


def _dtype(call: _Call) -> np.dtype:
    code, order = call.arguments[0], call.state[1]
    if call.name != _DTYPE or not re.fullmatch(rf"O8|[{_NUMBERS}][1248]", code) or order not in ("<", ">", "|", "="):
        raise ValueError("an array of something other than numbers")
    return np.dtype(f"{order}{code}")


def _bytes(content: Any) -> Any:
    is_encoded = isinstance(content, _Call) and content.name == _ENCODE
    return content.arguments[0].encode("latin1") if is_encoded else content


def _items(value: Any) -> Sequence[Any]:
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, _Call) and value.name == _ARRAY:
        return _array(value)
    raise ValueError("neither a list nor an array")


def _number(value: Any) -> Any:
    if isinstance(value, _Call) and value.name == _SCALAR:
        dtype, content = value.arguments
        (value,) = np.frombuffer(_bytes(content), _dtype(dtype)).tolist()
    if type(value) is not float and not (type(value) is int and -(2**63) <= value < 2**63):
        raise ValueError("no number")
    return value


def _scene(scene: Any, where: str) -> list[Primitive]:
    """One scene's primitives, checked."""
    try:
        rows = [[_number(value) for value in _items(row)] for row in _items(scene)]
    except Exception:  # its arrays are not looked into before now, and may be damaged in any way
        raise UserError(f"{where} is not a list of objects of six numbers each; restore the file") from None
    if not rows:
        raise UserError(f"{where} has no objects; restore the file, or remove the scene here and from the images")
    return [_primitive(row, f"{where}: object {place}") for place, row in enumerate(rows)]


def _primitive(row: list[int | float], where: str) -> Primitive:
    if len(row) != 6:
        raise UserError(f"{where} has {len(row)} numbers, not size, shape, material, x, y and z; restore the file")
    *ids, x, y, z = row
    for label, value in zip(LABELS, ids, strict=True):
        if not float(value).is_integer() or value < 0:
            raise UserError(f"{where}: its {label} id is {value!r}, not a number from 0; restore the file")
    if not all(map(math.isfinite, (x, y, z))):
        raise UserError(f"{where}: its position is ({x}, {y}, {z}), not three finite numbers; restore the file")
    size, shape, material = map(int, ids)
    return Primitive(size, shape, material, (float(x), float(y), float(z)))
