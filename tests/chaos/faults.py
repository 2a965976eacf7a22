"""What is done to a run, drawn from a seed: which rank, by what, when."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass

STOPS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")  # the run saves and ends in order
DEATHS = ("SIGKILL", "SIGSEGV", "SIGABRT", "SIGSTOP, then SIGKILL")
CUT = "SIGKILL at a delicate call"  # of rank 0, which writes: see zygote.DELICATE
CUTS = {"": 60, "checkpoints": 24, "ledger": 8, "attempts": 3}  # up to which call, below which folder
FROZEN_S = 0.5  # between SIGSTOP and SIGKILL


@dataclass(frozen=True)
class Fault:
    """One attempt and its end. It strikes a while after so many new steps, or at the `cut`-th delicate call for
    something below a folder of the run."""

    kind: str
    world: int
    stage: int
    rank: int
    steps: int  # 0: while it starts
    delay_s: float
    cut: int = 0
    below: str = ""

    @property
    def signal(self) -> signal.Signals:
        """What the rank gets in the end."""
        return signal.SIGKILL if self.kind not in (*STOPS, *DEATHS) else signal.Signals[self.kind.split()[-1]]


def draw(random_: random.Random) -> Fault:
    """The next fault: each kind as likely as another, a third of them cuts; a sixth of the others while it starts."""
    kind = CUT if random_.random() < 1 / 3 else random_.choice((*STOPS, *DEATHS))
    world = random_.randint(1, 4)
    starting = random_.random() < 1 / 6
    below = random_.choice(tuple(CUTS))
    return Fault(
        kind,
        world,
        random_.randint(0, 3),
        0 if kind == CUT else random_.randrange(world),
        0 if starting else random_.randint(1, 8),
        random_.uniform(0.0, 1.5 if starting else 0.5),
        random_.randint(1, CUTS[below]),
        below,
    )


def cut(world: int, number: int, below: str) -> Fault:
    """A kill of rank 0 exactly at one call."""
    return Fault(CUT, world, 1, 0, 0, 0.0, number, below)
