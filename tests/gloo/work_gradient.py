"""One rank: the gradient of the gathered loss in float64, without DeepSpeed."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from problem import BETA, CONFIG, SEED, TAU, F, G, cut, make_batch, make_model  # noqa: F401

from cluster.collectives import any_rank, collect, gather_rows, share, sum_over_ranks
from cluster.processes import join, leave
from cluster.world import find_world
from launch.config import LossConfig
from launch.training.step import StepSettings, losses_and_gradient
from shards.order import rank_rows, rows_per_rank

out, dropout, micro_rows = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
world = find_world(os.environ)
join(world)


class PlainEngine:
    """The same two verbs as cluster.engine's, with autograd alone."""

    def __init__(self) -> None:
        self.model = make_model(dropout).double()

    def forward(self, *inputs):
        return self.model(*inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()


rows = rows_per_rank(G, world.size)
part = rank_rows(G, world.rank, world.size)
batch, features = cut(*make_batch(), part.start, part.stop, rows)
engine = PlainEngine()
settings = StepSettings(LossConfig(tau=TAU, beta=BETA), SEED, world.rank, G, micro_rows or rows, F)


def backbone(images: torch.Tensor) -> torch.Tensor:
    """Hands out the features in the order of the rows."""
    global begin
    begin += len(images)
    return features[begin - len(images) : begin].double()


begin = 0
contrastive, reconstruction = losses_and_gradient(engine, backbone, batch, 4, settings)
loss = sum_over_ranks((contrastive + BETA * reconstruction).detach())
gradients = {name: sum_over_ranks(p.grad).flatten().tolist() for name, p in engine.model.named_parameters()}
with open(out, "w") as file:
    json.dump(
        {
            "loss": loss.item(),
            "gradients": gradients,
            "share": share(world.rank + 5),
            "collect": collect(world.rank),
            "any": [any_rank(world.rank == world.size - 1), any_rank(False)],
            "flags": gather_rows(torch.tensor([world.rank == 0])).tolist(),
        },
        file,
    )
leave()
assert not dist.is_initialized()
