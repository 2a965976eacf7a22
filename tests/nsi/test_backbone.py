"""The frozen backbones: what they compute, that they stay frozen, and what they say to what they cannot do."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from nsi.backbone import Passing, PatchStatistics, TimmBackbone, build_backbone, parameters_hash
from nsi.errors import UsageError, UserError

VIT = "test_vit"  # timm's own tiny one: patches of 16, width 64, one class token


def images(size=32, batch=2):
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_patch_statistics_are_dct_coefficients():
    backbone = PatchStatistics(24, patch_size=8)
    assert (backbone.feature_dim, backbone.grid, backbone.num_patches) == (43, (3, 3), 9)
    pictures = images(24)
    features_BPF = backbone(pictures)
    assert features_BPF.shape == (2, 9, 43)
    assert features_BPF.dtype == torch.float32
    patch = pictures[1, :, 8:16, 16:24].double() / 255  # the second row's last
    for channel in range(3):
        for u in range(3):
            for v in range(3):
                total = 0.0
                for i in range(8):
                    for j in range(8):
                        wave = math.cos(math.pi * u * (i + 0.5) / 8) * math.cos(math.pi * v * (j + 0.5) / 8)
                        total += wave * (2 if u and v else 2**0.5 if u or v else 1) * float(patch[channel, i, j])
                gain = 2 * (1 + u + v) if u or v else 12
                expected = gain * (total / 64 - (0.5 if u == v == 0 else 0))
                assert features_BPF[1, 5, channel * 9 + u * 3 + v] == pytest.approx(expected, abs=1e-5)
    y, x = 1.5 / 3, 2.5 / 3
    angles = [[math.pi * 2**k * centre for k in (-1, 0, 1, 2)] for centre in (y, x)]
    position = [0.7 * f(angle) for row in angles for f in (math.sin, math.cos) for angle in row]
    assert features_BPF[1, 5, 27:].tolist() == pytest.approx(position, abs=1e-6)


def test_patch_statistics_tell_positions_apart_and_refuse_other_sizes():
    backbone = build_backbone("dct", 64)
    features_PF = backbone(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))[0]
    assert torch.cdist(features_PF, features_PF).fill_diagonal_(9).min() > 0.1
    with pytest.raises(ValueError, match="images of"):
        backbone(images(32))
    for size, patch in ((60, 8), (4, 8), (8, 2)):
        with pytest.raises(UserError, match="patches of"):
            PatchStatistics(size, patch)
    with pytest.raises(UserError, match="no weights"):
        build_backbone("dct", 64, {})


@pytest.mark.parametrize(
    ("name", "size", "prefix", "width", "mean", "std"),
    [
        (VIT, 32, 1, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("vit_small_patch14_reg4_dinov2", 28, 5, 384, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # four registers
    ],
)
def test_timm_backbone_is_the_model_without_its_prefix(name, size, prefix, width, mean, std):
    backbone = build_backbone(name, size)
    assert (backbone.feature_dim, backbone.grid, backbone.num_patches) == (width, (2, 2), 4)
    pictures = images(size)
    features_BPF = backbone(pictures)
    scaled = (pictures / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(features_BPF, backbone.model.forward_features(scaled)[:, prefix:])
    assert features_BPF.dtype == torch.float32
    assert backbone.bfloat16()(pictures).dtype == torch.float32


def test_the_tags_own_normalisation_is_used():
    assert build_backbone("vit_tiny_patch16_224.augreg_in21k", 32).mean_C11.flatten().tolist() == [0.5] * 3
    imagenet = build_backbone("deit_tiny_patch16_224.fb_in1k", 32).mean_C11.flatten().tolist()
    assert imagenet == pytest.approx([0.485, 0.456, 0.406])


def test_without_normalisation_the_model_sees_colours_as_they_are():
    backbone = build_backbone(VIT, 32, normalize=False)
    expected = backbone.model.forward_features(images() / 255)[:, 1:]
    assert torch.equal(backbone(images()), expected)
    normalised = build_backbone(VIT, 32, backbone.model.state_dict())
    assert not torch.allclose(normalised(images()), expected)
    assert parameters_hash(normalised) != parameters_hash(backbone)  # other features, so another backbone


def test_timm_backbone_stays_frozen():
    backbone = TimmBackbone(VIT, 32)
    parent = torch.nn.Sequential(backbone).train()
    assert parent.training
    assert not any(m.training for m in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not backbone(images()).requires_grad


def test_a_copy_that_is_trained_has_the_same_features_and_gradients():
    backbone = TimmBackbone(VIT, 32)
    copied = copy.deepcopy(backbone).requires_grad_(True)
    features_BPF = copied(images())
    assert torch.equal(features_BPF, backbone(images()))
    features_BPF.sum().backward()
    assert all(parameter.grad is not None for parameter in copied.parameters())
    with torch.no_grad():
        copied.model.cls_token.add_(1)  # its own, not the original's
    assert not torch.equal(copied(images()), backbone(images()))


def test_the_vit_is_called_as_a_module():
    """ZeRO 3 gathers the parameters of modules that are: the class token and the positions are the ViT's own."""
    backbone, called = TimmBackbone(VIT, 32), []
    backbone.model.register_forward_pre_hook(lambda module, _: called.append(module))
    expected = backbone.model.forward_features(images() / 127.5 - 1)[:, 1:]
    torch.testing.assert_close(backbone(images()), expected)
    assert called == [backbone.model]


