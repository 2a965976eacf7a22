"""`--compile`: torch.compile for what it can speed up, on request, and eager again where it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cluster.engine.config import ZeroStage


def compile_model(model: nn.Module, zero_stage: ZeroStage, warn: Callable[[str], None]) -> None:
    """Compiles slot attention at its first step: many small operations in a loop, on a GPU a kernel launch each.

    Results are equal to rounding. Nothing else is compiled: the decoder is arranged by hand, and the keyed noise of the
    heads and the schema encoder hashes Python integers, which torch.compile cannot trace. `warn` is given one line
    where nothing is compiled.
    """
    if zero_stage == 3:
        warn("--compile is off: under ZeRO 3 parameters come and go within a forward, which cannot be compiled")
        return
    part = model.get_submodule("slot_attention")
    part.forward = compiled_or_eager(part.forward, warn)


def compiled_or_eager(eager: Callable[..., Any], warn: Callable[[str], None]) -> Callable[..., Any]:
    """A compiled function that becomes the eager one at its first failure, with one line to `warn`."""
    now = torch.compile(eager, dynamic=False)

    def call(*arguments: Any) -> Any:
        nonlocal now
        if now is eager:
            return eager(*arguments)
        try:
            return now(*arguments)
        except Exception as error:  # torch.compile fails in a dozen ways, with errors of its own and of compilers
            now = eager
            reason = next(iter(str(error).splitlines()), "")
            warn(f"--compile is off: it failed here ({type(error).__name__}: {reason[:200]})")
            return eager(*arguments)

    return call
