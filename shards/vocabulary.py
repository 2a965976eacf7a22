"""The vocabulary of a data set: taken from its scenes, sorted, and checked against the names CLEVRTex has."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import resources

from nsi.errors import UserError
from nsi.schema import Vocabulary
from shards.scenes import SceneSummary

KNOWN_SIZES = frozenset({"small", "medium", "large"})
KNOWN_SHAPES = frozenset({"cube", "cylinder", "sphere", "monkey", "cone", "icosahedron", "torus", "teapot"})


def known_materials() -> frozenset[str]:
    """Every material name of the published CLEVRTex data, v1 and v2, main and out of distribution."""
    text = resources.files("shards").joinpath("known_materials.json").read_text()
    return frozenset(name for names in json.loads(text).values() for name in names)


def build_vocabulary(scenes: Iterable[SceneSummary]) -> Vocabulary:
    """The sorted names that occur in the scenes.

    Raises UserError naming the file of the first scene with a name that CLEVRTex does not have.
    """
    materials = known_materials()
    sizes_seen: set[str] = set()
    shapes_seen: set[str] = set()
    materials_seen: set[str] = set()
    for scene in scenes:
        for label, names, known in (
            ("size", scene.sizes, KNOWN_SIZES),
            ("shape", scene.shapes, KNOWN_SHAPES),
            ("material", scene.materials, materials),
        ):
            if unknown := sorted(names - known):
                raise UserError(
                    f"{scene.files.json}: unknown {label} {unknown[0]!r}; CLEVRTex has no such name, "
                    "so mend the file or remove its scene"
                )
        sizes_seen |= scene.sizes
        shapes_seen |= scene.shapes
        materials_seen |= scene.materials
    return Vocabulary.of(sizes_seen, shapes_seen, materials_seen)
