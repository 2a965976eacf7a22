"""The stopwatch: it measures the device, not the host that hands it work."""

from __future__ import annotations

import time

import pytest
import torch

from cluster.watch.stopwatch import stopwatch


def test_on_the_host() -> None:
    watch = stopwatch(torch.device("cpu"))
    watch.start()
    time.sleep(0.5)
    watch.lap()
    first_s = watch.seconds()
    time.sleep(0.05)  # what comes after the second moment does not count
    assert 0.5 <= first_s == watch.seconds()
    watch.start()  # begins anew
    watch.lap()
    assert watch.seconds() < 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu() -> None:
    """A slow GPU is seen while its host is quick, a slow host while its GPU is idle, and other GPUs' part is not."""
    device = torch.device("cuda")
    watch = stopwatch(device)
    cycles = 2_000_000_000  # a second, more or less

    def measured(own: int, host_s: float, theirs: int) -> tuple[float, float]:
        torch.cuda.synchronize()
        watch.start()
        began = time.perf_counter()
        time.sleep(host_s)
        torch.cuda._sleep(own)
        watch.lap()
        handed_over_s = time.perf_counter() - began
        torch.cuda._sleep(theirs)
        return watch.seconds(), handed_over_s

    measured(1000, 0, 1000)
    slow_s, handed_over_s = measured(cycles, 0, 0)
    assert slow_s > 2 * handed_over_s
    assert measured(cycles, 0, 4 * cycles)[0] < 2 * slow_s
    assert measured(1000, 0.5, 0)[0] > 0.4
