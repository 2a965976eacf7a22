"""Feature extractors: from pixels to one feature vector a patch.

They are frozen, so they stay out of the optimizer and of checkpoints, which keep `parameters_hash` instead.
`nsi/finetuned.py` trains a copy of one.

Shapes: B images, C = 3 channels, H x W pixels, S x S pixels of a patch, P patches (row by row), F features,
K = 9 lowest DCT coefficients of a channel.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nsi.errors import UsageError, UserError

DCT = "dct"  # the name of the backbone that needs no weights
DCT_LOWEST = 3  # frequencies 0, 1 and 2 along each axis
# What weighs how much. The mean colour tells objects apart at this size, so it weighs most: with all three parts at a
# deviation of about 1 the demo learns at a third of the speed.
MEAN_GAIN, DETAIL_GAIN, POSITION_GAIN = 12.0, 2.0, 0.7
POSITION_OCTAVES = 4


class Backbone(nn.Module):
    """Images to patch features, without gradients unless a parameter wants one. Stays in eval mode whatever its parent
    is set to, so dropout and stochastic depth are off."""

    feature_dim: int
    grid: tuple[int, int]  # patches down, patches across

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def train(self, mode: bool = True) -> Backbone:
        return super().train(False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """uint8 RGB images_BCHW -> features_BPF, float32."""
        raise NotImplementedError

    def recompute(self) -> None:
        """From now on hidden layers are computed a second time for the backward, not kept. UserError where that can't
        be had."""
        raise NotImplementedError


def absent_backbone(grid: tuple[int, int], feature_dim: int) -> Backbone:
    """What stands for a backbone whose features were stored: it has their shape, and no images are given to it."""
    backbone = Backbone()
    backbone.grid, backbone.feature_dim = grid, feature_dim
    return backbone


class Passing(Backbone):
    """What stands before a model that holds its backbone itself: it has that one's shape, and hands images on."""

    def __init__(self, grid: tuple[int, int], feature_dim: int) -> None:
        super().__init__()
        self.grid, self.feature_dim = grid, feature_dim

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW


def build_backbone(
    name: str,
    image_size: int,
    state_dict: Mapping[str, Tensor] | None = None,
    patch_size: int = 8,
    normalize: bool = True,
) -> Backbone:
    """`PatchStatistics` for the name "dct", else the timm ViT of that name. UserError where that can't be.

    patch_size is that of "dct" alone: a ViT brings its own. So is normalize a ViT's alone: "dct" has its own scale.
    """
    if name != DCT:
        return TimmBackbone(name, image_size, state_dict, normalize)
    if state_dict is not None:
        raise UserError("the backbone 'dct' has no weights to load")
    return PatchStatistics(image_size, patch_size)


class PatchStatistics(Backbone):
    """The low frequencies of each patch and where it is: enough for plain scenes, and cheap on a CPU.

    27 features are the lowest 3 x 3 coefficients of the type-2 DCT of each of the red, green and blue values in
    [0, 1]; basis functions have mean square 1 over the patch, so the numbers hardly change with its size. The
    constant one stands for the mean colour, from which 0.5 is taken; it is multiplied by 12, and coefficient (u, v)
    by 2 (1 + u + v), against the fall of a picture's spectrum with the frequency. 16 features are 0.7 times the sines
    and cosines of pi 2^k y and pi 2^k x for k = -1..2, of the patch's centre in (0, 1).

    UserError where patch_size doesn't divide image_size, UsageError where it isn't above 0.
    """

    def __init__(self, image_size: int, patch_size: int = 8) -> None:
        super().__init__()
        if patch_size < 1:
            raise UsageError(f"--patch_size {patch_size}: must be above 0")
        _check_size("dct", image_size, patch_size)
        if patch_size < DCT_LOWEST:
            raise UserError(f"patches of {patch_size} pixels have no {DCT_LOWEST} x {DCT_LOWEST} coefficients")
        self.patch_size = patch_size
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.feature_dim = 3 * DCT_LOWEST**2 + 4 * POSITION_OCTAVES
        self.register_buffer("basis_SSK", _dct_basis(patch_size).float())
        self.register_buffer("position_PF", _position_features(*self.grid).float())

    def forward(self, images_BCHW: Tensor) -> Tensor:
        B, C, H, W = images_BCHW.shape
        S = self.patch_size
        if C != 3 or self.grid != (H / S, W / S):
            raise ValueError(f"images of {(C, H, W)} for a backbone of 3 channels and {self.grid} patches of {S}")
        patches_BPCS = (  # the last axis is S * S here
            images_BCHW.float()
            .div(255)
            .sub(0.5)  # all but the constant basis function have mean zero
            .view(B, C, H // S, S, W // S, S)
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(B, self.num_patches, C, S * S)
        )
        coefficients_BPCK = patches_BPCS @ self.get_buffer("basis_SSK").flatten(0, 1)
        position_BPF = self.get_buffer("position_PF").expand(B, -1, -1)
        return torch.cat([coefficients_BPCK.flatten(2), position_BPF], dim=-1)


def _dct_basis(size: int) -> Tensor:
    """basis_SSK: each column, summed against a patch, gives a scaled coefficient; (u, v) = divmod(k, 3)."""
    points_S = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    waves_US = torch.stack([(math.pi * u * points_S).cos() * (2**0.5 if u else 1) for u in range(DCT_LOWEST)])
    frequency_U = torch.arange(DCT_LOWEST, dtype=torch.float64)
    gain_UV = DETAIL_GAIN * (1 + frequency_U[:, None] + frequency_U)
    gain_UV[0, 0] = MEAN_GAIN
    return (torch.einsum("us,vt->stuv", waves_US, waves_US) * gain_UV / size**2).flatten(2)


def _position_features(rows: int, columns: int) -> Tensor:
    """position_PF: sines and cosines of each patch's centre, the vertical ones first."""
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (rows, columns))
    centre_P2 = torch.cartesian_prod(y, x).view(-1, 2)
    angle_P2K = centre_P2[..., None] * math.pi / 2 * 2.0 ** torch.arange(POSITION_OCTAVES)
    return POSITION_GAIN * torch.cat([angle_P2K.sin(), angle_P2K.cos()], dim=-1).flatten(1)


