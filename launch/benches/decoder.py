"""The decoder beside its textbook form, forward and backward, in seconds and in memory.

Shapes: B images, N slots, P patches, D slot width, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from launch.benches.comparison import Comparison
from launch.benches.forms import FEATURES, IMAGES, PATCHES, Form, compare_forms, device
from nsi.decoder import BroadcastDecoder
from nsi.model import ModelConfig


class TextbookDecoder(nn.Module):
    """A decoder's MLP on slot + position for all pairs of the two, F + 1 outputs each, mixed by alpha."""

    def __init__(self, decoder: BroadcastDecoder) -> None:
        super().__init__()
        self.positions = decoder.positions
        layers: list[nn.Module] = [_linear(decoder.first_weight, decoder.first_bias), nn.ReLU()]
        for hidden in decoder.hidden:
            layers += [_linear(hidden.get_parameter("weight"), hidden.get_parameter("bias")), nn.ReLU()]
        alpha, features = decoder.alpha, decoder.features
        layers.append(_linear(torch.cat([alpha.weight, features.weight]), torch.cat([alpha.bias, features.bias])))
        self.mlp = nn.Sequential(*layers)

    def forward(self, slots_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Returns reconstruction_BPF and alphas_BNP."""
        outputs_BNPF = self.mlp(slots_BND[:, :, None] + self.positions)
        alphas_BNP1 = outputs_BNPF[..., :1].softmax(dim=1)
        return (alphas_BNP1 * outputs_BNPF[..., 1:]).sum(dim=1), alphas_BNP1.squeeze(-1)


def comparisons(data: Path | None, scenes: int) -> Iterator[Comparison]:
    """Time and memory of the decoder as it comes, then with --recompute."""
    return compare_forms("decoder", "launch.benches.decoder", "the textbook form", run_of)


def run_of(form: Form) -> Callable[[], None]:
    """One forward and backward of a form: 15 slots, 784 patches, 3 hidden layers of 1024, 768 features."""
    torch.manual_seed(0)
    config = ModelConfig()
    decoder = BroadcastDecoder(
        config.slot_dim,
        FEATURES,
        PATCHES,
        config.decoder_hidden_dim,
        config.decoder_depth,
        recompute=form == "recompute",
    )
    module = (TextbookDecoder(decoder) if form == "textbook" else decoder).to(device())
    slots_BND = torch.randn(IMAGES, config.num_slots, config.slot_dim, device=device(), requires_grad=True)
    features_BPF = torch.randn(IMAGES, PATCHES, FEATURES, device=device())

    def run() -> None:
        module.zero_grad()
        slots_BND.grad = None
        reconstruction_BPF, _ = module(slots_BND)
        (reconstruction_BPF - features_BPF).square().mean().backward()

    return run


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
    return layer
