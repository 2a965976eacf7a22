"""One rank: engines that train a backbone too, one after the other, each beside the same in one process."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import torch
from problem import (
    BACKBONE_SCALE,
    BETA,
    CLIP,
    DECAY,
    LR,
    SEED,
    TAU,
    VIT,
    VIT_FEATURES,
    G,
    Trained,
    cut,
    make_finetuned,
    make_pictures,
    train_finetuned,
)

from cluster.checkpoints.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from cluster.collectives import share
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.processes import join, leave
from cluster.world import find_world
from launch.config import LossConfig
from launch.training.prepare import DEEPSPEED_CONFIG
from launch.training.step import StepSettings, losses_and_gradient, training_step
from nsi.finetuned import BACKBONE
from nsi.model import load_trained, undecayed
from shards.order import rank_rows, rows_per_rank

out, plan = sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(1)
world = find_world(os.environ)
join(world)
rows = rows_per_rank(G, world.size)
part = rank_rows(G, world.rank, world.size)
pictures = make_pictures()
batch, _ = cut(pictures, pictures.images_BCHW, part.start, part.stop, rows)
alone = functools.cache(train_finetuned)


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A parameter as a forward sees it."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach().clone()
    import deepspeed  # the engine has prepared it

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def gradients_off(engine: Engine, settings: StepSettings, truth: Trained) -> float:
    """How far the first step's gradient is from one process's, for the worst parameter."""
    from deepspeed.utils import safe_get_full_grad

    losses_and_gradient(engine, lambda images: images, batch, 0, settings)
    found = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters() if p.requires_grad}
    shrunk = CLIP / truth.norms[0]
    differences = {name: (found[name] * shrunk - expected).norm() for name, expected in truth.gradients[0].items()}
    # Relative to the tensor's norm, or to 1e-3 of the global one: some true gradients are zero.
    floor = 1e-3 * CLIP
    return max(float(off / max(truth.gradients[0][name].norm(), floor)) for name, off in differences.items())


def changes_off(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], truth: Trained) -> float:
    """How far what training has changed is from what it changes in one process, for the worst parameter.

    Adam makes whole steps of gradients that are nothing but rounding: elements that had one are left out.
    """
    worst = 0.0
    for name, expected in truth.changes.items():
        solid = torch.stack([gradients[name].abs() for gradients in truth.gradients]).amin(dim=0) > 1e-6
        if solid.any():
            off = (after[name] - before[name] - expected)[solid].norm() / expected[solid].norm()
            worst = max(worst, float(off))
    return worst


found = []
for case in plan:
    micro_rows, vit = case["micro_rows"] or rows, case.get("vit", VIT)
    model = make_finetuned(vit, case.get("recompute", False))
    restored = read_checkpoint(Path(case["load"])) if case.get("load") else None
    if restored:
        load_trained(model, restored.training.parameters)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moved: list[int] = []  # elements in the module's hands whenever it is brought to a device

    def moving(*arguments, model=model, moved=moved):
        moved.append(sum(parameter.numel() for parameter in model.parameters()))
        return type(model).to(model, *arguments)

    model.to = moving
    engine = Engine(
        model,
        EngineConfig(
            zero_stage=case["stage"],
            precision=case["precision"],
            deepspeed_config=Path(case["deepspeed"]) if case.get("deepspeed") else None,
        ),
        world.size,
        micro_rows,
        -(-rows // micro_rows),
        grad_clip=CLIP,
        weight_decay=DECAY,
        default_config=DEEPSPEED_CONFIG,
        undecayed=undecayed(model),
        lr_scales={BACKBONE: BACKBONE_SCALE},
    )
    held = {name: parameter.numel() for name, parameter in engine.module.named_parameters()}
    pieces = {
        name: parameter.ds_tensor.numel()  # pyright: ignore[reportAttributeAccessIssue]
        for name, parameter in engine.module.named_parameters()
        if case["stage"] == 3
    }
    if restored:
        engine.restore(restored.training)
    settings = StepSettings(LossConfig(tau=TAU, beta=BETA), SEED, world.rank, G, micro_rows, VIT_FEATURES)
    first = restored.step if restored else 0
    losses, norms = [], []
    for step in range(first, first + case["steps"]):
        result = training_step(engine, lambda images: images, batch, step, LR, settings)
        losses.append(float(result.contrastive + BETA * result.reconstruction))
        norms.append(result.grad_norm)
    state = share(engine.state())
    if case.get("save") and world.rank == 0:
        write_checkpoint(Path(case["save"]), Checkpoint(first + case["steps"], 1, state, {}))
    torch.distributed.barrier()
    after = {name: whole(parameter) for name, parameter in engine.module.named_parameters()}
    each = {
        "losses": losses,
        "norms": norms,
        "held": held,
        "pieces": pieces,
        "moved": moved,
        "saved": sorted(state.parameters),
        "changed": [name for name in before if not torch.equal(before[name].to(after[name].dtype), after[name])],
    }
    if case.get("compare") == "changes":
        each["off"] = changes_off(before, after, alone(vit, case["steps"]))
    if case.get("compare") == "gradients":
        each["off"] = gradients_off(engine, settings, alone(vit, 1))
    found.append(each)
with open(out, "w") as file:
    json.dump(found, file)
leave()
