"""Uses a model that `nsi export` wrote: torch and safetensors, and timm where its backbone is a ViT; no DeepSpeed.

    OUT/model.safetensors   the trained parameters, float32; a trained backbone's begin with "backbone."
    OUT/config.json         sizes, vocabulary, backbone (name, hash, how images are made its input), how to score

Shapes: B rows, A images, C schemas, N slots, T objects (padded), E embedding, H x W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cluster.durable import file_hash
from launch.config import BackboneConfig, from_json
from launch.training.build import make_backbone
from nsi.backbone import Backbone, build_backbone, parameters_hash
from nsi.errors import UserError
from nsi.finetuned import BACKBONE
from nsi.maxsim import maxsim
from nsi.model import ModelConfig, NeuralSlotInterpreter, load_trained
from nsi.noise import KeyedNoise
from nsi.schema import Vocabulary
from shards.decode import decode_image

FORMAT = 1
MODEL, CONFIG = "model.safetensors", "config.json"

Object = tuple[str, str, str, Sequence[float]]  # names of size, shape and material; position x, y, z in metres


class Primitives(NamedTuple):
    """Schemas in the space of slots: embeddings_CTE, and objects_CT, True where there is an object."""

    embeddings_CTE: torch.Tensor
    objects_CT: torch.Tensor


@dataclass(frozen=True)
class Exported:
    """A trained model, ready to be asked. `config` is what OUT/config.json says."""

    backbone: Backbone
    model: NeuralSlotInterpreter
    vocabulary: Vocabulary
    config: dict[str, Any]


def load_exported(out: Path | str, backbone_weights: Path | None = None, device: str = "cpu") -> Exported:
    """The model that `nsi export RUN OUT` wrote.

    `backbone_weights`: the file with the frozen ViT's weights; without it they come from the hub. They must be those
    that the model was trained on. Not needed where the backbone was trained, or is "dct".
    Raises UserError where OUT is no such folder, is damaged or of a newer format, or the backbone is another one.
    """
    out = Path(out)
    config, parameters = _read(out)
    said = config["backbone"]
    own = {name.removeprefix(BACKBONE): p for name, p in parameters.items() if name.startswith(BACKBONE)}
    vocabulary = Vocabulary(**{name: tuple(names) for name, names in config["vocabulary"].items()})
    if said["trained"]:
        backbone = _trained_backbone(said, own)
    else:
        settings = BackboneConfig(said["name"], backbone_weights, said["normalization"], said["patch_size"])
        backbone = make_backbone(settings, said["image_size"])
        if parameters_hash(backbone) != said["hash"]:
            raise UserError(
                f"{out}: was trained on other weights of {said['name']}; give that file as backbone_weights"
            )
    sizes = from_json(ModelConfig, config["model"])
    model = NeuralSlotInterpreter(sizes, backbone.feature_dim, backbone.num_patches, vocabulary.counts(), config["tau"])
    try:
        load_trained(model, {name: p for name, p in parameters.items() if not name.startswith(BACKBONE)})
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{out / MODEL}: does not fit {CONFIG} ({reason}); export it again") from None
    return Exported(backbone.to(device), model.to(device).eval(), vocabulary, config)


def embed_images(exported: Exported, images: Sequence[bytes]) -> torch.Tensor:
    """slots_ANE, float32, of images given as the bytes of a PNG or JPEG.

    All slots begin from one noise, so what comes out hangs on the image alone, whichever others are beside it.
    """
    images_ACHW = torch.stack([_image(exported, data) for data in images])
    return slot_embeddings(exported, images_ACHW, torch.zeros(len(images), dtype=torch.int64))


def embed_schemas(exported: Exported, schemas: Sequence[Sequence[Object]]) -> Primitives:
    """The objects of schemas. Raises UserError for a name that the vocabulary lacks, or where there are too many."""
    labels_CT3, positions_CT3, objects_CT = _schemas(exported, schemas)
    return primitive_embeddings(exported, labels_CT3, positions_CT3, objects_CT)


def score(exported: Exported, slots_ANE: torch.Tensor, primitives: Primitives) -> torch.Tensor:
    """scores_AC, float32: how well each image goes with each schema; larger is better."""
    return maxsim(slots_ANE, primitives.embeddings_CTE, primitives.objects_CT, exported.config["score"])


@torch.inference_mode()
def slot_embeddings(exported: Exported, images_BCHW: torch.Tensor, sample_ids_B: torch.Tensor) -> torch.Tensor:
    """slot_embeddings_BNE of uint8 RGB images, as `nsi eval` computes them, bit for bit; a scene's id decides from
    which noise its slots begin. What goes in may be on any device, what comes out is on the model's."""
    model = exported.model
    parameter = next(model.parameters())
    noise = KeyedNoise(exported.config["noise_seed"], exported.config["noise_step"], sample_ids_B.to(parameter.device))
    features_BPF = exported.backbone(images_BCHW.to(parameter.device)).to(parameter.dtype)
    start_BND = noise.normal("slots", (model.config.num_slots, model.config.slot_dim))
    slots_BND, _ = model.slot_attention(features_BPF, start_BND)
    return model.slot_head(slots_BND, noise)


