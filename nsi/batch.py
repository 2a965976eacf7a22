"""One batch of scenes, as every room passes it on.

Shapes: B rows, T objects (padded), H x W pixels. A rank's share of a global batch may have fewer scenes
than rows; a row without a scene has `rows_B` False, sample id -1 and zeros elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True)
class Batch:
    """Scenes as tensors. Ids are places in the data set's split and stay the same for ever."""

    sample_ids_B: torch.Tensor  # int64, -1 where the row is empty
    rows_B: torch.Tensor  # bool, True where the row holds a scene
    images_BCHW: torch.Tensor  # uint8 RGB
    labels_BT3: torch.Tensor  # int64 ids: size, shape, material
    positions_BT3: torch.Tensor  # float32 metres
    objects_BT: torch.Tensor  # bool, True where an object is real
    keys: tuple[str, ...]  # the scenes' keys as READ from the shards, "" where the row is empty

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def select(self, rows: slice) -> Batch:
        """Some of the rows, as views."""
        return replace(self._map(lambda tensor: tensor[rows]), keys=self.keys[rows])

    def __len__(self) -> int:
        return len(self.keys)

    def _map(self, change) -> Batch:
        tensors = {f.name: change(getattr(self, f.name)) for f in fields(self) if f.name != "keys"}
        return replace(self, **tensors)
