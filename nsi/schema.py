"""The words every room shares: the vocabulary of a data set and the schema of one scene.

A scene's schema is a set of primitives, one for each object: size, shape and material as ids of the
vocabulary, and a position. Ids are places in sorted name lists, so they are the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from nsi.errors import UserError

LABELS = ("size", "shape", "material")  # the order of the last axis of every labels_..3 tensor
POSITION_RANGE = (-3.0, 3.0)  # metres; CLEVRTex places objects in this square


@dataclass(frozen=True)
class Vocabulary:
    """The names that ids stand for, each list sorted and without repeats."""

    sizes: tuple[str, ...]
    shapes: tuple[str, ...]
    materials: tuple[str, ...]

    def __post_init__(self) -> None:
        for label, names in zip(LABELS, self.names(), strict=True):
            if list(names) != sorted(set(names)):
                raise ValueError(f"vocabulary: the {label} names are not sorted and distinct: {names}")

    def names(self) -> tuple[tuple[str, ...], ...]:
        """The three name lists in the order of `LABELS`."""
        return self.sizes, self.shapes, self.materials

    def counts(self) -> tuple[int, int, int]:
        """How many sizes, shapes and materials there are: the rows of the three embedding tables."""
        return len(self.sizes), len(self.shapes), len(self.materials)

    def encode(self, size: str, shape: str, material: str) -> tuple[int, int, int]:
        """Ids of three names. Raises UserError for a name that the vocabulary lacks."""
        return (
            _place(self.sizes, size, "size"),
            _place(self.shapes, shape, "shape"),
            _place(self.materials, material, "material"),
        )

    def decode(self, size: int, shape: int, material: int) -> tuple[str, str, str]:
        """Names of three ids."""
        return self.sizes[size], self.shapes[shape], self.materials[material]

    def fingerprint(self) -> str:
        """sha256 over the names: equal where, and only where, ids mean the same things."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @staticmethod
    def of(sizes: Iterable[str], shapes: Iterable[str], materials: Iterable[str]) -> Vocabulary:
        """The vocabulary of the given names, in any order and with any repeats."""
        return Vocabulary(*(tuple(sorted(set(names))) for names in (sizes, shapes, materials)))


@dataclass(frozen=True)
class Primitive:
    """One object of a schema: ids of the vocabulary and a position in metres."""

    size: int
    shape: int
    material: int
    position: tuple[float, float, float]


def _place(names: tuple[str, ...], name: str, label: str) -> int:
    try:
        return names.index(name)
    except ValueError:
        raise UserError(f"unknown {label} {name!r}: the data set's vocabulary has {len(names)} others") from None
