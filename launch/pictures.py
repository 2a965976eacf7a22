"""Pictures of slots on images, for TensorBoard. The report draws its own, larger ones (launch/figures.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def mask_sheet(images_BCHW: torch.Tensor, alphas_BNP: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """One row a scene: the image, then each slot's share of it on white. (3, B * H, (N + 1) * W) floats in [0, 1]."""
    images_BCHW = images_BCHW.float() / 255
    height, width = images_BCHW.shape[-2:]
    alphas_BNHW = F.interpolate(alphas_BNP.unflatten(-1, grid), (height, width), mode="bilinear")
    shares_BNCHW = images_BCHW[:, None] * alphas_BNHW[:, :, None] + (1 - alphas_BNHW[:, :, None])
    cells_BKCHW = torch.cat([images_BCHW[:, None], shares_BNCHW], dim=1)
    # (B, K, C, H, W) to a sheet: rows B * H, columns K * W.
    return cells_BKCHW.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
