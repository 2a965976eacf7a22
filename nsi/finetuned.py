"""The model with its backbone in it, trained as well: images and schemas in, the same out.

Didolkar et al., "On the Transfer of Object-Centric Representation Learning", ICLR 2025 (FT-DINOSAUR): slots are made of
the trained ViT's features, and what they have to reconstruct are the features of the ViT as it was, which stays frozen.
A target that is trained along could be met by features that all agree. Their adaptation to larger images and their
decoder are not part of this.

Shapes: B images, C = 3 channels, H x W pixels; the others as in nsi/model.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nsi.backbone import Backbone
from nsi.model import ModelConfig, NeuralSlotInterpreter, Output
from nsi.noise import KeyedNoise

BACKBONE = "backbone."  # how the names of the trained backbone's parameters begin


class FinetunedInterpreter(NeuralSlotInterpreter):
    """A NeuralSlotInterpreter that also holds `backbone`, which is trained, and `target`, the same as it was before.

    One module, so that one engine trains all of it and ZeRO 3 shares out both. The other parameters keep their names.
    Of the backbone all is trained that its features depend on; a ViT's pooling, say, is not. Its dropout and stochastic
    depth stay off, so that a forward can be repeated.
    """

    def __init__(
        self,
        config: ModelConfig,
        backbone: Backbone,
        image_size: int,
        vocabulary_counts: tuple[int, int, int],
        tau: float = 0.1,
        recompute: bool = False,
    ) -> None:
        """Takes the frozen `backbone` as its target, and a copy of it to train.

        `recompute`: neither the decoder nor the trained ViT keeps its hidden layers for the backward.
        """
        super().__init__(config, backbone.feature_dim, backbone.num_patches, vocabulary_counts, tau, recompute)
        self.backbone, self.target = copy.deepcopy(backbone), backbone
        needed = _needed(backbone, image_size)
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name in needed)
        if recompute:
            self.backbone.recompute()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images_BCHW: Tensor,
        labels_BT3: Tensor,
        positions_BT3: Tensor,
        objects_BT: Tensor,
        noise: KeyedNoise,
        reconstruct: bool = True,
    ) -> Output:
        """As NeuralSlotInterpreter's, with uint8 RGB images in place of features."""
        features_BPF = self.backbone(images_BCHW)
        return super().forward(
            features_BPF, labels_BT3, positions_BT3, objects_BT, noise, reconstruct, lambda: self.target(images_BCHW)
        )


def fitted(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Another model's trained parameters for this one, where one of the two trains its backbone and the other doesn't:
    this one's own backbone in the place of one that is missing, and without one that is too many."""
    ours = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if name.startswith(BACKBONE) and parameter.requires_grad
    }
    theirs = {name for name in parameters if name.startswith(BACKBONE)}
    if theirs and not ours:
        return {name: tensor for name, tensor in parameters.items() if name not in theirs}
    return dict(parameters) if theirs else {**ours, **parameters}


def _needed(backbone: Backbone, image_size: int) -> set[str]:
    """The names of the parameters that the features depend on; found without any arithmetic, on meta tensors."""
    parameters = {
        name: torch.empty_like(parameter, device="meta", requires_grad=True)
        for name, parameter in backbone.named_parameters()
    }
    buffers = {name: buffer.to("meta") for name, buffer in backbone.named_buffers()}
    image_1CHW = torch.empty(1, 3, image_size, image_size, dtype=torch.uint8, device="meta")
    features_1PF: Tensor = functional_call(backbone, {**parameters, **buffers}, (image_1CHW,))
    gradients = torch.autograd.grad(features_1PF.sum(), list(parameters.values()), allow_unused=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
