"""Label files: what any numpy has made of them, nothing in a pickle that runs, and no damage that goes unnoticed."""

from __future__ import annotations

import copyreg
import io
import math
import os
import pickle
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy

from nsi.errors import UserError
from nsi.schema import Primitive
from shards.sources.labels import read_labels
from tests.shards.legacy_files import make_scene, object_array


def header(shape: tuple[int, ...], descr: str) -> bytes:
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})  # type: ignore[arg-type]
    return file.getvalue()


@pytest.fixture
def scenes() -> list[list[list[float]]]:
    generator = np.random.default_rng(1)
    return [make_scene(generator, 3 + row) for row in range(5)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train_labels.npy"


def save(path: Path, scenes: Sequence[Any]) -> None:
    np.save(path, object_array(scenes), allow_pickle=True)


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        read_labels(path)
    text = str(error.value)
    assert "\n" not in text
    assert all(part in text for part in (str(path), *parts)), text


# What np.save may have made of labels


WAYS: dict[str, Callable[[list], Any]] = {
    "lists": lambda scene: scene,
    "tuples": lambda scene: tuple(map(tuple, scene)),
    "array": np.array,
    "Fortran array": np.asfortranarray,
    "float32": lambda scene: np.array(scene, np.float32),
    "big-endian": lambda scene: np.array(scene, ">f8"),
    "array of objects": lambda scene: np.array(scene, object),
    "Fortran array of objects": lambda scene: np.asfortranarray(np.array(scene, object)),
    "list of arrays": lambda scene: [np.array(row) for row in scene],
    "scalars": lambda scene: [[*map(np.int64, row[:3]), *map(np.float64, row[3:])] for row in scene],
}


def primitives_of(scene: list[list[float]], number: Callable[[float], Any]) -> list[Primitive]:
    return [
        Primitive(int(size), int(shape), int(material), (float(number(x)), float(number(y)), float(number(z))))
        for size, shape, material, x, y, z in scene
    ]


@pytest.mark.parametrize("way", WAYS)
def test_elements_of_every_kind(path: Path, scenes: list, way: str) -> None:
    save(path, [WAYS[way](scene) for scene in scenes])
    number = np.float32 if way == "float32" else float
    assert read_labels(path) == [primitives_of(scene, number) for scene in scenes]


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
@pytest.mark.parametrize("way", WAYS)
def test_pickles_of_old_and_new_numpy(path: Path, scenes: list, way: str, module: bytes, protocol: int) -> None:
    data = pickle.dumps(object_array([WAYS[way](scene) for scene in scenes]), protocol)
    data = data.replace(b"numpy._core", module).replace(b"numpy.core", module)
    assert module + b".multiarray\n_reconstruct" in data
    path.write_bytes(header((5,), "|O") + data)
    number = np.float32 if way == "float32" else float
    assert read_labels(path) == [primitives_of(scene, number) for scene in scenes]


@pytest.mark.parametrize("dtype", [object, np.float64, np.float32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_equal_counts_that_numpy_made_one_array_of(path: Path, dtype: Any, order: Any) -> None:
    generator = np.random.default_rng(3)
    scenes = [make_scene(generator, 4) for _ in range(6)]
    array = np.array(scenes, dtype, order=order)
    assert array.ndim == 3
    np.save(path, array, allow_pickle=True)
    number = np.float32 if dtype is np.float32 else float
    assert read_labels(path) == [primitives_of(scene, number) for scene in scenes]


# Pickles that mean harm


class Calls:
    """Unpickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def harmful(target: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would make the file `target`, and the name that each is to be refused for."""
    touch = f"open({str(target)!r}, 'w').close()"
    stack = b"\x80\x04" + b"\x8c\x02os\x8c\x06system\x93" + pickle.dumps(f"touch {target}", 4)[2:-1] + b"\x85R."
    return {
        "os.system": (pickle.dumps(Calls(os.system, f"touch {target}")), "system"),
        "inside an array": (pickle.dumps(object_array([[Calls(os.system, f"touch {target}")]])), "system"),
        "eval": (pickle.dumps(Calls(eval, touch)), "eval"),
        "exec, protocol 0": (pickle.dumps(Calls(exec, touch), 0), "exec"),
        "chain": (
            b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'touch "
            + str(target).encode()
            + b"'\ntR.",
            "getattr",
        ),
        "numpy.load": (pickle.dumps(Calls(np.load, str(target))), "load"),
        "numpy.save": (pickle.dumps(Calls(np.save, str(target), 1)), "save"),
        "numpy.memmap": (pickle.dumps(Calls(np.memmap, str(target), "u1", "w+", 0, (1,))), "memmap"),
        "numpy.fromfile": (pickle.dumps(Calls(np.fromfile, str(target))), "fromfile"),
        "a dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.", "ndarray.dump"),
        "another module's dtype": (b"cevil\ndtype\n.", "evil.dtype"),
        "INST": (b"(S'touch " + str(target).encode() + b"'\nios\nsystem\n.", "os.system"),
        "OBJ": (b"(cos\nsystem\nS'touch " + str(target).encode() + b"'\no.", "os.system"),
        "STACK_GLOBAL": (stack, "os.system"),
        "two lines": (b"\x80\x04\x8c\x04os\n1\x8c\x06system\x93.", "system"),
    }


@pytest.mark.parametrize("name", sorted(harmful(Path("x"))))
def test_nothing_in_a_pickle_runs(path: Path, name: str) -> None:
    target = path.with_name("harm")
    data, asked = harmful(target)[name]
    path.write_bytes(header((5,), "|O") + data)
    refused(path, asked, "nothing of it was run")
    assert not target.exists()


def test_the_harmful_pickle_is_harmful(tmp_path: Path) -> None:
    """Else the test above could not fail."""
    target = tmp_path / "harm"
    for name in ("os.system", "inside an array", "chain", "eval", "INST", "OBJ", "STACK_GLOBAL", "numpy.memmap"):
        pickle.loads(harmful(target)[name][0])
        assert target.exists()
        target.unlink()


def test_an_extension_code_is_no_way_around(path: Path) -> None:
    """Codes that this process knows name functions without asking; none are registered unless somebody does."""
    target, code = path.with_name("harm"), 240
    call = b"\x80\x02\x82" + bytes([code]) + b"(S'touch " + str(target).encode() + b"'\ntR."
    copyreg.add_extension("os", "system", code)  # type: ignore[arg-type]
    try:
        pickle.loads(call)  # and now it is cached
        target.unlink()
        path.write_bytes(header((5,), "|O") + call)
        refused(path, "damaged")
    finally:
        copyreg.remove_extension("os", "system", code)  # type: ignore[arg-type]
    assert not target.exists()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"cnumpy\nndarray\n(I1000000000000\nt(cnumpy\ndtype\n(S'f8'\ntRtR.", id="an array with no state"),
        pytest.param(b"cnumpy\nndarray\n(NS'x'\nK\x01sb.", id="a state for a name"),
        pytest.param(b"cnumpy\nndarray\nN}S'__call__'\ncnumpy\ndtype\ns\x86b.", id="attributes for a name"),
        pytest.param(b"\x80\x02cnumpy\nndarray\n)\x81.", id="NEWOBJ"),
        pytest.param(b"\x80\x02\x82\x01.", id="EXT1"),
        pytest.param(b"\x80\x05\x96" + (1 << 28).to_bytes(8, "little") + b".", id="a huge bytearray"),
        pytest.param(b"\x80\x04\x8e" + (1 << 50).to_bytes(8, "little") + b".", id="huge bytes"),
        pytest.param(b"Nr\xff\xff\xff\x7f.", id="a huge memo"),
        pytest.param(b"P1\n.", id="a persistent id"),
        pytest.param(b"](" + b"K\x01" * 3 + b"e.", id="no array"),
        pytest.param(b"I" + b"9" * 5000 + b"\n.", id="a long number"),
        pytest.param(b"", id="empty"),
        pytest.param(b"N.", id="None"),
    ],
)
def test_pickles_that_numpy_does_not_make(path: Path, data: bytes) -> None:
    path.write_bytes(header((5,), "|O") + data)
    tracemalloc.start()
    refused(path, "damaged")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.data())
