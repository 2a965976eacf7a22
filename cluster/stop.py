"""A wish to stop: a signal that the scheduler or a person sent. The training loop asks at every step."""

from __future__ import annotations

import signal
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_S = 1.0  # Slurm may send one signal to the batch script and to its ranks, who then hear it twice


class StopRequest:
    """Remembers the first stop signal; another one a second later ends the process at once."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._heard = 0.0
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._heard = signal.Signals(number).name, now
        elif now - self._heard > ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
