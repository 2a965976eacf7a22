"""One rank: several DeepSpeed engines one after the other (one start of the processes serves them all)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from problem import BETA, SEED, TAU, G, cut, make_batch, make_model

from cluster.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from cluster.engine import Engine, EngineConfig
from cluster.processes import join, leave
from cluster.world import find_world
from launch.config import LossConfig
from launch.prepare import DEEPSPEED_CONFIG
from launch.step import StepSettings, training_step
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
    model = make_model(0.0)
    restored = read_checkpoint(Path(case["load"])) if case.get("load") else None
    if restored:
        model.load_state_dict(restored.training.parameters)
    engine = Engine(
        model,
        EngineConfig(zero_stage=case["stage"], precision=case["precision"]),
        world.size,
        micro_rows,
        -(-rows // micro_rows),
        grad_clip=0.5,
        weight_decay=0.1,
        default_config=DEEPSPEED_CONFIG,
    )
    if restored:
        engine.restore(restored.training)
    settings = StepSettings(LossConfig(tau=TAU, beta=BETA), SEED, world.rank, G, micro_rows)
    first = restored.step if restored else 0
    losses, norms = [], []
    for step in range(first, first + case["steps"]):
        places = iter(features.split(micro_rows))
        result = training_step(engine, lambda images, places=places: next(places), batch, step, 1e-3, settings)
        losses.append(float(result.contrastive + BETA * result.reconstruction))
        norms.append(float(result.grad_norm))
    state = engine.state()
    if case.get("save") and world.rank == 0:
        write_checkpoint(Path(case["save"]), Checkpoint(first + case["steps"], 1, state, {}))
    torch.distributed.barrier()
    found.append(
        {
            "losses": losses,
            "norms": norms,
            "parameters": {name: tensor.flatten().tolist() for name, tensor in state.parameters.items()},
            "moments": {m: {n: t.flatten().tolist() for n, t in part.items()} for m, part in state.moments.items()},
        }
    )
with open(out, "w") as file:
    json.dump(found, file)
leave()
