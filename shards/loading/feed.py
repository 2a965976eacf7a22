"""The last stretch of a batch's way: from memory shared with the data workers to the device that trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from nsi.batch import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on a device. A GPU copies the next one, from pinned memory, while it computes with this one."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    # The workers use a batch's memory again when its last tensor is gone, which must not be before its copy's end.
    leaving: deque[tuple[Any, Batch]] = deque()
    ready: deque[tuple[Any, Batch]] = deque()
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = batch.to(device)
        copied = copying.record_event()
        leaving.append((copied, batch))
        ready.append((copied, moved))
        if len(ready) > 1:
            yield _received(*ready.popleft(), computing)
        while leaving and leaving[0][0].query():
            leaving.popleft()
    while ready:
        yield _received(*ready.popleft(), computing)


def _received(copied: Any, moved: Batch, computing: Any) -> Batch:
    """A batch that the computing stream may use: it waits for the copy, and memory is not reused under it."""
    computing.wait_event(copied)
    for tensor in moved.tensors().values():
        tensor.record_stream(computing)
    return moved
