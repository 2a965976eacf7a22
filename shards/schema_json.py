"""`KEY.json` of a shard: the schema as ids, and the scene's own JSON behind it, byte for byte.

    {"key": ..., "index": ..., "objects": [{"size": 0, "shape": 2, "material": 31, "position": [x, y, z]}, ...],
     "scene": what the source said}

The scene comes last, so that training parses the short part before it and passes over the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from nsi.schema import Primitive, Vocabulary

_SCENE = b',"scene":'  # cannot stand inside a JSON string, whose quotes are escaped


@dataclass(frozen=True)
class SceneSchema:
    """A scene's key, its index in the data set and its primitives."""

    key: str
    index: int
    primitives: tuple[Primitive, ...]


def label_places(vocabulary: Vocabulary) -> tuple[Mapping[str, int], ...]:
    """Name to id, in the order of `nsi.schema.LABELS`."""
    return tuple({name: place for place, name in enumerate(names)} for names in vocabulary.names())


def encode_schema(raw: bytes, facts: Mapping[str, Any], key: str, places: Sequence[Mapping[str, int]]) -> bytes:
    """The member of a scene: `raw` is its own JSON, `facts` the same parsed, `places` those of the vocabulary."""
    sizes, shapes, materials = places
    objects = [
        {
            "size": sizes[item["size"]],
            "shape": shapes[item["shape"]],
            "material": materials[item["material"]],
            "position": item["3d_coords"],
        }
        for item in facts["objects"]
    ]
    head = orjson.dumps({"key": key, "index": facts["image_index"], "objects": objects})
    return b"".join((head[:-1], _SCENE, raw.strip(), b"}"))


def decode_schema(data: bytes) -> SceneSchema:
    """The schema of a scene. Raises ValueError, KeyError or TypeError where the JSON is not one of ours."""
    head, mark, _ = data.partition(_SCENE)
    if not mark:
        raise ValueError("it has no scene")
    content = orjson.loads(head + b"}")
    primitives = tuple(
        Primitive(item["size"], item["shape"], item["material"], tuple(item["position"])) for item in content["objects"]
    )
    return SceneSchema(content["key"], content["index"], primitives)


def decode_facts(data: bytes) -> dict[str, Any]:
    """What the source's own JSON said. Raises ValueError or KeyError where there is none."""
    return orjson.loads(data)["scene"]
