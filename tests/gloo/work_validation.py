"""One rank: validations by DeepSpeed engines of every stage, of all rows at once and by portions."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import torch
from problem import BETA, SEED, TAU, F, G, Pooled, make_model, make_split

from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.processes import join, leave
from cluster.world import find_world
from launch.config import LossConfig
from launch.training.prepare import DEEPSPEED_CONFIG
from launch.training.step import StepSettings, training_step
from launch.training.validation import validate
from shards.order import rows_per_rank

out, stages, micro_rows = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
world = find_world(os.environ)
join(world)
rows = rows_per_rank(G, world.size)
portions = -(-rows // micro_rows)
split = make_split(world.rank, world.size)
settings = StepSettings(LossConfig(tau=TAU, beta=BETA), SEED, world.rank, G, micro_rows, F)
found = []
for stage in stages:
    config = EngineConfig(zero_stage=stage)
    engine = Engine(make_model(0.3), config, world.size, micro_rows, portions, 0.5, 0.1, DEEPSPEED_CONFIG)
    each = []
    for step in range(2):  # before training and after a step of it
        for at_once in (rows, micro_rows):
            each.append(validate(engine, Pooled(), split, replace(settings, micro_rows=at_once), 3).figures)
        training_step(engine, Pooled(), split[0], step, 1e-3, settings)
    found.append(each)
with open(out, "w") as file:
    json.dump(found, file)
leave()
