"""Label arrays and JSONs as the public code's build script leaves them, for the tests that read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SPACE = {  # not sorted, as os.listdir gives them
    "shapes": ["cube", "cylinder", "sphere", "monkey"],
    "sizes": ["small", "medium", "large"],
    "materials": ["poliigonstones01", "poliigonbricks01", "poliigonwood06", "poliigonchainmail01"],
}


def object_array(scenes: Sequence[Any]) -> np.ndarray:
    """One scene a place, also where all have equally many objects."""
    array = np.empty(len(scenes), object)
    for place, scene in enumerate(scenes):
        array[place] = scene
    return array


def make_scene(generator: np.random.Generator, objects: int) -> list[list[float]]:
    """Rows of size, shape and material id, x, y, z."""
    ids = generator.integers(0, (3, 4, 4), (objects, 3)).tolist()
    positions = generator.uniform(-3, 3, (objects, 3)).tolist()
    return [[*row, *position] for row, position in zip(ids, positions, strict=True)]


def write_space(folder: Path, space: dict[str, list[str]]) -> None:
    """The three JSONs that give ids names."""
    content = {
        "program_space": space,
        "program2label": {kind: {name: place for place, name in enumerate(names)} for kind, names in space.items()},
        "label2program": {kind: dict(enumerate(names)) for kind, names in space.items()},
    }
    for name, each in content.items():
        (folder / f"{name}.json").write_text(json.dumps(each))
