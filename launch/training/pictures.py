"""Pictures of slots on images, for TensorBoard. The report draws its own, larger ones (launch/reporting/figures.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from nsi.errors import UserError
from shards.decode import decode_image
from shards.reading.dataset import Split


def pictures(split: Split, samples: Sequence[int], size: int) -> torch.Tensor:
    """images_BCHW of some scenes, uint8, straight from the shards. One that cannot be read is black."""
    images_BHW3 = np.zeros((len(samples), size, size, 3), np.uint8)
    for row, sample in enumerate(samples):
        with contextlib.suppress(UserError):  # training on stored features goes on without its image
            images_BHW3[row] = split.decode(sample, "image", lambda data: decode_image(data, size))
    return torch.from_numpy(images_BHW3).permute(0, 3, 1, 2)


def mask_sheet(images_BCHW: torch.Tensor, alphas_BNP: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """One row a scene: the image, then each slot's share of it on white. (3, B * H, (N + 1) * W) floats in [0, 1]."""
    images_BCHW = images_BCHW.float() / 255
    height, width = images_BCHW.shape[-2:]
    alphas_BNHW = F.interpolate(alphas_BNP.unflatten(-1, grid), (height, width), mode="bilinear")
    shares_BNCHW = images_BCHW[:, None] * alphas_BNHW[:, :, None] + (1 - alphas_BNHW[:, :, None])
    cells_BKCHW = torch.cat([images_BCHW[:, None], shares_BNCHW], dim=1)
    # (B, K, C, H, W) to a sheet: rows B * H, columns K * W.
    return cells_BKCHW.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
