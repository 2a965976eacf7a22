"""One batch of scenes, as every room passes it on.

Shapes: B rows, T objects (padded), H x W pixels, P patches, F features. A rank's share of a global batch may have
fewer scenes than rows; a row without a scene has `rows_B` False, sample id -1 and zeros elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch


class Fault(NamedTuple):
    """A scene that could not be read, whose row is empty for that reason."""

    row: int
    sample: int
    shard: str
    key: str
    text: str  # what is wrong, with shard, key and offset


@dataclass(frozen=True)
class Batch:
    """Scenes as tensors. Ids are places in the data set's split and stay the same for ever."""

    sample_ids_B: torch.Tensor  # int64, -1 where the row is empty
    rows_B: torch.Tensor  # bool, True where the row holds a scene
    images_BCHW: torch.Tensor  # uint8 RGB; no pixels where the rows hold stored features
    labels_BT3: torch.Tensor  # int64 ids: size, shape, material
    positions_BT3: torch.Tensor  # float32 metres
    objects_BT: torch.Tensor  # bool, True where an object is real
    keys: tuple[str, ...]  # the scenes' keys as READ from the shards, "" where the row is empty
    digests: tuple[int, ...] = ()  # 64 bits over what was READ of each row's scene, 0 where the row is empty
    faults: tuple[Fault, ...] = ()
    features_BPF: torch.Tensor | None = None  # the images' patch features from a store: bfloat16, or int8 ...
    feature_scales_BP: torch.Tensor | None = None  # ... with what to multiply each patch by, float32

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def select(self, rows: slice) -> Batch:
        """Some of the rows, as views."""
        part = self._map(lambda tensor: tensor[rows])
        return replace(part, keys=self.keys[rows], digests=self.digests[rows], faults=())

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)}

    def __len__(self) -> int:
        return len(self.keys)

    def _map(self, change) -> Batch:
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})
