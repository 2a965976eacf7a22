"""How long a rank's own part of a step takes on its device, measured without waiting for the device."""

from __future__ import annotations

import time
from typing import Protocol

import torch


class Stopwatch(Protocol):
    """Seconds between two moments of a step, read once the step is done."""

    def start(self) -> None: ...

    def lap(self) -> None: ...

    def seconds(self) -> float: ...


class HostStopwatch:
    """Where the host itself computes."""

    def start(self) -> None:
        """The first moment."""
        self._start = time.perf_counter()

    def lap(self) -> None:
        """The second."""
        self._lap = time.perf_counter()

    def seconds(self) -> float:
        """Between the two."""
        return self._lap - self._start


class GpuStopwatch:
    """Events in the GPU's own stream: a host only hands it work, and is done before a slow GPU is.

    Started on an idle stream it counts the host's part too, such as the wait for data.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start, self._lap = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        """The first moment: when the work handed over so far is done."""
        self._start.record(torch.cuda.current_stream(self._device))

    def lap(self) -> None:
        """The second, likewise."""
        self._lap.record(torch.cuda.current_stream(self._device))

    def seconds(self) -> float:
        """Between the two; waits for the second, which is past where the step's losses have been read."""
        self._lap.synchronize()
        return self._start.elapsed_time(self._lap) / 1000


def stopwatch(device: torch.device) -> Stopwatch:
    """The one for a device."""
    return GpuStopwatch(device) if device.type == "cuda" else HostStopwatch()
