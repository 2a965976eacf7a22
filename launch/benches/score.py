"""The contrastive loss of a global batch beside its dense form, forward and backward, in seconds and in memory.

Shapes: B rows, N slots, T objects, E embedding.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor

from cluster.processes import use_gpus
from launch.benches.comparison import Comparison, compare, compared, note
from launch.benches.forms import device, peak_mib, timed
from nsi.loss import Rows, contrastive_sum

Side = Literal["ours", "dense"]

N, T, E, TAU = 15, 10, 64, 0.1  # the defaults of `nsi train`
BATCH = 1024  # the dense form's matrix takes 0.6 GB, and four times that for twice the batch
LARGE_BATCH = 8192


def comparisons(data: Path | None, scenes: int) -> Iterator[Comparison]:
    """Time and memory at a batch that both can do; then, as a note, what ours alone takes for a large one."""
    where = torch.cuda.get_device_name() if use_gpus() else f"{torch.get_num_threads()} CPU threads"
    against = f"the dot products of all slots and primitives at once, a batch of {BATCH:,} on {where}"
    ours, dense = run_of("ours", BATCH), run_of("dense", BATCH)
    for run in (ours, dense):
        run()  # starts threads and finds kernels
    yield compare("score/time", "s", against, lambda: timed(ours), lambda: timed(dense))
    mib = [float(_elsewhere(side, BATCH)[0]) for side in ("ours", "dense")]
    yield compared("score/memory", "MiB", against, mib[:1], mib[1:])
    peak, seconds = _elsewhere("ours", LARGE_BATCH)
    matrix = LARGE_BATCH**2 * N * T * 4 / 2**20
    note(
        f"ours at a batch of {LARGE_BATCH:,}: {peak:.0f} MiB, {seconds:.1f} s; the matrix would have {matrix:,.0f} MiB"
    )


def run_of(side: Side, batch: int) -> Callable[[], None]:
    """One forward and backward of distinct scenes with all their objects."""
    generator = torch.Generator().manual_seed(0)
    slots_BNE, primitives_BTE = (
        (torch.randn(batch, tokens, E, generator=generator) / 8).to(device()).requires_grad_() for tokens in (N, T)
    )
    ids_B = torch.arange(batch, device=device())
    objects_BT = torch.ones(batch, T, dtype=torch.bool, device=device())
    rows = Rows(slots_BNE, primitives_BTE, objects_BT, ids_B, objects_BT[:, 0])

    def run() -> None:
        slots_BNE.grad = primitives_BTE.grad = None
        loss = contrastive_sum(rows, lambda tensor: tensor, 0, TAU) if side == "ours" else dense_sum(rows)
        loss.backward()

    return run


def dense_sum(rows: Rows) -> Tensor:
    """The loss of distinct scenes with all their objects, by autograd."""
    dots_KQ = rows.slots_RNE.flatten(0, 1) @ rows.primitives_RTE.flatten(0, 1).T  # K = B * N slots, Q = B * T
    scores_BB = dots_KQ.view(-1, N, len(rows.rows_R), T).max(dim=1).values.sum(dim=-1) / TAU
    own_B, cross_entropy = rows.sample_ids_R, functional.cross_entropy
    return (cross_entropy(scores_BB, own_B, reduction="sum") + cross_entropy(scores_BB.T, own_B, reduction="sum")) / 2


def main(side: Side, batch: int) -> None:
    """Prints the memory and the seconds of one run, the first large one of this process."""
    run_of(side, 64)()  # libraries take their memory
    run = run_of(side, batch)
    seconds: list[float] = []
    print(peak_mib(lambda: seconds.append(timed(run))), *seconds)


def _elsewhere(side: Side, batch: int) -> tuple[float, float]:
    command = [sys.executable, "-c", f"from launch.benches.score import main; main({side!r}, {batch})"]
    peak, seconds = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(peak), float(seconds)