def test_images_pass_where_the_model_holds_its_backbone():
    passing = Passing((2, 3), 64)
    assert (passing.num_patches, passing.feature_dim) == (6, 64)
    pictures = images()
    assert passing(pictures) is pictures


def test_recomputing_where_timm_cannot():
    with pytest.raises(UserError, match="--recompute: timm's convit_tiny keeps its hidden layers"):
        TimmBackbone("convit_tiny", 32).recompute()


def test_weights_of_another_grid_and_with_a_classifier():
    import timm

    source = timm.create_model(VIT, img_size=64)  # 4 x 4 patches, and a head
    backbone = TimmBackbone(VIT, 32, source.state_dict())
    state = backbone.model.state_dict()
    assert torch.equal(state["norm.weight"], source.state_dict()["norm.weight"])
    assert torch.equal(state["pos_embed"][:, 0], source.pos_embed[:, 0])  # the class token's
    assert state["pos_embed"].shape == (1, 5, 64)

    same = TimmBackbone(VIT, 64, source.state_dict())
    assert torch.equal(same.model.pos_embed, source.pos_embed)
    torch.testing.assert_close(same(images(64)), source.eval().forward_features(images(64) / 127.5 - 1)[:, 1:])


def test_weights_that_do_not_fit_are_named():
    weights = TimmBackbone(VIT, 32).model.state_dict()
    cases = {
        "lack 'norm.bias'": {k: v for k, v in weights.items() if k != "norm.bias"},
        "hold 'nonsense'": {**weights, "nonsense": torch.zeros(1)},
        r"'norm.weight' has the shape \(3,\), the model wants \(64,\)": {**weights, "norm.weight": torch.zeros(3)},
        r"'pos_embed' has the shape \(1, 7, 64\)": {**weights, "pos_embed": torch.zeros(1, 7, 64)},
    }
    for message, state in cases.items():
        with pytest.raises(UserError, match=message):
            TimmBackbone(VIT, 32, state)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vit_of_nobody", 32, "knows no model named 'vit_of_nobody'"),
        ("test_vit.nobody", 32, "can't build"),
        ("resnet18", 32, "patch tokens"),
        ("test_efficientnet", 32, "patch tokens"),
        ("swin_tiny_patch4_window7_224", 32, "patch tokens"),
        (VIT, 40, "don't split into test_vit's patches of 16"),
    ],
)
def test_models_that_will_not_do(name, size, message):
    with pytest.raises(UserError, match=message):
        TimmBackbone(name, size)


@pytest.mark.parametrize("patch_size", [0, -8])
def test_patches_of_no_size(patch_size):
    with pytest.raises(UsageError, match=f"--patch_size {patch_size}: must be above 0"):
        build_backbone("dct", 32, patch_size=patch_size)


def test_parameters_hash():
    torch.manual_seed(0)
    one, other = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)  # one buffer has no dimension
    assert parameters_hash(one) == parameters_hash(other)
    assert parameters_hash(PatchStatistics(16)) != parameters_hash(PatchStatistics(24))
    with torch.no_grad():
        other.running_mean[1] += 1e-6
    assert parameters_hash(one) != parameters_hash(other)
    assert parameters_hash(one.bfloat16()) != parameters_hash(torch.nn.BatchNorm1d(3))
