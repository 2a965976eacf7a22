"""Picture bytes to arrays: the image resized once from the source (twice on request), the mask's ids untouched."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from shards.picture import MASK_MODES, read_header

_JPEG = b"\xff\xd8"


def decode_image_frame(data: bytes) -> np.ndarray:
    """RGB pixels (H, W, 3) uint8 of the frame as it is. An alpha channel is dropped: CLEVRTex's is opaque.

    Raises OSError, ValueError or SyntaxError where it cannot be decoded.
    """
    return np.asarray(_rgb(data))


def decode_image(data: bytes, size: int, squash_size: int = 0) -> np.ndarray:
    """RGB pixels (size, size, 3) uint8: the whole frame, squashed to a square, bicubic with antialiasing.

    With a squash_size it is first squashed to that many pixels square, as the public code keeps its images. Of Pillow's
    filters Hamming is the nearest to what that code takes (scikit-image's Gaussian and linear interpolation).
    """
    picture = _rgb(data)
    if squash_size and picture.size != (squash_size, squash_size):
        picture = picture.resize((squash_size, squash_size), Image.Resampling.HAMMING)
    return np.asarray(resize(picture, (size, size)))


def resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture of `size` (width, height), squashed, bicubic with antialiasing; itself where it has that size."""
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


def decode_mask(data: bytes) -> np.ndarray:
    """Object ids (H, W) uint8: 0 is background, k the object with index k. Palette colours mean nothing.

    Raises ValueError for a picture without ids (RGB, say).
    """
    read_header(data)
    with Image.open(io.BytesIO(data)) as picture:
        if picture.mode not in MASK_MODES:
            raise ValueError(f"a mask must hold ids (mode P or L), this one has mode {picture.mode}")
        return np.asarray(picture)


def _rgb(data: bytes) -> Image.Image:
    read_header(data)  # refuses a picture that would fill the memory, before it does
    if data[:2] == _JPEG:
        import simplejpeg  # faster than Pillow by a sixth

        return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))
    with Image.open(io.BytesIO(data)) as picture:
        return picture.convert("RGB")
