"""One training step: this rank's rows through the model, everybody's embeddings in the loss, one exact gradient.

With several micro-batches every row still sees all negatives: a first pass without gradients gives all embeddings,
the loss gives their gradients, and a second pass carries those into the parameters, a micro-batch at a time (Gao et
al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"). Noise is keyed by (seed, step,
sample), so both passes draw the same.

Shapes: R rows of this rank, M rows of a micro-batch, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cluster.collectives import gather_rows, sum_over_ranks
from cluster.engine import Engine
from launch.config import LossConfig
from nsi.batch import Batch
from nsi.loss import Rows, contrastive_sum
from nsi.model import Output
from nsi.noise import KeyedNoise

Features = Callable[[torch.Tensor], torch.Tensor]  # images_BCHW to features_BPF, a frozen backbone


class Differentiated(Protocol):
    """What a step needs of an engine before the optimizer: a module's forward, and gradients that add up."""

    def forward(self, *inputs: Any) -> Any: ...

    def backward(self, loss: torch.Tensor, last: bool) -> None: ...


@dataclass(frozen=True)
class StepSettings:
    """What a step has to know besides its batch."""

    loss: LossConfig
    seed: int
    rank: int
    batch_size: int  # of all ranks, G
    micro_rows: int  # M


@dataclass(frozen=True)
class StepResult:
    """Losses of the whole batch G, and the global gradient norm before clipping. The same on all ranks."""

    contrastive: torch.Tensor
    reconstruction: torch.Tensor
    grad_norm: float

    def is_finite(self) -> bool:
        """Whether the losses and the gradient are numbers still. DeepSpeed says -1 for a norm that is none."""
        return math.isfinite(float(self.contrastive + self.reconstruction) + self.grad_norm) and self.grad_norm >= 0


def training_step(
    engine: Engine, backbone: Features, batch: Batch, step: int, lr: float, settings: StepSettings
) -> StepResult:
    """Forward, loss, backward and the optimizer's step, by all ranks together."""
    contrastive, reconstruction = losses_and_gradient(engine, backbone, batch, step, settings)
    grad_norm = engine.step(lr)
    sums = sum_over_ranks(torch.stack([contrastive.detach().float(), reconstruction.detach().float()]))
    return StepResult(sums[0], sums[1], grad_norm)


def losses_and_gradient(
    engine: Differentiated, backbone: Features, batch: Batch, step: int, settings: StepSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's shares of the contrastive and the reconstruction loss; their gradient is in the engine afterwards.

    Shares and gradients add up over the ranks to those of the one-process batch, whatever the micro-batches.
    """
    slices = [slice(begin, begin + settings.micro_rows) for begin in range(0, len(batch), settings.micro_rows)]
    micro_batches = [batch.select(rows) for rows in slices]
    with torch.no_grad():
        features_MPFs = [backbone(micro.images_BCHW) for micro in micro_batches]
    if len(slices) > 1:
        return _two_passes(engine, features_MPFs, micro_batches, slices, batch, step, settings)
    output = _forward(engine, features_MPFs[0], batch, step, settings)
    contrastive = _contrastive(output.slot_embeddings_BNE, output.primitive_embeddings_BTE, batch, settings)
    reconstruction = _reconstruction(output, batch, features_MPFs[0], settings)
    engine.backward(contrastive + settings.loss.beta * reconstruction, last=True)
    return contrastive, reconstruction


def _two_passes(
    engine: Differentiated,
    features_MPFs: list[torch.Tensor],
    micro_batches: list[Batch],
    slices: list[slice],
    batch: Batch,
    step: int,
    settings: StepSettings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`losses_and_gradient` by several micro-batches."""
    with torch.no_grad():
        first = [
            _forward(engine, features_MPF, micro, step, settings)
            for features_MPF, micro in zip(features_MPFs, micro_batches, strict=True)
        ]
    # Leaves: the loss's gradient stops here and is carried on below.
    slots_RNE = torch.cat([output.slot_embeddings_BNE for output in first]).requires_grad_()
    primitives_RTE = torch.cat([output.primitive_embeddings_BTE for output in first]).requires_grad_()
    contrastive = _contrastive(slots_RNE, primitives_RTE, batch, settings)
    contrastive.backward()
    assert slots_RNE.grad is not None
    assert primitives_RTE.grad is not None
    reconstruction = torch.zeros_like(contrastive)
    for rows, features_MPF, micro in zip(slices, features_MPFs, micro_batches, strict=True):
        output = _forward(engine, features_MPF, micro, step, settings)
        part = _reconstruction(output, micro, features_MPF, settings)
        # The gradient of <z, g> by the parameters is that of the loss where g is the loss's gradient by z.
        carrier = (output.slot_embeddings_BNE * slots_RNE.grad[rows]).sum()
        carrier = carrier + (output.primitive_embeddings_BTE * primitives_RTE.grad[rows]).sum()
        engine.backward(carrier.float() + settings.loss.beta * part, last=micro is micro_batches[-1])
        reconstruction = reconstruction + part.detach()
    return contrastive, reconstruction


def _forward(
    engine: Differentiated, features_MPF: torch.Tensor, batch: Batch, step: int, settings: StepSettings
) -> Output:
    noise = KeyedNoise(settings.seed, step, batch.sample_ids_B)
    return engine.forward(features_MPF, batch.labels_BT3, batch.positions_BT3, batch.objects_BT, noise)


def _contrastive(
    slots_RNE: torch.Tensor, primitives_RTE: torch.Tensor, batch: Batch, settings: StepSettings
) -> torch.Tensor:
    """This rank's share of the contrastive loss: shares add up over the ranks."""
    rows = Rows(slots_RNE, primitives_RTE, batch.objects_BT, batch.sample_ids_B, batch.rows_B)
    total = contrastive_sum(rows, gather_rows, settings.rank, settings.loss.tau, settings.loss.score)
    return total / settings.batch_size


def _reconstruction(output: Output, batch: Batch, features_MPF: torch.Tensor, settings: StepSettings) -> torch.Tensor:
    """These rows' share of the reconstruction loss."""
    total = output.squared_error_B.masked_fill(~batch.rows_B, 0.0).sum() / settings.batch_size
    return total / features_MPF.shape[-1] if settings.loss.reconstruction == "mean" else total
