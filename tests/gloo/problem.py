"""A small training problem that every world solves: its one-process solution is the truth."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from nsi.backbone import Backbone, build_backbone
from nsi.batch import Batch
from nsi.finetuned import BACKBONE, FinetunedInterpreter
from nsi.loss import Rows, contrastive_sum
from nsi.model import ModelConfig, NeuralSlotInterpreter, undecayed
from nsi.noise import KeyedNoise
from shards.order import rank_rows, rows_per_rank

G, T, P, F = 7, 5, 9, 12  # rows of the whole batch (no world of 2, 3 or 4 divides it), objects, patches, features
COUNTS = (3, 4, 6)
TAU, BETA, SEED = 0.5, 1.0, 3
SIZE, VIT, VIT_FEATURES = 32, "test_vit", 64  # of the problem with pictures, whose backbone is trained too: 4 patches
LR, BACKBONE_SCALE, DECAY, CLIP = 1e-3, 0.1, 0.1, 0.5
CONFIG = ModelConfig(
    num_slots=4,
    num_iterations=2,
    slot_dim=16,
    mlp_hidden_size=16,
    embed_dim=8,
    num_blocks=1,
    d_model=16,
    num_heads=2,
    decoder_hidden_dim=24,
)


def make_model(dropout: float, **options) -> NeuralSlotInterpreter:
    torch.manual_seed(1)
    config = replace(CONFIG, dropout=dropout, schema_dropout=dropout, **options)
    model = NeuralSlotInterpreter(config, F, P, COUNTS, TAU)
    with torch.no_grad():  # keep scores small, so that no gradient vanishes in a saturated softmax
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


def make_adam(model: NeuralSlotInterpreter) -> torch.optim.AdamW:
    """AdamW as training has it: some parameters are spared from weight decay."""
    spared = undecayed(model)
    groups = [
        {"params": [p for name, p in model.named_parameters() if (name in spared) == spare], "weight_decay": decay}
        for spare, decay in ((False, 0.1), (True, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=1e-3)


def make_batch() -> tuple[Batch, torch.Tensor]:
    """The whole batch and its features. Row 5 is row 2's scene once more: no negative of it."""
    generator = torch.Generator().manual_seed(0)
    features_GPF = torch.randn(G, P, F, generator=generator)
    labels_GT3 = torch.stack([torch.randint(0, count, (G, T), generator=generator) for count in COUNTS], dim=-1)
    positions_GT3 = torch.randn(G, T, 3, generator=generator)
    objects_GT = torch.arange(T) < torch.randint(1, T + 1, (G, 1), generator=generator)
    ids_G = torch.tensor([10, 11, 12, 13, 14, 12, 16])
    for tensor in (features_GPF, labels_GT3, positions_GT3, objects_GT):
        tensor[5] = tensor[2]
    images = torch.zeros(G, 3, 1, 1, dtype=torch.uint8)
    rows = torch.ones(G, dtype=torch.bool)
    keys = tuple(str(i) for i in ids_G.tolist())
    return Batch(ids_G, rows, images, labels_GT3, positions_GT3, objects_GT, keys), features_GPF


def cut(batch: Batch, features: torch.Tensor, begin: int, end: int, rows: int) -> tuple[Batch, torch.Tensor]:
    """Rows [begin, end) filled up to `rows` with empty ones."""

    def fill(tensor: torch.Tensor, value: float = 0) -> torch.Tensor:
        part = tensor[begin:end]
        return torch.cat([part, part.new_full((rows - len(part), *part.shape[1:]), value)])

    return (
        Batch(
            fill(batch.sample_ids_B, -1),
            fill(batch.rows_B),
            fill(batch.images_BCHW),
            fill(batch.labels_BT3),
            fill(batch.positions_BT3),
            fill(batch.objects_BT),
            batch.keys[begin:end] + ("",) * (rows - (end - begin)),
        ),
        fill(features),
    )


