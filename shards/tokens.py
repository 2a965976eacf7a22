"""A scene's features in a feature store: one safetensors file, `KEY.features.safetensors`.

safetensors, since numpy's own format has no bfloat16: torch, jax and others read the file as it stands. It is put
together here, byte for byte the same each time (the library's own order of metadata changes from call to call), and
read without torch, which data workers do without. Beside the tensors it says which scene it was made of: its key, and
the checksum of the image, so that a training step knows what it has read without reading the image.

Shapes: P patches, F features.
"""

from __future__ import annotations

import json
from typing import Literal, NamedTuple

import numpy as np
import orjson

TOKENS_SUFFIX = "features.safetensors"
Storage = Literal["bf16", "int8"]
STORED_AS = {"bf16": np.int16, "int8": np.int8}  # numpy holds bfloat16 by its bits
_NAMES = {"bf16": "BF16", "int8": "I8"}
_ALIGNED = 64  # tensors begin at a multiple of so many bytes of the file


class TokenShape(NamedTuple):
    """What every scene's features look like."""

    patches: int
    features: int
    storage: Storage


class Tokens(NamedTuple):
    """The features of one scene, and what they were made of."""

    key: str
    image_xxh3: int
    tokens_PF: np.ndarray  # int16 (the bits of bfloat16) or int8
    scales_P: np.ndarray  # float32, what an int8 is multiplied by; empty for bf16


def encode_tokens(tokens: Tokens) -> bytes:
    """The file of a scene's features."""
    storage = "int8" if tokens.tokens_PF.dtype == np.int8 else "bf16"
    parts = {"features": (_NAMES[storage], tokens.tokens_PF)}
    if storage == "int8":  # the wider type first, so that both are aligned
        parts = {"scales": ("F32", tokens.scales_P), **parts}
    header: dict[str, object] = {"__metadata__": {"key": tokens.key, "image_xxh3": f"{tokens.image_xxh3:016x}"}}
    at = 0
    for name, (kind, array) in parts.items():
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": (at, at + array.nbytes)}
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    arrays = [np.ascontiguousarray(array).tobytes() for _, array in parts.values()]
    return b"".join((len(text).to_bytes(8, "little"), text, *arrays))


def decode_tokens(data: memoryview | bytes, shape: TokenShape) -> Tokens:
    """A scene's features, as views of the bytes of their file. Raises ValueError where it holds anything else."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = orjson.loads(data[8 : 8 + size])
        made_of = header["__metadata__"]
        key, image_xxh3 = str(made_of["key"]), int(made_of["image_xxh3"], 16)
        tokens_PF = _array(data, 8 + size, header["features"], _NAMES[shape.storage], STORED_AS[shape.storage])
        scales_P = np.empty(0, np.float32)
        if shape.storage == "int8":
            scales_P = _array(data, 8 + size, header["scales"], "F32", np.float32)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the features of a scene: {error!r}") from None
    expected = (shape.patches, shape.features), (shape.patches if shape.storage == "int8" else 0,)
    if (tokens_PF.shape, scales_P.shape) != expected:
        raise ValueError(f"has features of {tokens_PF.shape}, the manifest says {expected[0]}")
    return Tokens(key, image_xxh3, tokens_PF, scales_P)


def _array(data: memoryview | bytes, begin: int, said: dict, name: str, kind: type) -> np.ndarray:
    if said["dtype"] != name:
        raise ValueError(f"has features in {said['dtype']}, the manifest says {name}")
    start, stop = said["data_offsets"]
    return np.frombuffer(data, kind, (stop - start) // np.dtype(kind).itemsize, begin + start).reshape(said["shape"])
