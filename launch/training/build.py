"""Puts the parts together that training and evaluation share: the backbone and the model."""

from __future__ import annotations

from pathlib import Path

import torch

from launch import hub
from launch.config import BackboneConfig, TrainConfig
from nsi.backbone import DCT, Backbone, Passing, build_backbone
from nsi.errors import UserError
from nsi.finetuned import FinetunedInterpreter
from nsi.model import NeuralSlotInterpreter
from nsi.schema import Vocabulary


def make_backbone(config: BackboneConfig, image_size: int) -> Backbone:
    """The frozen backbone with its weights, on the CPU.

    Raises UserError where the weights can be had neither from a file nor from the hub, or do not fit.
    """
    if config.backbone == DCT:
        if config.backbone_weights:
            raise UserError(f"--backbone_weights {config.backbone_weights}: the backbone {DCT!r} has no weights")
        return build_backbone(DCT, image_size, patch_size=config.patch_size)
    given = config.backbone_weights
    weights = _read_weights(given) if given else _fetch_weights(config.backbone)
    return build_backbone(config.backbone, image_size, weights, normalize=config.normalization == "timm")


def make_model(config: TrainConfig, vocabulary: Vocabulary, backbone: Backbone) -> NeuralSlotInterpreter:
    """The model with its initial weights, which the seed alone decides; with --backbone_trainable it takes the frozen
    backbone in, and `standing_before` says what is left before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.optim.seed)
        if config.backbone.backbone_trainable:
            return FinetunedInterpreter(
                config.model,
                backbone,
                config.data.image_size,
                vocabulary.counts(),
                config.loss.tau,
                config.engine.recompute,
            )
        return NeuralSlotInterpreter(
            config.model,
            backbone.feature_dim,
            backbone.num_patches,
            vocabulary.counts(),
            config.loss.tau,
            config.engine.recompute,
        )


def standing_before(config: BackboneConfig, backbone: Backbone) -> Backbone:
    """What gives a model its input: the frozen backbone, or what hands images on to a model that holds its own."""
    return Passing(backbone.grid, backbone.feature_dim) if config.backbone_trainable else backbone


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from a .safetensors file or one saved by torch; nothing in it is executed."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--backbone_weights {path}: no such file") from None
    except OSError as error:
        raise UserError(f"--backbone_weights {path}: cannot be read ({error.strerror or error})") from None
    except Exception:  # torch and safetensors raise a dozen kinds for a file that is not theirs
        # In our own words: torch's advice is to read it with weights_only=False, which runs the code in it.
        raise UserError(
            f"--backbone_weights {path}: not a weights file, or cut; code in a file is not executed: "
            "save model.state_dict() alone and give that file"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"--backbone_weights {path}: not a state dict; save model.state_dict() and give that file")
    return content


def _fetch_weights(name: str) -> dict[str, torch.Tensor]:
    """timm's weights from the hub, or from the hub's cache on this machine."""
    import timm

    hub.place_of(name)  # raises for a name that timm does not know
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # the hub's client raises its own, requests' and the operating system's errors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"--backbone {name}: its weights are not on this machine and cannot be fetched ({reason[:120]}). "
            'Where there is internet run: python -c "import timm, torch; '
            f"torch.save(timm.create_model('{name}', pretrained=True, num_classes=0).state_dict(), 'backbone.pt')\" "
            "and give --backbone_weights backbone.pt"
        ) from None
