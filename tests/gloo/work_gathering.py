"""One rank: the training state gathered flat beside the same gathered tensor by tensor, in many engines."""

from __future__ import annotations

import json
import os
import sys

import torch
from problem import make_finetuned
from torch import nn

from cluster.collectives import share
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.gathering import gather_flat
from cluster.engine.state import MOMENTS, TrainingState
from cluster.processes import join, leave
from cluster.world import find_world
from launch.training.prepare import DEEPSPEED_CONFIG

Tensors = dict[str, torch.Tensor]


class Odd(nn.Module):
    """Parameters whose sizes nothing divides, one smaller than any world, and a part that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.first = nn.Linear(3, 7)
        self.table = nn.Embedding(11, 7)
        self.last = nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 13), nn.Linear(13, 1))
        self.scale_1 = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.scale_1.dtype)
        return (self.last(self.first(self.frozen(x)) + self.table.weight.mean(dim=0)) * self.scale_1).float().sum()


def by_tensor(engine: Engine, stage: int) -> dict[str, Tensors]:
    """Parameters and moments as DeepSpeed's own accessors give them, one by one."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state  # prepared by the engine

    found: dict[str, Tensors] = {kind: {} for kind in ("parameters", *MOMENTS)}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 0:
            found["parameters"][name] = parameter.detach().clone()
        else:
            found["parameters"][name] = safe_get_full_fp32_param(parameter).clone()  # pyright: ignore
        for moment in MOMENTS:
            held = engine._optimizer.state[parameter][moment] if stage == 0 else None
            whole = safe_get_full_optimizer_state(parameter, moment) if held is None else held
            found[moment][name] = whole.clone()  # pyright: ignore
    return found


def differences(state: TrainingState, found: dict[str, Tensors]) -> list[str]:
    """What is not the same, bit for bit; a name for each tensor."""
    ours = {"parameters": state.parameters, **state.moments}
    if any(list(ours[kind]) != list(found[kind]) for kind in found):
        return ["names"]
    return [
        f"{kind} {name}"
        for kind, tensors in found.items()
        for name, tensor in tensors.items()
        if ours[kind][name].dtype != torch.float32 or not torch.equal(ours[kind][name], tensor)
    ]


out, plan = sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(1)
world = find_world(os.environ)
join(world)

# Of uneven pieces, of pieces of one, and at once: rank r holds 100 r + 0, 1, 2, ...
own = torch.arange(17.0) + 100 * world.rank
pieces = [gather_flat(own, at_once) for at_once in (1, 5 * world.size, 1000)]
expected = torch.arange(17.0) + 100 * torch.arange(world.size)[:, None]
flat = [whole is None if world.rank else torch.equal(whole, expected) for whole in pieces]

found = []
for case in plan:
    torch.manual_seed(3)
    model = make_finetuned() if case.get("finetuned") else Odd()
    settings = EngineConfig(zero_stage=case["stage"], precision=case["precision"])
    scales = {"first.": 0.5, "table.": 0.25, "backbone.": 0.1}
    spared = frozenset(name for name, _ in model.named_parameters() if name.endswith("bias"))
    engine = Engine(model, settings, world.size, 2, 1, 1.0, 0.1, DEEPSPEED_CONFIG, undecayed=spared, lr_scales=scales)
    for step in range(case["steps"]):
        torch.manual_seed(10 * step + world.rank)
        engine.backward(engine.forward(torch.randn(2, 3)) * 1e-3, last=True)  # fp16's loss scale is high
        engine.step(1e-2)
    state = engine.state()
    assert (state is None) == (world.rank != 0)
    whole = share(state)
    found.append(
        {
            "groups": len(engine._optimizer.param_groups),
            "tensors": len(whole.parameters),
            "differences": differences(whole, by_tensor(engine, case["stage"])),
            "moving": any(bool(moment.any()) for moment in whole.moments["exp_avg"].values()),
        }
    )
with open(out, "w") as file:
    json.dump({"flat": flat, "cases": found}, file)
leave()
