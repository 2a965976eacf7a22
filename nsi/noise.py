"""Keyed noise: random numbers as a pure function of (seed, step, sample id, stream, element index).

Nothing here keeps a state, so a sample draws the same noise on any rank, in any micro-batch, on any device and
after any restart. The generator is counter-based in the sense of Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3" (SC 2011), with the mixer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in the place of theirs.

Shapes: B rows, K elements of one row's draw (all its axes flattened, the last one fastest).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the step between a stream's counters
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True, eq=False)
class KeyedNoise:
    """The noise of one step for the samples of one (micro-)batch.

    A stream names one use ("slots", "slot_embedding", ...); two uses must not share a stream. A row without a
    sample has id -1 and draws numbers like any other. A sample that comes twice in a step draws the same twice.
    """

    seed: int
    step: int
    sample_ids_B: Tensor  # int64; its device is where the noise is made

    def normal(self, stream: str | int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal values, (B, *shape) float32.

        Box-Muller in float64 from the two halves of one hash: the largest value is 6.7 standard deviations. The
        integers are equal on every device; the logarithm and the cosine are so to rounding.
        """
        bits_BK = self._bits(stream, shape)
        radius_BK = (((bits_BK >> 32) & 0xFFFFFFFF).double() + 0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle_BK = (bits_BK & 0xFFFFFFFF).double().mul_(2 * math.pi * 2.0**-32)
        return (radius_BK * angle_BK.cos_()).float().view(len(bits_BK), *shape)

    def uniform(self, stream: str | int, shape: tuple[int, ...]) -> Tensor:
        """Values of [0, 1), (B, *shape) float32: multiples of 2^-24, so exactly the same on every device."""
        bits_BK = self._bits(stream, shape)
        return ((bits_BK >> 40) & 0xFFFFFF).float().mul_(2.0**-24).view(len(bits_BK), *shape)

    def dropout(self, x: Tensor, p: float, stream: str | int) -> Tensor:
        """x (B, ...) with each element zeroed with probability p and the others divided by 1 - p.

        The caller asks whether it is training. An element's fate hangs on its flat index in its row, so padding
        the first axis after B changes nothing for the elements in front of it. ValueError unless 0 <= p < 1.
        """
        if not 0 <= p < 1:
            raise ValueError(f"a dropout probability lies in [0, 1), not at {p}")
        if p == 0:
            return x
        keep = self.uniform(stream, tuple(x.shape[1:])) >= p
        return x * keep.to(x.dtype).mul_(1 / (1 - p))

    def _bits(self, stream: str | int, shape: tuple[int, ...]) -> Tensor:
        """64 random bits for each element, (B, K) int64."""
        # repr, so that stream 0 and stream "0" are two; a digest, because Python's own hash differs by process.
        name = int.from_bytes(hashlib.sha256(repr(stream).encode()).digest()[:8], "little")
        key = torch.zeros((), dtype=torch.int64)
        for word in (self.seed, self.step, name):
            key = _mix(key + _signed(word) + _signed(GOLDEN))
        key_B = _mix(self.sample_ids_B.to(torch.int64) + int(key))
        counter_K = torch.arange(1, math.prod(shape) + 1, device=key_B.device) * _signed(GOLDEN)
        return _mix(key_B[:, None] + counter_K)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64-bit words. int64 wraps around as uint64 does."""
    x = (x ^ _shift(x, 30)) * _signed(MULTIPLIERS[0])
    x = (x ^ _shift(x, 27)) * _signed(MULTIPLIERS[1])
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """A logical right shift: torch's int64 shift copies the sign down, the mask takes the copies away."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    """The int64 with the same 64 bits as a Python integer of any size and sign."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word
