"""One rank: several DeepSpeed engines one after the other (one start of the processes serves them all)."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from problem import BETA, SEED, TAU, F, G, cut, make_batch, make_model

from cluster.checkpoints.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from cluster.collectives import share
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.loss_scale import LossScale
from cluster.processes import join, leave
from cluster.world import find_world
from launch.config import LossConfig
from launch.training.prepare import DEEPSPEED_CONFIG
from launch.training.step import StepSettings, losses_and_gradient, training_step
from nsi.model import undecayed
from shards.order import rank_rows, rows_per_rank

out, plan = sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(1)
world = find_world(os.environ)
join(world)
rows = rows_per_rank(G, world.size)
part = rank_rows(G, world.rank, world.size)
batch, features = cut(*make_batch(), part.start, part.stop, rows)
found = []
for case in plan:
    micro_rows = case.get("micro_rows") or rows
    model = make_model(case.get("dropout", 0.0), **case.get("options", {}))
    model.decoder.recompute = case.get("recompute", False)
    restored = read_checkpoint(Path(case["load"])) if case.get("load") else None
    if restored:
        model.load_state_dict(restored.training.parameters)
    engine = Engine(
        model,
        EngineConfig(zero_stage=case["stage"], precision=case["precision"]),
        world.size,
        micro_rows,
        -(-rows // micro_rows),
        grad_clip=case.get("grad_clip", 0.5),
        weight_decay=0.1,
        undecayed=undecayed(model),
        default_config=DEEPSPEED_CONFIG,
        clip_only=tuple(case.get("clip_only", ())),
    )
    if restored:
        engine.restore(restored.training)
    settings = StepSettings(LossConfig(tau=TAU, beta=BETA), SEED, world.rank, G, micro_rows, F)
    first = restored.step if restored else 0
    scale = case.get("loss_scale")
    if scale and engine.loss_scale:
        engine.restore(replace(share(engine.state()), loss_scale=LossScale(scale, 0)))
    broken = case.get("broken_steps", [])
    losses, norms, applied, scales = [], [], [], []
    for step in range(first, first + case["steps"]):
        seen = features.clone()
        if step in broken and world.rank == world.size - 1:
            seen[0, 0, 0] = float("nan")
        places = iter(seen.split(micro_rows))
        lr = case["lrs"][step] if "lrs" in case else case.get("lr", 1e-3)
        result = training_step(engine, lambda images, places=places: next(places), batch, step, lr, settings)
        losses.append(float(result.contrastive + BETA * result.reconstruction))
        norms.append(float(result.grad_norm))
        applied.append(result.applied)
        scales.append(engine.loss_scale.scale if engine.loss_scale else None)
    state = share(engine.state())
    gradients = {}
    if case.get("gradients"):
        from deepspeed.utils import safe_get_full_grad  # the engine has prepared its import

        places = iter(features.split(micro_rows))
        losses_and_gradient(engine, lambda images, places=places: next(places), batch, case["steps"], settings)
        for name, parameter in engine.module.named_parameters():
            gradients[name] = safe_get_full_grad(parameter).float().flatten().tolist()
    if case.get("save") and world.rank == 0:
        write_checkpoint(Path(case["save"]), Checkpoint(first + case["steps"], 1, state, {}))
    torch.distributed.barrier()
    found.append(
        {
            "losses": losses,
            "norms": norms,
            "applied": applied,
            "scales": scales,
            "optimizer_steps": state.optimizer_steps,
            "gradients": gradients,
            "parameters": {name: tensor.flatten().tolist() for name, tensor in state.parameters.items()},
            "moments": {m: {n: t.flatten().tolist() for n, t in part.items()} for m, part in state.moments.items()},
        }
    )
with open(out, "w") as file:
    json.dump(found, file)
leave()
