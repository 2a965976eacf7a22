"""One training step: this rank's rows through the model, everybody's embeddings in the loss, one exact gradient.

With several micro-batches every row still sees all negatives: a first pass without gradients and without the decoder
gives all embeddings, the loss gives their gradients, and a second pass carries those into the parameters, a micro-batch
at a time (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"). Noise is keyed
by (seed, step, sample), so both passes draw the same.

Shapes: R rows of this rank, M rows of a micro-batch, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cluster.collectives import gather_rows, sum_over_ranks
from cluster.engine.engine import Engine
from launch.config import LossConfig
from nsi.batch import Batch
from nsi.loss import Gather, Rows, contrastive_sum
from nsi.model import Output
from nsi.noise import KeyedNoise
from nsi.tokens import unpack

# images_BCHW to features_BPF, a frozen backbone; or to themselves, where the model holds its backbone itself.
Features = Callable[[torch.Tensor], torch.Tensor]


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
    feature_dim: int  # F
    gather: Gather = gather_rows  # everybody's rows
    meets_in_forward: bool = False  # ranks wait for each other in the forward: ZeRO 3 gathers each layer there


@dataclass(frozen=True)
class StepResult:
    """Losses of the whole batch G, the global gradient norm before clipping, and whether the weights have changed: not
    where the norm is no finite number. The same on all ranks."""

    contrastive: torch.Tensor
    reconstruction: torch.Tensor
    grad_norm: float
    applied: bool

    def loss_is_finite(self) -> bool:
        """Whether both losses are numbers."""
        return math.isfinite(float(self.contrastive + self.reconstruction))


def _nothing() -> None:
    """Nobody wants to know."""


def training_step(
    engine: Engine,
    backbone: Features,
    batch: Batch,
    step: int,
    lr: float,
    settings: StepSettings,
    met: Callable[[], None] = _nothing,
) -> StepResult:
    """Forward, loss, backward and the optimizer's step, by all ranks together; `met` is called when this rank has done
    what it does by itself and is about to meet the others."""
    contrastive, reconstruction = losses_and_gradient(engine, backbone, batch, step, settings, met)
    grad_norm, applied = engine.step(lr)
    sums = sum_over_ranks(torch.stack([contrastive.detach().float(), reconstruction.detach().float()]))
    return StepResult(sums[0], sums[1], grad_norm, applied)


def losses_and_gradient(
    engine: Differentiated,
    backbone: Features,
    batch: Batch,
    step: int,
    settings: StepSettings,
    met: Callable[[], None] = _nothing,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's shares of the contrastive and the reconstruction loss; their gradient is in the engine afterwards.

    Shares and gradients add up over the ranks to those of the one-process batch, whatever the micro-batches.
    """
    micros = micro_batches(batch, settings)
    with torch.no_grad():
        features_MPFs = [features_of(micro, backbone) for micro in micros]
    if settings.meets_in_forward:
        met()
        met = _nothing
    if len(micros) > 1:
        return _two_passes(engine, features_MPFs, micros, batch, step, settings, met)
    output = forward(engine, features_MPFs[0], batch, step, settings)
    met()
    contrastive = _contrastive(
        output.slot_embeddings_BNE, output.primitive_embeddings_BTE, output.tau_1, batch, settings
    )
    reconstruction = _reconstruction(output, batch, settings)
    engine.backward(contrastive + settings.loss.beta * reconstruction, last=True)
    return contrastive, reconstruction


def features_of(batch: Batch, backbone: Features) -> torch.Tensor:
    """A batch's features_BPF, float32: those that it brings from a feature store, else the backbone's of its images."""
    if batch.features_BPF is None:
        return backbone(batch.images_BCHW)
    return unpack(batch.features_BPF, batch.feature_scales_BP)


def micro_batches(batch: Batch, settings: StepSettings) -> list[Batch]:
    """A rank's rows in portions of M."""
    return [
        batch.select(slice(begin, begin + settings.micro_rows)) for begin in range(0, len(batch), settings.micro_rows)
    ]


def _two_passes(
    engine: Differentiated,
    features_MPFs: list[torch.Tensor],
    micros: list[Batch],
    batch: Batch,
    step: int,
    settings: StepSettings,
    met: Callable[[], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`losses_and_gradient` by several micro-batches."""
    with torch.no_grad():
        first = [
            forward(engine, features_MPF, micro, step, settings, reconstruct=False)
            for features_MPF, micro in zip(features_MPFs, micros, strict=True)
        ]
    met()
    # Leaves: the loss's gradient stops here and is carried on below.
    slots_RNE = torch.cat([output.slot_embeddings_BNE for output in first]).requires_grad_()
    primitives_RTE = torch.cat([output.primitive_embeddings_BTE for output in first]).requires_grad_()
    tau_1 = first[0].tau_1.clone().requires_grad_()
    contrastive = _contrastive(slots_RNE, primitives_RTE, tau_1, batch, settings)
    contrastive.backward()
    assert slots_RNE.grad is not None
    assert primitives_RTE.grad is not None
    assert tau_1.grad is not None
    reconstruction = torch.zeros_like(contrastive)
    grads = zip(slots_RNE.grad.split(settings.micro_rows), primitives_RTE.grad.split(settings.micro_rows), strict=True)
    for features_MPF, micro, (slots_grad_MNE, primitives_grad_MTE) in zip(features_MPFs, micros, grads, strict=True):
        output = forward(engine, features_MPF, micro, step, settings)
        part = _reconstruction(output, micro, settings)
        # The gradient of <z, g> by the parameters is that of the loss where g is the loss's gradient by z.
        carrier = (output.slot_embeddings_BNE * slots_grad_MNE).sum()
        carrier = carrier + (output.primitive_embeddings_BTE * primitives_grad_MTE).sum()
        carrier = carrier + (output.tau_1 * tau_1.grad).sum() / len(micros)  # all micro-batches have the same
        engine.backward(carrier.float() + settings.loss.beta * part, last=micro is micros[-1])
        reconstruction = reconstruction + part.detach()
    return contrastive, reconstruction


def forward(
    engine: Differentiated,
    features_MPF: torch.Tensor,
    batch: Batch,
    step: int,
    settings: StepSettings,
    reconstruct: bool = True,
) -> Output:
    """The model over some rows, with the noise of a step; without `reconstruct` no further than to the embeddings."""
    noise = KeyedNoise(settings.seed, step, batch.sample_ids_B)
    return engine.forward(features_MPF, batch.labels_BT3, batch.positions_BT3, batch.objects_BT, noise, reconstruct)


def _contrastive(
    slots_RNE: torch.Tensor, primitives_RTE: torch.Tensor, tau_1: torch.Tensor, batch: Batch, settings: StepSettings
) -> torch.Tensor:
    """This rank's share of the contrastive loss: shares add up over the ranks."""
    rows = Rows(slots_RNE, primitives_RTE, batch.objects_BT, batch.sample_ids_B, batch.rows_B)
    total = contrastive_sum(rows, settings.gather, settings.rank, tau_1, settings.loss.score)
    return total / settings.batch_size


def _reconstruction(output: Output, batch: Batch, settings: StepSettings) -> torch.Tensor:
    """These rows' share of the reconstruction loss."""
    total = output.squared_error_B.masked_fill(~batch.rows_B, 0.0).sum() / settings.batch_size
    return total / settings.feature_dim if settings.loss.reconstruction == "mean" else total
