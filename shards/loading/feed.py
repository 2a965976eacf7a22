"""The last stretch of a batch's way: from memory shared with the data workers to the device that trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from nsi.batch import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on a device; a GPU copies from pinned memory on a stream of its own, beside what it computes."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copying = torch.cuda.Stream(device)
    leaving: deque[tuple[Any, Batch]] = deque()
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = batch.to(device)
        copied = copying.record_event()
        computing = torch.cuda.current_stream(device)
        computing.wait_event(copied)
        for tensor in moved.tensors().values():
            tensor.record_stream(computing)
        # The workers use a batch's memory again when its last tensor is gone, which must not be before the copy's end.
        leaving.append((copied, batch))
        while leaving and leaving[0][0].query():
            leaving.popleft()
        yield moved
