"""A batch's rows in plain memory, and how one scene fills a row. Known to training and to its data workers.

A row holds a scene's image, or where the scenes are those of a feature store the features that were made of it.

Shapes: R rows, S pixels a side, T objects, P patches, F features; S, or P and F, are 0 in rows that have none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nsi.errors import UserError
from shards.coverage import read_digest
from shards.decode import decode_image
from shards.reading.sample import DECODING_ERRORS, Sample, Source, cannot_decode, training_bytes
from shards.schema_json import decode_schema
from shards.tokens import STORED_AS, TokenShape, decode_tokens


@dataclass(frozen=True)
class SceneShape:
    """What a scene becomes: a square image of so many pixels a side, or stored features; room for so many objects.

    `squash_size`: the image is so many pixels square on its way; 0 for straight from the source.
    """

    image_size: int
    max_objects: int
    squash_size: int = 0
    tokens: TokenShape | None = None


@dataclass(frozen=True)
class BatchShape:
    """What a batch's arrays look like."""

    rows: int
    scene: SceneShape


class Rows(NamedTuple):
    """The arrays of a batch, all in one stretch of memory."""

    images_RSS3: np.ndarray  # uint8
    labels_RT3: np.ndarray  # int64
    positions_RT3: np.ndarray  # float32
    objects_RT: np.ndarray  # bool
    ids_R: np.ndarray  # int64
    tokens_RPF: np.ndarray  # int16 (the bits of bfloat16) or int8
    scales_RP: np.ndarray  # float32

    def clear(self, rows: list[int]) -> None:
        """Makes rows empty: sample id -1, zeros elsewhere."""
        for array in self:
            array[rows] = 0
        self.ids_R[rows] = EMPTY


class Read(NamedTuple):
    """What was read of a scene."""

    key: str
    digest: int


EMPTY = -1  # the sample id of a row without a scene


def memory_size(shape: BatchShape) -> int:
    """Bytes that a batch's arrays take together."""
    return sum(_bytes(dims, kind) for dims, kind in _layout(shape))


def rows_of(memory: np.ndarray, shape: BatchShape) -> Rows:
    """The arrays of a batch as views of (memory_size,) uint8."""
    arrays, at = [], 0
    for dims, kind in _layout(shape):
        arrays.append(memory[at : at + _bytes(dims, kind)].view(kind).reshape(dims))
        at += _bytes(dims, kind)
    ids_R, labels_RT3, positions_RT3, scales_RP, tokens_RPF, objects_RT, images_RSS3 = arrays
    return Rows(images_RSS3, labels_RT3, positions_RT3, objects_RT, ids_R, tokens_RPF, scales_RP)


def fill_row(
    rows: Rows, row: int, sample: Sample, data: memoryview | bytes, source: Source, squash_size: int = 0
) -> Read:
    """Decodes a sample's bytes into a row. Raises UserError with shard, key and offset where they are damaged."""
    image, json = training_bytes(sample, data, source)
    member = "json"
    try:
        schema = decode_schema(bytes(json))
        count = len(schema.primitives)
        labels_K3 = np.array([(p.size, p.shape, p.material) for p in schema.primitives], np.int64).reshape(count, 3)
        positions_K3 = np.array([p.position for p in schema.primitives], np.float32).reshape(count, 3)
        member = "image"
        # Straight into memory that training sees: this is the only copy of pixels or features.
        if source.features:
            image_xxh3 = _fill_tokens(rows, row, image, schema.key, source.features)
        else:
            rows.images_RSS3[row] = decode_image(bytes(image), rows.images_RSS3.shape[1], squash_size)
            image_xxh3 = sample.image.xxh3
    except DECODING_ERRORS as error:
        raise UserError(cannot_decode(sample, member, error, source)) from None
    for array, values in ((rows.labels_RT3, labels_K3), (rows.positions_RT3, positions_K3)):
        array[row, :count] = values
        array[row, count:] = 0
    rows.objects_RT[row] = np.arange(rows.objects_RT.shape[1]) < count
    rows.ids_R[row] = sample.sample
    return Read(schema.key, read_digest(schema.key, image_xxh3, sample.json.xxh3))


def _fill_tokens(rows: Rows, row: int, data: memoryview | bytes, key: str, shape: TokenShape) -> int:
    """Copies a scene's features into a row. Returns the checksum of the image that they were made of."""
    tokens = decode_tokens(data, shape)
    if tokens.key != key:
        raise ValueError(f"they are those of {tokens.key}")
    rows.tokens_RPF[row], rows.scales_RP[row] = tokens.tokens_PF, tokens.scales_P
    return tokens.image_xxh3


def _layout(shape: BatchShape) -> list[tuple[tuple[int, ...], type]]:
    """Dimensions and kind of each array, the widest kinds first, so that each begins at a multiple of its kind."""
    patches, features, storage = shape.scene.tokens or (0, 0, "int8")
    return [
        ((shape.rows,), np.int64),
        ((shape.rows, shape.scene.max_objects, 3), np.int64),
        ((shape.rows, shape.scene.max_objects, 3), np.float32),
        ((shape.rows, patches if storage == "int8" else 0), np.float32),
        ((shape.rows, patches, features), STORED_AS[storage]),
        ((shape.rows, shape.scene.max_objects), np.bool_),
        ((shape.rows, shape.scene.image_size, shape.scene.image_size, 3), np.uint8),
    ]


def _bytes(dims: tuple[int, ...], kind: type) -> int:
    return math.prod(dims) * np.dtype(kind).itemsize
