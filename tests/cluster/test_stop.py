"""Stop signals: the first is a wish, an echo of it is none, a second one ends the process at once."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import signal, sys, time
from cluster.stop import ECHO_S, StopRequest
stop = StopRequest()
signal.raise_signal({first})
signal.raise_signal({first})
print(stop.signal, flush=True)
stop._heard -= 2 * ECHO_S  # as if that were long ago
signal.raise_signal({second})
print("still alive", flush=True)
"""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1])
def test_the_second_signal_ends_the_process(first: signal.Signals) -> None:
    script = SCRIPT.format(first=int(first), second=int(signal.SIGTERM))
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.stdout.split() == [first.name]
    assert found.returncode == -signal.SIGTERM