def test_damage_is_noticed_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any few bytes changed, or the end cut off: labels that are numbers, or one line."""
    path = tmp_path_factory.getbasetemp() / "damaged_labels.npy"
    generator = np.random.default_rng(4)
    save(path, [WAYS[way](make_scene(generator, 2)) for way in ("lists", "scalars", "Fortran array")])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    found, said = [], [str(path)]
    try:
        found = read_labels(path)
    except UserError as error:
        said = str(error).splitlines()
    assert len(said) == 1
    assert str(path) in said[0]
    assert all(math.isfinite(value) for scene in found for each in scene for value in each.position)


def test_every_cut_is_noticed(path: Path, scenes: list) -> None:
    save(path, scenes[:2])
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(path)


# Files that are not what they say


def test_header_that_claims_more(path: Path) -> None:
    path.write_bytes(header((1 << 40, 4, 6), "<f8") + bytes(4 * 6 * 8))
    refused(path, "holds 192 bytes")
    path.write_bytes(header((1 << 40,), "|O") + pickle.dumps(object_array([[[0] * 6]]), 4))
    refused(path, "damaged")
    path.write_bytes(header((5, 10), "|S8") + bytes(400))
    refused(path)
    path.write_bytes(b"\x93NUMPY\x07\x00" + header((5,), "|O")[8:])
    refused(path, "damaged")
