"""Our modules against numbers that the public NSI code computed in float64, to 1e-9 relative.

tests/golden/reference_goldens.json says how weights and inputs are drawn, the .npz holds the public code's results
(a fact sheet of the project describes that code; none of it is here).

Shapes: B scenes, P patches, F features, N slots, T objects, D slot width, E embedding.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

from nsi.maxsim import maxsim
from nsi.model import ModelConfig, NeuralSlotInterpreter
from nsi.noise import KeyedNoise

GOLDEN = Path(__file__).parents[1] / "golden"
RECIPE = json.loads((GOLDEN / "reference_goldens.json").read_text())
DIMS = RECIPE["dims"]
TOLERANCE = 1e-9

SLOT_ENCODER = {
    "slot_attn.slot_mu": "slot_attention.slot_mu",
    "slot_attn.slot_log_sigma": "slot_attention.slot_log_sigma",
    "slot_attn.layer_norm": "slot_attention.input_norm",
    "slot_attn.mlp": "slot_attention.input_mlp",
    "slot_attn.slot_attention": "slot_attention",
    "embed_proj": "slot_head.project",
    "norm_embed": "slot_head.norm",
    "embed_mlp": "slot_head.mlp",
    "decoder.postional_encoding.weight": "decoder.positions",
    "decoder.mlp.0.weight": "decoder.first_weight",
    "decoder.mlp.0.bias": "decoder.first_bias",
    "decoder.mlp.2": "decoder.hidden.0",
    "decoder.mlp.4": "decoder.hidden.1",
    "decoder.mlp.6": "decoder.alpha+features",  # the first output is alpha's
}
PROGRAM_ENCODER = {
    "size_embedding": "schema_encoder.tables.0",
    "shape_embedding": "schema_encoder.tables.1",
    "material_embedding": "schema_encoder.tables.2",
    "pos_embedding.0": "schema_encoder.position",
    "program_embed": "schema_encoder.fuse",
    "encoder.blocks": "schema_encoder.blocks",
    "encoder.layer_norm": "schema_encoder.norm",
    "embed_proj": "schema_encoder.head.project",
    "norm_embed": "schema_encoder.head.norm",
    "embed_mlp": "schema_encoder.head.mlp",
}
INSIDE_A_BLOCK = {
    ".attn.proj_o.": ".project_out.",
    ".attn.proj_": ".project_",
    ".attn_layer_norm.": ".norm_attention.",
    ".ffn_layer_norm.": ".norm_mlp.",
    ".ffn.": ".mlp.",
}


def our_names(module: str, key: str) -> list[str]:
    """The parameters of ours that hold a public one: one, or the two parts of the decoder's last layer."""
    table = SLOT_ENCODER if module == "slot_encoder" else PROGRAM_ENCODER
    prefix = max((p for p in table if key == p or key.startswith(p + ".")), key=len)
    name = table[prefix] + key[len(prefix) :]
    if prefix == "encoder.blocks":
        for theirs, ours in INSIDE_A_BLOCK.items():
            name = name.replace(theirs, ours)
    return [name.replace("alpha+features", part) for part in ("alpha", "features")] if "+" in name else [name]


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
        return slot_noise()[self.step]


def slot_noise():
    shape = (RECIPE["steps"], DIMS["batch"], DIMS["num_slots"], DIMS["slot_dim"])
    return torch.from_numpy(np.random.RandomState(2).randn(*shape))


def build() -> NeuralSlotInterpreter:
    config = ModelConfig(
        num_slots=DIMS["num_slots"],
        num_iterations=DIMS["num_iterations"],
        slot_dim=DIMS["slot_dim"],
        mlp_hidden_size=DIMS["slot_mlp_hidden"],
        embed_dim=DIMS["embed_dim"],
        num_blocks=DIMS["num_blocks"],
        d_model=DIMS["d_model"],
        num_heads=DIMS["num_heads"],
        dropout=0.0,
        decoder_hidden_dim=DIMS["decoder_hidden"],
        attend_padding=True,
    )
    model = NeuralSlotInterpreter(config, DIMS["feature_dim"], DIMS["positions"], (3, 4, 60)).double()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for module, key, value in drawn_parameters():
            names = our_names(module, key)
            pieces = value.split([1, len(value) - 1]) if len(names) == 2 else [value]
            for name, piece in zip(names, pieces, strict=True):
                parameter = parameters.pop(name)
                parameter.copy_(piece.view_as(parameter))
    assert not parameters, f"parameters that no golden weight fills: {sorted(parameters)}"
    return model