def make_finetuned(vit: str = VIT, recompute: bool = False) -> FinetunedInterpreter:
    torch.manual_seed(1)
    config = replace(CONFIG, dropout=0.0, schema_dropout=0.0)
    model = FinetunedInterpreter(config, build_backbone(vit, SIZE), SIZE, COUNTS, TAU, recompute)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.startswith(BACKBONE):
                parameter.mul_(0.5)
    return model


def make_pictures() -> Batch:
    """The whole batch with pictures in place of features."""
    batch, _ = make_batch()
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (G, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    images[5] = images[2]
    return replace(batch, images_BCHW=images)


class Pooled(Backbone):
    """The pictures' mean colours as features of the problem without pictures."""

    feature_dim, grid = F, (3, 3)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images_BCHW / 255, 6).view(-1, P, F)


def make_split(rank: int, size: int) -> list[Batch]:
    """A rank's batches of a split: one whole, of whose scenes one could not be read, and a tail, whose rows are mostly
    empty."""
    whole, tail = make_pictures(), make_pictures()
    for tensor in whole.tensors().values():
        tensor[3] = 0
    whole.sample_ids_B[3] = -1
    tail.sample_ids_B.add_(10)
    tail.positions_BT3.neg_()
    parts = ((batch, rank_rows(scenes, rank, size)) for batch, scenes in ((whole, G), (tail, 4)))
    return [cut(batch, batch.images_BCHW, part.start, part.stop, rows_per_rank(G, size))[0] for batch, part in parts]


def make_finetuned_adam(model: FinetunedInterpreter) -> torch.optim.AdamW:
    spared = undecayed(model)
    return torch.optim.AdamW(
        [
            {
                "params": [parameter],
                "weight_decay": 0.0 if name in spared else DECAY,
                "lr": LR * (BACKBONE_SCALE if name.startswith(BACKBONE) else 1),
            }
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
    )


class Trained(NamedTuple):
    """What steps in one process without DeepSpeed come to."""

    losses: list[float]
    norms: list[float]
    changes: dict[str, torch.Tensor]  # of the trained parameters
    gradients: list[dict[str, torch.Tensor]]  # of each step, after clipping


def train_finetuned(vit: str, steps: int) -> Trained:
    """Steps of AdamW with two learning rates."""
    model = make_finetuned(vit)
    adam = make_finetuned_adam(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    losses, norms, gradients = [], [], []
    for step in range(steps):
        adam.zero_grad()
        loss = finetuned_loss(model, step)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), CLIP).item())
        gradients.append({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})
        adam.step()
        losses.append(loss.item())
    changes = {name: parameter.detach() - before[name] for name, parameter in trained.items()}
    return Trained(losses, norms, changes, gradients)


def one_process_loss(model: NeuralSlotInterpreter, step: int) -> torch.Tensor:
    """The loss of the whole batch, textbook form, for autograd to differentiate."""
    batch, features_GPF = make_batch()
    return _loss(model, features_GPF.to(next(model.parameters()).dtype), batch, step, F)


def finetuned_loss(model: FinetunedInterpreter, step: int) -> torch.Tensor:
    """The same of the problem with pictures."""
    batch = make_pictures()
    return _loss(model, batch.images_BCHW, batch, step, VIT_FEATURES)


def _loss(model: NeuralSlotInterpreter, inputs: torch.Tensor, batch: Batch, step: int, features: int) -> torch.Tensor:
    noise = KeyedNoise(SEED, step, batch.sample_ids_B)
    output = model(inputs, batch.labels_BT3, batch.positions_BT3, batch.objects_BT, noise)
    rows = Rows(
        output.slot_embeddings_BNE,
        output.primitive_embeddings_BTE,
        batch.objects_BT,
        batch.sample_ids_B,
        batch.rows_B,
    )
    contrastive = contrastive_sum(rows, lambda tensor: tensor, 0, output.tau_1) / G
    return contrastive + BETA * output.squared_error_B.mean() / features
