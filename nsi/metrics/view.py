"""The evaluation view: the part of the frame, and the resolution, that masks are compared at.

True masks are sampled at the nearest source pixel, so ids stay ids. Alphas are enlarged bilinearly, once, from
the slots' grid straight to the view's pixels, and only then does the argmax choose a slot for each pixel.

Legend: B images, N slots, G the grid's two sides, H x W the frame's pixels, S x S the view's pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch.nn import functional


@dataclass(frozen=True)
class Box:
    """A part of a frame. Exact fractions: top and height of the frame's height, left and width of its width."""

    top: Fraction
    left: Fraction
    height: Fraction
    width: Fraction


@dataclass(frozen=True)
class View:
    """What part of a frame is looked at, and at what resolution. The name is printed beside the figures."""

    name: str
    crop: Fraction | None  # side of a centred square as a fraction of the frame's HEIGHT; None: the whole frame
    size: int = 128  # S: the view is S x S pixels; a whole frame that is not square is squashed

    def __post_init__(self) -> None:
        if self.size < 1 or (self.crop is not None and not 0 < self.crop <= 1):
            raise ValueError(f"no such view: crop {self.crop}, size {self.size}")

    def box(self, frame: tuple[int, int]) -> Box:
        """The view's part of a frame of (height, width) pixels. Raises ValueError where the frame is too narrow."""
        if self.crop is None:
            return Box(Fraction(0), Fraction(0), Fraction(1), Fraction(1))
        height, width = frame
        across = self.crop * height / width
        if across > 1:
            raise ValueError(f"a frame of {height} x {width} pixels is too narrow for the view {self.name!r}")
        return Box((1 - self.crop) / 2, (1 - across) / 2, self.crop, across)

    def describe(self) -> str:
        """The view in words, for the line that prints a figure."""
        return f"{self.name} at {self.size}x{self.size}"


# 320x240: the square of 192 pixels with its corner at left 64, top 24 (Karazija et al. 2021, "ClevrTex").
OFFICIAL_VIEW = View("official view", Fraction(4, 5))
WHOLE_FRAME = View("whole frame", None)


def view_masks(true_HW: np.ndarray, view: View = OFFICIAL_VIEW) -> np.ndarray:
    """Masks as the view shows them, by nearest neighbour: (H, W) to (S, S), any leading axes kept, same dtype.

    Pixel i of the view takes source pixel floor(top + (i + 0.5) * side / S), in exact arithmetic.
    Raises ValueError where the frame is too narrow for the view.
    """
    height, width = true_HW.shape[-2:]
    box = view.box((height, width))
    rows = [int(centre * height) for centre in _centres(box.top, box.height, view.size)]
    columns = [int(centre * width) for centre in _centres(box.left, box.width, view.size)]
    return true_HW[..., np.array(rows)[:, None], np.array(columns)]


def view_alphas(alphas_BNGG: torch.Tensor, frame: tuple[int, int], view: View = OFFICIAL_VIEW) -> torch.Tensor:
    """Alphas at the view's pixels, bilinear: (N, G, G) to (N, S, S), or (B, N, G, G) to (B, N, S, S), float64.

    The grid covers the whole frame of (height, width) pixels, squashed; its sides may differ. Cell centres lie at
    (r + 0.5) / G of the frame; beyond the outermost centres the border's value holds.
    Raises ValueError for another number of axes, and where the frame is too narrow for the view.
    """
    if alphas_BNGG.dim() not in (3, 4):
        raise ValueError(f"alphas must be (N, G, G) or (B, N, G, G), not {tuple(alphas_BNGG.shape)}")
    batched = alphas_BNGG if alphas_BNGG.dim() == 4 else alphas_BNGG[None]
    box = view.box(frame)
    y_S, x_S = (
        torch.tensor([float(2 * centre - 1) for centre in centres], dtype=torch.float64, device=alphas_BNGG.device)
        for centres in (_centres(box.top, box.height, view.size), _centres(box.left, box.width, view.size))
    )
    y_SS, x_SS = torch.meshgrid(y_S, x_S, indexing="ij")
    points_BSS2 = torch.stack((x_SS, y_SS), dim=-1).expand(len(batched), -1, -1, -1)
    enlarged = functional.grid_sample(
        batched.detach().double(), points_BSS2, mode="bilinear", padding_mode="border", align_corners=False
    )
    return enlarged if alphas_BNGG.dim() == 4 else enlarged[0]


def view_segments(alphas_BNGG: torch.Tensor, frame: tuple[int, int], view: View = OFFICIAL_VIEW) -> torch.Tensor:
    """The slot that wins each pixel of the view: int64 (S, S) or (B, S, S), ties to the lowest slot.

    Shapes and errors are those of `view_alphas`, which enlarges before the argmax is taken.
    """
    return segments(view_alphas(alphas_BNGG, frame, view))


def segments(alphas_BNSS: torch.Tensor) -> torch.Tensor:
    """Argmax over slots of alphas that are already enlarged: (..., N, S, S) to int64 (..., S, S)."""
    return alphas_BNSS.argmax(dim=-3)  # torch takes the first of equals


def peaks(alphas_BNSS: torch.Tensor) -> torch.Tensor:
    """Where each slot's enlarged alpha is highest: (..., N, S, S) to int64 (..., N), row * S + column.

    Of equal pixels the first in reading order.
    """
    return alphas_BNSS.flatten(-2).argmax(dim=-1)


def _centres(start: Fraction, extent: Fraction, size: int) -> list[Fraction]:
    """Centres of `size` equal cells of [start, start + extent], exact, so that no rounding moves a floor."""
    return [start + extent * Fraction(2 * cell + 1, 2 * size) for cell in range(size)]
