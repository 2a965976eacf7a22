"""Member bytes to arrays: the image resized once from the source, the mask's ids untouched, the schema as ids."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import numpy as np
from PIL import Image

from nsi.schema import Primitive
from shards.scenes import MASK_MODES


@dataclass(frozen=True)
class SceneSchema:
    """What `KEY.json` says: the scene's key, its index in the data set, its primitives, and its own facts."""

    key: str
    index: int
    primitives: tuple[Primitive, ...]
    facts: dict


def decode_image_frame(data: bytes) -> np.ndarray:
    """RGB pixels (H, W, 3) uint8 of the frame as it is. An alpha channel is dropped: CLEVRTex's is opaque."""
    return np.asarray(_rgb(data))


def decode_image(data: bytes, size: int) -> np.ndarray:
    """RGB pixels (size, size, 3) uint8: the whole frame, squashed to a square, bicubic with antialiasing."""
    rgb = _rgb(data)
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def _rgb(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        return picture.convert("RGB")


def decode_mask(data: bytes) -> np.ndarray:
    """Object ids (H, W) uint8: 0 is background, k the object with index k. Palette colours mean nothing.

    Raises ValueError for a picture without ids (RGB, say).
    """
    with Image.open(io.BytesIO(data)) as picture:
        if picture.mode not in MASK_MODES:
            raise ValueError(f"a mask must hold ids (mode P or L), this one has mode {picture.mode}")
        return np.asarray(picture)


def decode_schema(data: bytes) -> SceneSchema:
    """The schema of a scene. Raises ValueError or KeyError where the JSON is not one of ours."""
    content = json.loads(data)
    primitives = tuple(
        Primitive(item["size"], item["shape"], item["material"], tuple(item["position"])) for item in content["objects"]
    )
    return SceneSchema(content["key"], content["index"], primitives, content["scene"])
