"""Brings the training state of all ranks to rank 0, in CPU memory, as whole float32 tensors by name.

ZeRO keeps the float32 parameters and Adam's two moments in flat buffers, of each of which every rank holds an equally
long partition. These are gathered as they lie, in a few large pieces, and cut into tensors on rank 0; by DeepSpeed's
accessors each parameter would take three collectives, and end up on every rank.

    ZeRO 0       every rank has everything
    ZeRO 1, 2    a parameter group is one flat stretch, cut into one partition a rank, whatever parameters the cuts meet
    ZeRO 3       every parameter is cut into one piece a rank, the last one padded; a rank's buffer is a row of pieces

Shapes: W ranks, L elements of a partition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cluster.engine.state import MOMENTS

AT_ONCE = 1 << 24  # elements that rank 0's device holds of all ranks together: 64 MiB

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Place:
    """Where a parameter lies: from which element of all ranks' stretch or, in pieces, of each rank's partition."""

    name: str
    shape: torch.Size
    begin: int
    piece: int = 0  # how long each rank's piece is; 0 where the parameter lies in the stretch in one


@dataclass(frozen=True)
class Buffer:
    """A flat buffer of which this rank holds one partition, float32 on any device, and what lies in it."""

    partition_L: torch.Tensor
    places: tuple[Place, ...]


def gather_state(optimizer: Any, stage: int, trained: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensors] | None:
    """The trained parameters under "parameters" and Adam's moments under their names; None on all ranks but 0.

    Called by all ranks. `optimizer` is DeepSpeed's at this ZeRO stage, or at stage 0 the one that it was given.
    """
    if stage == 0:
        return _own_state(optimizer, trained) if dist.get_rank() == 0 else None
    names = {id(parameter): name for name, parameter in trained.items()}
    found: dict[str, Tensors] = {kind: {} for kind in ("parameters", *MOMENTS)}
    for buffer in (_pieces if stage == 3 else _stretches)(optimizer, names):
        moments = optimizer.optimizer.state[buffer.partition_L]
        for kind, tensors in found.items():
            whole_WL = gather_flat(buffer.partition_L if kind == "parameters" else moments[kind])
            if whole_WL is not None:
                tensors.update(cut(whole_WL, buffer.places))
    if dist.get_rank() != 0:
        return None
    return {kind: {name: tensors[name] for name in trained} for kind, tensors in found.items()}


def gather_flat(partition_L: torch.Tensor, at_once: int = AT_ONCE) -> torch.Tensor | None:
    """Everybody's partition in rank 0's CPU memory, (W, L) float32; None on the others.

    In pieces, so that rank 0's device holds no more than `at_once` elements (or one a rank) of the others.
    """
    own_L = partition_L.detach()
    ranks, length = dist.get_world_size(), len(own_L)
    if ranks == 1:
        return own_L.to("cpu", torch.float32, copy=True)[None]
    whole_WL = boxes_WK = None
    step = max(1, min(length, at_once // ranks))
    if dist.get_rank() == 0:
        whole_WL = torch.empty(ranks, length)
        boxes_WK = own_L.new_empty(ranks, step)
    for begin in range(0, length, step):
        piece = own_L[begin : begin + step]
        if whole_WL is None or boxes_WK is None:
            dist.gather(piece)
            continue
        dist.gather(piece, [box_K[: len(piece)] for box_K in boxes_WK])
        whole_WL[:, begin : begin + step] = boxes_WK[:, : len(piece)].cpu()
    return whole_WL


def cut(whole_WL: torch.Tensor, places: tuple[Place, ...]) -> Tensors:
    """The tensors in a buffer: views where they lie in one, copies where they are put together."""
    tensors = {}
    for place in places:
        end, size = place.begin + place.piece, place.shape.numel()
        flat = whole_WL[:, place.begin : end].reshape(-1) if place.piece else whole_WL.view(-1)[place.begin :]
        tensors[place.name] = flat[:size].view(place.shape)
    return tensors


def _own_state(optimizer: torch.optim.Optimizer, trained: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensors]:
    """ZeRO 0: this rank's own."""
    found = {"parameters": {name: _copied(parameter) for name, parameter in trained.items()}}
    for moment in MOMENTS:
        found[moment] = {name: _copied(optimizer.state[parameter][moment]) for name, parameter in trained.items()}
    return found


def _stretches(optimizer: Any, names: Mapping[int, str]) -> Iterator[Buffer]:
    """ZeRO 1 and 2: a buffer for each parameter group.

    Where a parameter begins is seen from the training weights, which are views into a flat tensor with the same layout,
    in whatever order and with whatever gaps DeepSpeed laid it out.
    """
    groups = zip(
        optimizer.bit16_groups, optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups, strict=True
    )
    for parameters, flat, partition_L in groups:
        places = []
        for parameter in parameters:
            begin = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            if not 0 <= begin <= flat.numel() - parameter.numel():
                raise RuntimeError(f"{names[id(parameter)]} does not lie in DeepSpeed's flat group of parameters")
            places.append(Place(names[id(parameter)], parameter.shape, begin))
        yield Buffer(partition_L, tuple(places))


def _pieces(optimizer: Any, names: Mapping[int, str]) -> Iterator[Buffer]:
    """ZeRO 3: a buffer for each of DeepSpeed's sub-groups."""
    ranks = dist.get_world_size()
    for parameters, partition_L in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        places = []
        for parameter in parameters:
            _, begin, piece = optimizer.grad_position[optimizer.get_param_id(parameter)]
            if not 0 <= piece * ranks - parameter.ds_numel < ranks:
                raise RuntimeError(f"{names[id(parameter)]} is not shared out among all ranks, but among some of them")
            places.append(Place(names[id(parameter)], parameter.ds_shape, begin, piece))
        yield Buffer(partition_L, tuple(places))


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
