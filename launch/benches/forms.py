"""One computation in several forms, each timed in turn and its memory measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

import torch

from cluster.processes import use_gpus
from launch.benches.comparison import ROUNDS, Comparison, compared, note, stopwatch

Form = Literal["ours", "recompute", "textbook"]  # as it comes, with --recompute, and as one would write it down

IMAGES, PATCHES, FEATURES = 4, 784, 768  # those of DINO ViT-B/8 at 224 pixels; the textbook form takes 0.3 GB an image


def compare_forms(
    name: str, module: str, against: str, run_of: Callable[[Form], Callable[[], None]]
) -> Iterator[Comparison]:
    """NAME/time and NAME/memory, and the same with --recompute. `run_of` is the module's function of that name."""
    where = torch.cuda.get_device_name() if use_gpus() else f"{torch.get_num_threads()} CPU threads"
    against = f"{against}, {IMAGES} images in float32 on {where}"
    forms: tuple[Form, ...] = get_args(Form)
    note(f"{ROUNDS + 1} rounds, then memory")
    runs: dict[Form, Callable[[], None]] = {form: run_of(form) for form in forms}
    seconds: dict[Form, list[float]] = {form: [] for form in forms}
    for _ in range(ROUNDS + 1):
        for form, run in runs.items():
            seconds[form].append(timed(run))
    seconds = {form: each[1:] for form, each in seconds.items()}  # the first round starts threads and finds kernels
    mib = {form: [_peak_elsewhere(module, form)] for form in forms}
    for form in forms[:2]:
        suffix = "" if form == "ours" else f"-{form}"
        yield compared(f"{name}/time{suffix}", "s", against, seconds[form], seconds["textbook"])
        yield compared(f"{name}/memory{suffix}", "MiB", against, mib[form], mib["textbook"])


def device() -> torch.device:
    """Where to measure."""
    return torch.device("cuda" if use_gpus() else "cpu")


def peak_mib(run: Callable[[], None]) -> float:
    """The most memory that one run takes beyond the most that was in use before it.

    On a CPU that is the process's resident memory, libraries' buffers and all, as Linux tells it; the run has to be
    the first large one.
    """
    if use_gpus():
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _peak_kib()
    run()
    return (_peak_kib() - before) / 2**10


def _peak_kib() -> int:
    """Not getrusage's, which begins with the peak of the process that started this one."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0])


def _peak_elsewhere(module: str, form: Form) -> float:
    code = f"from {module} import run_of; from launch.benches.forms import peak_mib; print(peak_mib(run_of({form!r})))"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def timed(run: Callable[[], object]) -> float:
    """Seconds that a run takes, until the device has finished it."""
    with stopwatch() as seconds:
        run()
        if use_gpus():
            torch.cuda.synchronize()
        return seconds()