@torch.inference_mode()
def primitive_embeddings(
    exported: Exported, labels_CT3: torch.Tensor, positions_CT3: torch.Tensor, objects_CT: torch.Tensor
) -> Primitives:
    """Objects given by ids and positions, True where there is one, as `nsi eval` computes them, bit for bit."""
    device = next(exported.model.parameters()).device
    labels_CT3, positions_CT3, objects_CT = (each.to(device) for each in (labels_CT3, positions_CT3, objects_CT))
    noise = KeyedNoise(0, 0, torch.zeros(len(labels_CT3), dtype=torch.int64, device=device))  # of dropout, which is off
    embeddings_CTE, _ = exported.model.schema_encoder(labels_CT3, positions_CT3, objects_CT, noise)
    return Primitives(embeddings_CTE, objects_CT)


def _read(out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        config = json.loads((out / CONFIG).read_text())
        if config["format"] != FORMAT:
            raise UserError(f"{out}: format {config['format']}, but this version reads {FORMAT}; upgrade the program")
        if file_hash(out / MODEL) != config["model_sha256"]:
            raise UserError(f"{out / MODEL}: does not have the checksum in {CONFIG}; copy or export it again")
        return config, load_file(out / MODEL)
    except OSError as error:
        raise UserError(f"{out}: cannot be read ({error.strerror or error}); give a folder by `nsi export`") from None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out}: damaged ({error}); export it again") from None


def _trained_backbone(said: dict[str, Any], trained: dict[str, torch.Tensor]) -> Backbone:
    """A ViT with trained weights. Of others, its pooling's, say, nothing hangs on what they are."""
    backbone = build_backbone(said["name"], said["image_size"], normalize=said["normalization"] == "timm")
    backbone.load_state_dict({**backbone.state_dict(), **trained})
    return backbone


def _image(exported: Exported, data: bytes) -> torch.Tensor:
    said = exported.config["backbone"]
    image_HW3 = decode_image(data, said["image_size"], said["squash_size"])
    return torch.from_numpy(image_HW3.copy()).permute(2, 0, 1)


def _schemas(
    exported: Exported, schemas: Sequence[Sequence[Object]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """labels_CT3, positions_CT3, objects_CT."""
    most = exported.config["max_program_len"]
    labels_CT3 = torch.zeros(len(schemas), most, 3, dtype=torch.int64)
    positions_CT3 = torch.zeros(len(schemas), most, 3)
    objects_CT = torch.zeros(len(schemas), most, dtype=torch.bool)
    for row, schema in enumerate(schemas):
        if len(schema) > most:
            raise UserError(
                f"schema {row} has {len(schema)} objects, but the model takes at most {most}; leave some out"
            )
        for place, (size, shape, material, position) in enumerate(schema):
            labels_CT3[row, place] = torch.tensor(exported.vocabulary.encode(size, shape, material))
            positions_CT3[row, place] = torch.tensor(position)
            objects_CT[row, place] = True
    return labels_CT3, positions_CT3, objects_CT
