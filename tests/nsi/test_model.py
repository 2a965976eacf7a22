"""The whole model: its shapes, its independence of the batch, and what DeepSpeed asks of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nsi.errors import UserError
from nsi.model import ModelConfig, NeuralSlotInterpreter, squared_error, undecayed
from nsi.noise import KeyedNoise

B, P, F, T = 3, 6, 10, 4
COUNTS = (3, 4, 6)
SMALL = ModelConfig(
    num_slots=4,
    num_iterations=2,
    num_slot_heads=2,
    slot_dim=8,
    mlp_hidden_size=12,
    embed_dim=5,
    num_blocks=2,
    d_model=8,
    num_heads=2,
    decoder_hidden_dim=16,
    decoder_depth=2,
)


def build(config=SMALL) -> NeuralSlotInterpreter:
    torch.manual_seed(0)
    return NeuralSlotInterpreter(config, F, P, COUNTS)


def batch(empty_row=False):
    g = torch.Generator().manual_seed(1)
    features_BPF = torch.randn(B, P, F, generator=g)
    labels_BT3 = torch.stack([torch.randint(0, n, (B, T), generator=g) for n in COUNTS], dim=-1)
    positions_BT3 = torch.rand(B, T, 3, generator=g) * 6 - 3
    objects_BT = torch.arange(T)[None] < torch.tensor([2, 4, 0 if empty_row else 1])[:, None]
    return features_BPF, labels_BT3, positions_BT3, objects_BT


def noise(rows=slice(None), step=5):
    return KeyedNoise(0, step, torch.tensor([70, 8, -1])[rows])


def test_shapes_and_masks():
    output = build()(*batch(), noise())
    shapes = {name: tuple(value.shape) for name, value in output._asdict().items()}
    assert shapes == {
        "slots_BND": (B, 4, 8),
        "slot_embeddings_BNE": (B, 4, 5),
        "primitive_embeddings_BTE": (B, T, 5),
        "alphas_BNP": (B, 4, P),
        "attention_BNP": (B, 4, P),
        "squared_error_B": (B,),
        "tau_1": (1,),
    }
    torch.testing.assert_close(output.alphas_BNP.sum(dim=1), torch.ones(B, P))


def test_squared_error_is_summed_over_features_and_averaged_over_patches():
    features_BPF = torch.randn(B, P, F)
    expected = torch.stack([((image + 1 - image) ** 2).sum() / P for image in features_BPF])
    torch.testing.assert_close(squared_error(features_BPF + 1, features_BPF), expected)


@pytest.mark.parametrize("num_blocks", [0, 2])
def test_every_parameter_has_a_dimension_and_a_gradient(num_blocks):
    options = {"learned_tau": True, "slot_start": "learned", "bilevel": True} if num_blocks else {}
    model = build(dataclasses.replace(SMALL, num_blocks=num_blocks, position_dims=2, **options))
    output = model(*batch(empty_row=True), noise())
    sum(value.square().sum() for value in output).backward()
    for name, parameter in model.named_parameters():
        assert parameter.ndim > 0, name
        assert parameter.numel() > 0, name
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert not list(model.buffers())


@pytest.mark.parametrize("training", [False, True])
def test_a_micro_batch_gives_the_rows_of_the_batch(training):
    model = build(dataclasses.replace(SMALL, schema_dropout=0.3)).train(training).double()
    rows = slice(1, 3)
    whole, part = model(*batch(), noise()), model(*(x[rows] for x in batch()), noise(rows))
    for name in set(whole._fields) - {"tau_1"}:
        value = getattr(whole, name)
        torch.testing.assert_close(getattr(part, name), value[rows], rtol=1e-11, atol=1e-12)


def test_a_learned_temperature_begins_at_tau_and_has_a_floor():
    fixed, learned = (
        NeuralSlotInterpreter(dataclasses.replace(SMALL, learned_tau=on), F, P, COUNTS, tau=0.07)
        for on in (False, True)
    )
    assert fixed(*batch(), noise()).tau_1.item() == pytest.approx(0.07)
    tau_1 = learned(*batch(), noise()).tau_1
    assert tau_1.item() == pytest.approx(0.07)
    tau_1.backward()
    assert learned.log_tau_change_1.grad.item() == pytest.approx(0.07)  # d tau / d log tau
    with torch.no_grad():
        learned.log_tau_change_1.fill_(-9)
    assert learned(*batch(), noise()).tau_1.item() == pytest.approx(0.01)
    for direction, held in ((1, True), (-1, False)):  # at the floor the gradient leads up and not down
        learned.log_tau_change_1.grad = None
        (direction * learned(*batch(), noise()).tau_1).backward()
        assert (learned.log_tau_change_1.grad.item() == 0) == held
    assert sum(p.numel() for p in learned.parameters()) == sum(p.numel() for p in fixed.parameters()) + 1


def test_weight_decay_spares_all_but_the_weights_of_linear_layers():
    model = build(dataclasses.replace(SMALL, slot_start="learned", learned_tau=True))
    names, spared = {name for name, _ in model.named_parameters()}, undecayed(model)
    assert spared < names
    assert {name.rpartition(".")[2] for name in names - spared} == {"weight", "first_weight", "weight_ih", "weight_hh"}
    assert not {name for name in names - spared if "norm" in name or "tables" in name}
    assert {"decoder.positions", "slot_attention.slot_starts", "log_tau_change_1"} < spared
    assert {name for name in spared if name.endswith("weight")} == {
        name for name in names if name.endswith("weight") and ("norm" in name or "tables" in name)
    }


def test_silu_reaches_every_hidden_layer():
    relu, silu = build(), build(dataclasses.replace(SMALL, activation="silu"))
    for one, other in zip(relu(*batch(), noise())[:6], silu(*batch(), noise())[:6], strict=True):
        assert not torch.equal(one, other)
    kinds = [type(module).__name__ for module in silu.modules()]
    assert "ReLU" not in kinds


def test_dropout_and_noise():
    model = build(dataclasses.replace(SMALL, dropout=0.5))
    first, again = model(*batch(), noise()), model(*batch(), noise())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = model(*batch(), noise(step=6))
    assert not torch.equal(first.slots_BND, other.slots_BND)
    model.eval()
    plain = model(*batch(), noise())
    assert torch.equal(plain.slots_BND, first.slots_BND)
    assert not torch.equal(plain.slot_embeddings_BNE, first.slot_embeddings_BNE)
    assert not torch.equal(plain.primitive_embeddings_BTE, first.primitive_embeddings_BTE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    output = build().to(dtype)(*batch(), noise())
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    narrow = (output.slots_BND, output.slot_embeddings_BNE, output.primitive_embeddings_BTE, output.squared_error_B)
    assert {value.dtype for value in (*narrow, output.tau_1, output.attention_BNP)} == {wide}
    exact = build()(*batch(), noise())
    torch.testing.assert_close(output.squared_error_B.float(), exact.squared_error_B, rtol=0.05, atol=0)


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        output = build()(*batch(), noise())
    sum(value.float().square().sum() for value in output).backward()
    assert output.squared_error_B.dtype == torch.float32


def test_a_parameter_is_read_only_while_its_own_module_runs():
    """What ZeRO 3 does, in little: a module's own parameters have values only during its forward."""
    model = build()
    expected = model(*batch(), noise())
    kept = {}

    def gather(module, *_):
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = kept[module, name]

    def release(module, *_):
        for name, parameter in module.named_parameters(recurse=False):
            kept[module, name] = parameter.data
            parameter.data = parameter.data.new_empty(0)

    for module in model.modules():
        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    with torch.no_grad():
        output = model(*batch(), noise())
    assert all(torch.equal(a, b) for a, b in zip(output, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_slots": 0}, "--num_slots 0: must be above 0"),
        ({"num_blocks": -1}, "--num_blocks -1: must be at least 0"),
        ({"dropout": 1.0}, "--dropout 1.0: must be below 1"),
        ({"slot_dim": 10, "num_slot_heads": 3}, "--slot_dim 10 is no multiple of --num_slot_heads 3"),
        ({"d_model": 10}, "--d_model 10 is no multiple of --num_heads 8"),
        ({"position_dims": 1}, "--position_dims 1: 2 or 3"),
        ({"slot_start": "zero"}, "--slot_start zero: noise or learned"),
        ({"activation": "gelu"}, "--activation gelu: relu or silu"),
        ({"position_std": float("nan")}, "--position_std nan: must be at least 0"),
    ],
)
def test_a_config_that_does_not_fit_is_a_message(change, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**change)


def test_defaults_are_those_of_the_public_code():
    assert dataclasses.asdict(ModelConfig()) == {
        "num_slots": 15,
        "num_iterations": 5,
        "num_slot_heads": 1,
        "slot_dim": 192,
        "mlp_hidden_size": 192,
        "embed_dim": 64,
        "num_blocks": 8,
        "d_model": 192,
        "num_heads": 8,
        "dropout": 0.1,
        "schema_dropout": 0.0,
        "decoder_hidden_dim": 1024,
        "decoder_depth": 3,
        "hidden_dim": 192,
        "attend_padding": False,
        "padding_labels": (0, 0, 0),
        "position_std": 0.02,
        "position_dims": 3,
        "slot_start": "noise",
        "bilevel": False,
        "activation": "relu",
        "learned_tau": False,
    }
