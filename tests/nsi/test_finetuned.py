"""A model with its backbone in it: which weights are trained, against what, and what becomes of other checkpoints."""

from __future__ import annotations

import pytest
import torch

from nsi.backbone import build_backbone
from nsi.finetuned import BACKBONE, FinetunedInterpreter, fitted
from nsi.model import NeuralSlotInterpreter, load_trained, undecayed
from nsi.noise import KeyedNoise
from tests.gloo.problem import (
    CONFIG,
    COUNTS,
    SEED,
    SIZE,
    TAU,
    finetuned_loss,
    make_finetuned,
    make_finetuned_adam,
    make_pictures,
)


def frozen_twin(model: FinetunedInterpreter) -> NeuralSlotInterpreter:
    """The model that stands behind a frozen backbone, with the same weights."""
    twin = NeuralSlotInterpreter(CONFIG, model.backbone.feature_dim, model.backbone.num_patches, COUNTS, TAU)
    load_trained(twin, fitted(twin, trained_of(model)))
    return twin.eval()


def trained_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_before_training_it_is_the_model_behind_the_frozen_backbone() -> None:
    model, batch = make_finetuned(), make_pictures()
    twin = frozen_twin(model)
    noise = KeyedNoise(SEED, 0, batch.sample_ids_B)
    rest = (batch.labels_BT3, batch.positions_BT3, batch.objects_BT, noise)
    expected = twin(model.target(batch.images_BCHW), *rest)
    for ours, theirs in zip(model(batch.images_BCHW, *rest), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_backbone_is_trained_and_its_target_is_not() -> None:
    model = make_finetuned().train()
    assert not any(part.training for part in [*model.backbone.modules(), *model.target.modules()])
    assert not any(parameter.requires_grad for parameter in model.target.parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adam = make_finetuned_adam(model)
    first = finetuned_loss(model, 0)
    first.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    adam.step()
    for name, tensor in model.state_dict().items():
        trained = name in trained_of(model)
        assert torch.equal(tensor, before[name]) != trained, name
    assert finetuned_loss(model, 0) < first


def test_what_is_reconstructed_are_the_targets_features() -> None:
    """Other backbone weights change the slots; other target weights the error alone."""
    model, batch = make_finetuned().eval(), make_pictures()
    noise = KeyedNoise(SEED, 0, batch.sample_ids_B)
    inputs = (batch.images_BCHW, batch.labels_BT3, batch.positions_BT3, batch.objects_BT, noise)
    before = model(*inputs)
    for part, same_slots in ((model.target, True), (model.backbone, False)):
        with torch.no_grad():
            part.get_parameter("model.blocks.0.attn.proj.weight").add_(0.1)
        after = model(*inputs)
        assert torch.equal(before.slots_BND, after.slots_BND) == same_slots
        assert not torch.equal(before.squared_error_B, after.squared_error_B)


def test_embeddings_alone_need_neither_decoder_nor_target() -> None:
    """What a step with micro-batches asks for first."""
    model, batch = make_finetuned().eval(), make_pictures()
    noise = KeyedNoise(SEED, 0, batch.sample_ids_B)
    inputs = (batch.images_BCHW, batch.labels_BT3, batch.positions_BT3, batch.objects_BT, noise)
    called = []
    for part in (model.decoder, model.target, model.backbone):
        part.register_forward_hook(lambda module, *_: called.append(module))
    short, full = model(*inputs, False), model(*inputs)
    assert called == [model.backbone, model.backbone, model.decoder, model.target]
    for name, ours, theirs in zip(short._fields, short, full, strict=True):
        assert torch.equal(ours, theirs) == (name not in ("alphas_BNP", "squared_error_B")), name


def test_recomputing_keeps_less_and_changes_nothing() -> None:
    found = []
    for recompute in (False, True):
        model, kept = make_finetuned(recompute=recompute).train(), 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            features_BPF = model.backbone(make_pictures().images_BCHW)
        (features_BPF**2).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.backbone.parameters() if p.grad is not None])
        found.append((kept, features_BPF, gradients))
    (kept, *whole), (kept_less, *again) = found
    assert kept_less < kept / 3
    assert all(map(torch.equal, whole, again))


def test_only_what_features_depend_on_is_trained() -> None:
    """A pooling, as SigLIP's, would see no gradient, and weight decay all the same."""
    model = FinetunedInterpreter(CONFIG, build_backbone("test_vit3", SIZE), SIZE, COUNTS, TAU)
    names = [name for name, _ in model.backbone.named_parameters()]
    idle = [name for name, parameter in model.backbone.named_parameters() if not parameter.requires_grad]
    assert idle == [name for name in names if name.startswith("model.attn_pool.")] != []


def test_weight_decay_spares_norms_biases_tokens_and_positions() -> None:
    model = make_finetuned()
    spared = {name.removeprefix(BACKBONE) for name in undecayed(model) if name.startswith(BACKBONE)}
    assert {"model.cls_token", "model.pos_embed", "model.norm.weight", "model.blocks.0.attn.qkv.bias"} <= spared
    assert spared.isdisjoint({"model.patch_embed.proj.weight", "model.blocks.0.attn.qkv.weight"})
    registers = FinetunedInterpreter(CONFIG, build_backbone("vit_small_patch14_reg4_dinov2", 28), 28, COUNTS, TAU)
    assert {"backbone.model.reg_token", "backbone.model.blocks.0.ls1.gamma"} <= undecayed(registers)


def test_weights_go_from_a_frozen_run_to_a_trained_one_and_back() -> None:
    source = make_finetuned()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.01)
    target = make_finetuned()
    own = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    load_trained(target, fitted(target, trained_of(frozen_twin(source))))
    for name, tensor in target.state_dict().items():
        begins = own if name.startswith((BACKBONE, "target.")) else source.state_dict()
        assert torch.equal(tensor, begins[name]), name
    load_trained(target, fitted(target, trained_of(source)))
    assert all(map(torch.equal, trained_of(target).values(), trained_of(source).values()))
    with pytest.raises(RuntimeError, match="slot_head"):
        load_trained(target, {name: t for name, t in trained_of(source).items() if not name.startswith("slot_head.")})
