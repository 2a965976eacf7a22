"""The loss scale of fp16: one that can be carried between DeepSpeed's scaler (ZeRO 1 to 3) and torch's (ZeRO 0).

Small gradients vanish in fp16, so the loss is multiplied before the backward pass and gradients are divided after it
(Micikevicius et al., "Mixed Precision Training", ICLR 2018). Where they overflow, the step is left out and the scale
halved; after many good steps it is doubled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

START = 2.0**16
GOOD_STEPS_TO_DOUBLE = 1000
LOWEST = 1.0


class LossScale(NamedTuple):
    """The factor, and how many steps in a row it has been good for."""

    scale: float
    good_steps: int


def read_loss_scale(scaler: Any) -> LossScale:
    """The state of a `torch.amp.GradScaler` or of DeepSpeed's dynamic scaler."""
    if hasattr(scaler, "get_scale"):
        state = scaler.state_dict()
        return LossScale(float(state["scale"]), int(state["_growth_tracker"]))
    return LossScale(float(scaler.cur_scale), scaler.cur_iter - scaler.last_overflow_iter - 1)


def write_loss_scale(scaler: Any, state: LossScale) -> None:
    """Sets the state of either kind of scaler."""
    if hasattr(scaler, "get_scale"):
        scaler.load_state_dict({**scaler.state_dict(), "scale": state.scale, "_growth_tracker": state.good_steps})
        return
    scaler.cur_scale, scaler.last_overflow_iter, scaler.cur_iter = state.scale, -1, state.good_steps
