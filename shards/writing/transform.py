"""What is done to the images on the way into the shards: nothing, or one resize and one encoding for ever."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from nsi.errors import UsageError
from shards.decode import decode_image_frame, resize
from shards.picture import PIXEL_LIMIT

Encoding = Literal["keep", "png", "jpg", "webp"]
_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
_LOSSY = ("jpg", "webp")


@dataclass(frozen=True)
class Transform:
    """The images of a folder of shards: byte for byte as they were, or squashed to `size` and encoded again."""

    encoding: Encoding = "keep"
    size: tuple[int, int] | None = None  # width, height in pixels; None keeps the source's
    quality: int = 95  # of jpg and webp

    def __post_init__(self) -> None:
        if self.encoding == "keep" and self.size:
            raise UsageError("--resize needs an encoding: give --image png, jpg or webp")
        if not 1 <= self.quality <= 100:
            raise UsageError(f"--quality {self.quality}: must be from 1 to 100")
        if self.size and (min(self.size) < 1 or self.size[0] * self.size[1] > PIXEL_LIMIT):
            raise UsageError(f"--resize {self.size[0]}x{self.size[1]}: no size for a picture")

    def describe(self) -> str:
        """The transform in a few words, for the manifest."""
        if self.encoding == "keep":
            return "none"
        size = f"resized to {self.size[0]}x{self.size[1]} (bicubic), " if self.size else ""
        return f"{size}{self.encoding}" + (f" quality {self.quality}" if self.encoding in _LOSSY else "")


def encode_picture(picture: np.ndarray | bytes, transform: Transform) -> bytes:
    """Encodes an image anew: `picture` is RGB pixels (H, W, 3) uint8, or the bytes of one to decode first.

    Raises OSError, ValueError or SyntaxError where those cannot be decoded.
    """
    frame_HW3 = decode_image_frame(picture) if isinstance(picture, bytes) else picture
    image = Image.fromarray(frame_HW3)
    file = io.BytesIO()
    encoding = "png" if transform.encoding == "keep" else transform.encoding
    options = {"quality": transform.quality} if encoding in _LOSSY else {}
    resize(image, transform.size or image.size).save(file, _FORMATS[encoding], **options)
    return file.getvalue()


def parse_size(text: str) -> tuple[int, int] | None:
    """(width, height) of `224` or `320x240`; None of an empty text. Raises UsageError for anything else."""
    if not text:
        return None
    width, _, height = text.lower().partition("x")
    try:
        return int(width), int(height or width)
    except ValueError:
        raise UsageError(f"--resize {text}: give a size in pixels, as in 224 or 320x240") from None
