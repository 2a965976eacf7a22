"""`--recipe reference` and training's own step against the public NSI code's numbers, in float64 to 1e-9 relative.

tests/golden/reference_goldens.json says how weights and inputs are drawn, the .npz holds the public code's results
(a fact sheet of the project describes that code; none of it is here).

Shapes: B scenes, P patches, F features, N slots, T objects, D slot width, E embedding.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.config import TrainConfig
from launch.recipes import recipe_defaults
from launch.training.schedule import Plateau, learning_rate
from launch.training.step import StepSettings, losses_and_gradient
from nsi.batch import Batch
from nsi.maxsim import maxsim
from nsi.model import NeuralSlotInterpreter, Output
from nsi.noise import KeyedNoise
from nsi.reference_names import by_reference_key, from_reference

GOLDEN = Path(__file__).parents[1] / "golden"
RECIPE = json.loads((GOLDEN / "reference_goldens.json").read_text())
DIMS = RECIPE["dims"]
TOLERANCE = 1e-9


def reference() -> TrainConfig:
    """`--recipe reference` in the goldens' sizes; they were made without dropout and without clipping."""
    config = recipe_defaults("reference", TrainConfig("", Path()))
    model = replace(
        config.model,
        num_slots=DIMS["num_slots"],
        num_iterations=DIMS["num_iterations"],
        slot_dim=DIMS["slot_dim"],
        mlp_hidden_size=DIMS["slot_mlp_hidden"],
        embed_dim=DIMS["embed_dim"],
        num_blocks=DIMS["num_blocks"],
        d_model=DIMS["d_model"],
        num_heads=DIMS["num_heads"],
        dropout=0.0,
    )
    assert model.decoder_hidden_dim == DIMS["decoder_hidden"]
    loss, optim = config.loss, config.optim
    assert (loss.tau, loss.beta, optim.lr) == (RECIPE["tau"], RECIPE["beta"], RECIPE["lr"])
    return replace(config, model=model, optim=replace(optim, lr_warmup_steps=RECIPE["lr_warmup_steps"]))


CONFIG = reference()


def drawn_parameters():
    for module, seed in (("slot_encoder", 1000), ("program_encoder", 5000)):
        for index, (key, shape) in enumerate(RECIPE["parameters"][module]):
            value = np.random.RandomState(seed + index).randn(*shape)
            if len(shape) > 1:
                value /= np.sqrt(shape[-1])
            else:
                value = 0.1 * value + (1 if key.endswith("weight") and "norm" in key else 0)
            yield module, key, torch.from_numpy(value)


class GivenNoise(KeyedNoise):
    """The drawn slot noise of one step in the place of the keyed one."""

    def normal(self, stream, shape):
        return slot_noise()[self.step][self.sample_ids_B]


def slot_noise():
    shape = (RECIPE["steps"], DIMS["batch"], DIMS["num_slots"], DIMS["slot_dim"])
    return torch.from_numpy(np.random.RandomState(2).randn(*shape))


def build() -> NeuralSlotInterpreter:
    counts = (3, 4, 60)
    model = NeuralSlotInterpreter(
        CONFIG.model, DIMS["feature_dim"], DIMS["positions"], counts, CONFIG.loss.tau
    ).double()
    model.load_state_dict(
        from_reference(model, {f"{module}.{key}": value for module, key, value in drawn_parameters()})
    )
    return model


def inputs() -> tuple[torch.Tensor, Batch]:
    shape = (DIMS["batch"], DIMS["positions"], DIMS["feature_dim"])
    features_BPF = torch.from_numpy(np.random.RandomState(1).randn(*shape))
    draw, rows = np.random.RandomState(3), (DIMS["batch"], DIMS["max_objects"])
    labels = np.concatenate([draw.randint(0, count, (*rows, 1)) for count in (3, 4, 60)], axis=-1)
    positions = draw.uniform(-3, 3, (*rows, 3))
    objects_BT = torch.arange(DIMS["max_objects"])[None] < torch.tensor(RECIPE["lengths"])[:, None]
    real = objects_BT[..., None].numpy()
    return features_BPF, Batch(
        sample_ids_B=torch.arange(DIMS["batch"]),
        rows_B=torch.ones(DIMS["batch"], dtype=torch.bool),
        images_BCHW=torch.zeros(DIMS["batch"], 3, 1, 1, dtype=torch.uint8),
        labels_BT3=torch.from_numpy(labels * real),
        positions_BT3=torch.from_numpy(positions * real),
        objects_BT=objects_BT,
        keys=("",) * DIMS["batch"],
    )


class PlainEngine:
    """What a step needs of an engine, by autograd alone and with the goldens' noise; keeps the last output."""

    def __init__(self, model: NeuralSlotInterpreter) -> None:
        self.model = model
        self.output: Output | None = None

    def forward(self, features_BPF, labels_BT3, positions_BT3, objects_BT, noise: KeyedNoise, *more) -> Output:
        given = GivenNoise(noise.seed, noise.step, noise.sample_ids_B)
        self.output = self.model(features_BPF, labels_BT3, positions_BT3, objects_BT, given, *more)
        return self.output

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()