def inputs():
    shape = (DIMS["batch"], DIMS["positions"], DIMS["feature_dim"])
    features_BPF = torch.from_numpy(np.random.RandomState(1).randn(*shape))
    draw, rows = np.random.RandomState(3), (DIMS["batch"], DIMS["max_objects"])
    labels = np.concatenate([draw.randint(0, count, (*rows, 1)) for count in (3, 4, 60)], axis=-1)
    positions = draw.uniform(-3, 3, (*rows, 3))
    objects_BT = torch.arange(DIMS["max_objects"])[None] < torch.tensor(RECIPE["lengths"])[:, None]
    real = objects_BT[..., None].numpy()
    return features_BPF, torch.from_numpy(labels * real), torch.from_numpy(positions * real), objects_BT


def losses(model, step: int, batch):
    """(output, scores, loss, contrastive, reconstruction), the mean over both directions and beta 1."""
    output = model(*batch, GivenNoise(0, step, torch.arange(DIMS["batch"])))
    scores_BB = maxsim(output.slot_embeddings_BNE, output.primitive_embeddings_BTE, batch[-1])
    own_B = torch.arange(DIMS["batch"])
    logits_BB = scores_BB / RECIPE["tau"]
    contrastive = (functional.cross_entropy(logits_BB, own_B) + functional.cross_entropy(logits_BB.T, own_B)) / 2
    reconstruction = output.squared_error_B.mean()
    return output, scores_BB, contrastive + RECIPE["beta"] * reconstruction, contrastive, reconstruction


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
    results = losses(model, 0, batch)
    results[2].backward()
    for hook in hooks:
        hook.remove()
    return model, batch, results, inside


def test_forward(golden, first_step):
    _, _, (output, scores_BB, loss, contrastive, reconstruction), inside = first_step
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
        f"gradnorm/{module}/{key}": torch.cat(
            [parameters[name].grad.flatten() for name in our_names(module, key)]
        ).norm()
        for module, key, _ in drawn_parameters()
    }
    stored = {name for name in golden if name.startswith("gradnorm/")}
    assert set(norms) == stored
    # Adding one vector to all slots' queries leaves the softmax over slots as it is, so the gradient of norm_slots'
    # bias is truly zero and its stored norm is rounding: hence a floor far below every other norm.
    far = {name: abs(float(norms[name]) - golden[name]) / max(golden[name], 1e-3) for name in stored}
    assert max(far.values()) < TOLERANCE, {name: value for name, value in far.items() if value >= TOLERANCE}


def update(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Adam with linear warm-up. The stored trajectory was made without clipping."""
    for group in optimizer.param_groups:
        group["lr"] = RECIPE["lr"] * min(1.0, (step + 1) / RECIPE["lr_warmup_steps"])
    optimizer.step()


def test_first_adam_step(golden, first_step):
    trained, batch, *_ = first_step
    model = copy.deepcopy(trained)
    for copied, original in zip(model.parameters(), trained.parameters(), strict=True):
        copied.grad = original.grad  # which a copy of a parameter leaves behind
    update(torch.optim.Adam(model.parameters()), 0)
    with torch.no_grad():
        second = torch.stack(losses(model, 1, batch)[2:])
    assert distance(second, golden["trajectory_loss_contrastive_mse"][1]) < TOLERANCE


@pytest.mark.slow  # ten seconds a step on one core
def test_adam_trajectory(golden):
    model, batch = build(), inputs()
    optimizer = torch.optim.Adam(model.parameters())
    rows = []
    for step in range(RECIPE["steps"]):
        optimizer.zero_grad()
        *_, loss, contrastive, reconstruction = losses(model, step, batch)
        loss.backward()
        update(optimizer, step)
        rows.append([loss.item(), contrastive.item(), reconstruction.item()])
    far = np.abs(np.array(rows) / golden["trajectory_loss_contrastive_mse"] - 1).max(axis=1)
    assert far.max() < TOLERANCE, far
