"""Features in fewer bytes: bfloat16 by torch's own rounding, 8 bits never off by more than half a step."""

from __future__ import annotations

import pytest
import torch

from nsi.tokens import pack, unpack


def features(scale: float) -> torch.Tensor:
    """features_BPF, each patch of another size."""
    generator = torch.Generator().manual_seed(3)
    sizes_BP1 = torch.rand(4, 9, 1, generator=generator) * scale
    return torch.randn(4, 9, 33, generator=generator) * sizes_BP1


def test_bfloat16_is_rounded_once() -> None:
    features_BPF = features(3.0)
    stored_BPF, scales_BP = pack(features_BPF, "bf16")
    assert scales_BP is None
    assert torch.equal(unpack(stored_BPF, None), features_BPF.bfloat16().float())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_int8_is_off_by_half_a_step_at_most(scale: float) -> None:
    features_BPF = features(scale)
    features_BPF[1, 2] = 0.0
    stored_BPF, scales_BP = pack(features_BPF, "int8")
    assert scales_BP is not None
    assert stored_BPF.dtype == torch.int8
    assert stored_BPF.abs().amax(dim=-1).flatten().tolist() == [127 if patch != 11 else 0 for patch in range(36)]
    error_BPF = (unpack(stored_BPF, scales_BP) - features_BPF).abs()
    assert (error_BPF <= scales_BP[..., None] * (0.5 + 1e-4)).all()
    assert error_BPF.max() > 0.4 * scales_BP.max()  # the bound is not an idle one