class TimmBackbone(Backbone):
    """The patch tokens of any ViT that timm knows, its class and register tokens dropped.

    Weights come from `state_dict` (timm's names; a classifier is passed over, position embeddings of another grid
    are resampled), else they are random: nothing is downloaded. Images are normalised with the mean and standard
    deviation of the named weights, or left in [0, 1] without `normalize`, as in the public code. UserError: a name
    unknown to timm, a model without patch tokens, an image_size that the patch size doesn't divide, weights that
    don't fit.
    """

    model: Any  # timm's models share forward_features and patch_embed, but no type that says so

    def __init__(
        self, name: str, image_size: int, state_dict: Mapping[str, Tensor] | None = None, normalize: bool = True
    ) -> None:
        super().__init__()
        self.name = name
        import timm  # 2.6 s, and the backbone "dct" does without
        from timm.data.config import resolve_model_data_config

        if not timm.is_model(name):
            raise UserError(f"timm {timm.__version__} knows no model named {name!r}")
        no_tokens = f"{name!r} doesn't give patch tokens; take a ViT, such as vit_base_patch8_224.dino"
        try:
            self.model = timm.create_model(name, pretrained=False, img_size=image_size, num_classes=0)
        except TypeError as error:  # a convolutional network takes no img_size
            raise UserError(no_tokens) from error
        except (RuntimeError, ValueError, AssertionError) as error:  # an unknown tag after the dot, a size
            raise UserError(f"timm can't build {name!r} for images of {image_size}: {error}") from error
        patch_embed: Any = getattr(self.model, "patch_embed", None)
        if not hasattr(patch_embed, "grid_size"):
            raise UserError(no_tokens)
        for patch_size in set(patch_embed.patch_size):
            _check_size(name, image_size, patch_size)
        self.grid = tuple(patch_embed.grid_size)
        self.num_prefix_tokens = int(getattr(self.model, "num_prefix_tokens", 0))
        if state_dict is not None:
            _load(self.model, name, state_dict, self.grid)

        norms = resolve_model_data_config(self.model)
        mean, std = (norms["mean"], norms["std"]) if normalize else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean_C11", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std_C11", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))
        self.requires_grad_(False)
        self.train(False)
        # Called as a module, since ZeRO 3 brings parameters only to modules that are: the class token and the position
        # embeddings are the ViT's own.
        self.model.forward = self.model.forward_features
        tokens = self.model(torch.zeros(1, 3, image_size, image_size))
        if tokens.ndim != 3 or tokens.shape[1] != self.num_prefix_tokens + self.num_patches:
            raise UserError(f"{no_tokens} (its output has the shape {tuple(tokens.shape)})")
        self.feature_dim = tokens.shape[-1]

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = (images_BCHW.float().div(255) - self.get_buffer("mean_C11")) / self.get_buffer("std_C11")
        tokens_BTF = self.model(x_BCHW.to(next(self.model.parameters()).dtype))
        return tokens_BTF[:, self.num_prefix_tokens :].float()

    def recompute(self) -> None:
        try:
            self.model.set_grad_checkpointing()
        except (AttributeError, AssertionError):
            raise UserError(f"--recompute: timm's {self.name} keeps its hidden layers; leave the flag out") from None


def _check_size(name: str, image_size: int, patch_size: int) -> None:
    if image_size < patch_size or image_size % patch_size:
        raise UserError(f"images of {image_size} pixels don't split into {name}'s patches of {patch_size}")


def _load(model: nn.Module, name: str, state_dict: Mapping[str, Tensor], grid: tuple[int, int]) -> None:
    """Weights into a timm ViT, none missing and none left over. UserError names the first that doesn't fit."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{head}." for head in ((classifier,) if isinstance(classifier, str) else classifier))
    given = {key: value for key, value in state_dict.items() if not (heads and key.startswith(heads))}
    wanted = model.state_dict()
    for key in sorted(wanted.keys() | given.keys()):
        if key not in given:
            raise UserError(f"the weights for {name} lack {key!r}")
        if key not in wanted:
            raise UserError(f"the weights for {name} hold {key!r}, which that model doesn't have")
        if key == "pos_embed" and given[key].shape != wanted[key].shape and given[key].ndim == 3:
            prefix = wanted[key].shape[1] - grid[0] * grid[1]
            side = math.isqrt(max(0, given[key].shape[1] - prefix))
            if side and side**2 + prefix == given[key].shape[1]:
                given[key] = resample_abs_pos_embed(given[key], list(grid), num_prefix_tokens=prefix)
        if given[key].shape != wanted[key].shape:
            raise UserError(
                f"the weights for {name}: {key!r} has the shape {tuple(given[key].shape)}, "
                f"the model wants {tuple(wanted[key].shape)}"
            )
    model.load_state_dict(given)


def parameters_hash(module: nn.Module) -> str:
    """sha256 over the module's state: names, dtypes, shapes and bytes. Equal on any device."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