def losses(model: NeuralSlotInterpreter, step: int, features_BPF: torch.Tensor, batch: Batch):
    """Training's own step before the optimizer: (output, loss, contrastive, reconstruction), gradients in the model."""
    engine = PlainEngine(model)
    settings = StepSettings(CONFIG.loss, CONFIG.optim.seed, 0, DIMS["batch"], DIMS["batch"], features_BPF.shape[-1])
    contrastive, reconstruction = losses_and_gradient(engine, lambda images: features_BPF, batch, step, settings)
    return engine.output, contrastive + CONFIG.loss.beta * reconstruction, contrastive, reconstruction


@pytest.fixture(scope="module", autouse=True)
def _world_of_one():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def distance(ours, theirs) -> float:
    """The largest difference, relative to the golden tensor's largest value."""
    ours, theirs = np.asarray(torch.as_tensor(ours).detach()), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "reference_goldens.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def first_step():
    """One forward and backward: the model with its gradients, the results, and what the modules gave inside."""
    model, batch, inside = build(), inputs(), {}
    hooks = [
        # A hook's return value would take the output's place: update() has none.
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: inside.update({name: output}))
        for name in ("slot_attention", "decoder", "schema_encoder")
    ]
    results = losses(model, 0, *batch)
    for hook in hooks:
        hook.remove()
    return model, batch, results, inside


def test_forward(golden, first_step):
    _, (_, batch), (output, loss, contrastive, reconstruction), inside = first_step
    scores_BB = maxsim(output.slot_embeddings_BNE, output.primitive_embeddings_BTE, batch.objects_BT, CONFIG.loss.score)
    ours = {
        "slots": output.slots_BND,
        "slot_embeddings": output.slot_embeddings_BNE,
        "slot_attention_first8": inside["slot_attention"][1].transpose(1, 2)[:, :8],
        "alpha_masks_rowsum_position0": output.alphas_BNP[..., :4],
        "reconstruction_first8": inside["decoder"][0][:, :8],
        "schema_hidden": inside["schema_encoder"][1],
        "schema_embeddings": output.primitive_embeddings_BTE,
        "logits": scores_BB,
        "loss": loss,
        "contrastive": contrastive,
        "mse": reconstruction,
    }
    far = {name: distance(value, golden[name]) for name, value in ours.items()}
    assert max(far.values()) < TOLERANCE, far


def test_gradient_norms(golden, first_step):
    parameters = dict(first_step[0].named_parameters())
    norms = {
        "gradnorm/" + key.replace(".", "/", 1): torch.cat([parameters[name].grad.flatten() for name in names]).norm()
        for key, names in by_reference_key(parameters).items()
    }
    stored = {name for name in golden if name.startswith("gradnorm/")}
    assert set(norms) == stored
    # Adding one vector to all slots' queries leaves the softmax over slots as it is, so the gradient of norm_slots'
    # bias is truly zero and its stored norm is rounding: hence a floor far below every other norm.
    far = {name: abs(float(norms[name]) - golden[name]) / max(golden[name], 1e-3) for name in stored}
    assert max(far.values()) < TOLERANCE, {name: value for name, value in far.items() if value >= TOLERANCE}


def adam(model: NeuralSlotInterpreter) -> torch.optim.Optimizer:
    """The optimizer that cluster.engine gives DeepSpeed; without weight decay it is Adam."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=CONFIG.optim.weight_decay)


def update(optimizer: torch.optim.Optimizer, step: int) -> None:
    """One step at the recipe's rate. The stored trajectory was made without clipping."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(CONFIG.optim, step, RECIPE["steps"], Plateau())
    optimizer.step()


def test_first_adam_step(golden, first_step):
    trained, batch, *_ = first_step
    model = copy.deepcopy(trained)
    for copied, original in zip(model.parameters(), trained.parameters(), strict=True):
        copied.grad = original.grad  # which a copy of a parameter leaves behind
    update(adam(model), 0)
    second = torch.stack(losses(model, 1, *batch)[1:])
    assert distance(second, golden["trajectory_loss_contrastive_mse"][1]) < TOLERANCE


@pytest.mark.slow  # ten seconds a step on one core
@pytest.mark.parametrize("steps", [5, pytest.param(RECIPE["steps"], marks=pytest.mark.long)])
def test_adam_trajectory(golden, steps: int):
    model, batch = build(), inputs()
    optimizer = adam(model)
    rows = []
    for step in range(steps):
        optimizer.zero_grad()
        _, loss, contrastive, reconstruction = losses(model, step, *batch)
        update(optimizer, step)
        rows.append([loss.item(), contrastive.item(), reconstruction.item()])
    far = np.abs(np.array(rows) / golden["trajectory_loss_contrastive_mse"][:steps] - 1).max(axis=1)
    assert far.max() < TOLERANCE, far
