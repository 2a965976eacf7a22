"""The vocabulary of a data set: taken from its scenes, sorted, and checked against the names CLEVRTex has."""

from __future__ import annotations

import json
from importlib import resources

from nsi.errors import UserError
from nsi.schema import LABELS, Vocabulary
from shards.sources.listing import Names

KNOWN_SIZES = frozenset({"small", "medium", "large"})
KNOWN_SHAPES = frozenset({"cube", "cylinder", "sphere", "monkey", "cone", "icosahedron", "torus", "teapot"})


def known_materials() -> frozenset[str]:
    """Every material name of the published CLEVRTex data, v1 and v2, main and out of distribution."""
    text = resources.files("shards.writing").joinpath("known_materials.json").read_text()
    return frozenset(name for names in json.loads(text).values() for name in names)


def build_vocabulary(names: Names) -> Vocabulary:
    """The sorted names that occur in the scenes.

    Raises UserError naming the file of the first scene with a name that CLEVRTex does not have.
    """
    known = (KNOWN_SIZES, KNOWN_SHAPES, known_materials())
    for label, seen, allowed in zip(LABELS, names, known, strict=True):
        if unknown := sorted(set(seen) - allowed):
            raise UserError(
                f"{seen[unknown[0]]}: unknown {label} {unknown[0]!r}; CLEVRTex has no such name, "
                "so mend the file or remove its scene"
            )
    return Vocabulary.of(*names)
