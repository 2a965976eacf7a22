"""The random numbers of a scene: a stream that depends on (seed, scene) alone, on any machine.

NumPy promises that the raw 64-bit words of a bit generator never change, but makes no such promise for the
distributions built on them; so floats, integers and choices are built here from the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")

_BLOCK = 512  # words fetched at a time: one call into NumPy costs as much as a hundred of them


class Draws:
    """One stream of draws; two streams with different keys share nothing."""

    def __init__(self, seed: int, stream: int) -> None:
        # The key is given outright: no seeding algorithm stands between (seed, stream) and the words.
        self._philox = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64))
        self._ready: list[float] = []

    def fraction(self) -> float:
        """A float in [0, 1)."""
        if not self._ready:
            self._ready = self.fractions((_BLOCK,)).tolist()
        return self._ready.pop()

    def uniform(self, low: float, high: float) -> float:
        """A float in [low, high)."""
        return low + (high - low) * self.fraction()

    def below(self, count: int) -> int:
        """An integer in [0, count)."""
        return int(self.fraction() * count)

    def choice(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.below(len(items))]

    def fractions(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of floats in [0, 1), of the given shape."""
        words = self._philox.random_raw(int(np.prod(shape)))
        return ((words >> np.uint64(11)) * 2.0**-53).reshape(shape)
