"""The broadcast decoder: each slot paints all patches and an alpha mask, the masks mix the paintings.

Watters et al., "Spatial Broadcast Decoder", 2019, in the MLP form of Seitzer et al. (DINOSAUR, ICLR 2023). The
textbook form runs an MLP on slot + position for all N * P pairs, F + 1 outputs each. The same numbers come cheaper:

    first layer   W (slot + position) = W slot + W position          N + P rows in place of N * P
    last layer    sum_n alpha_n (W h_n + b) = W (sum_n alpha_n h_n) + b, because the alphas sum to 1:
                  P rows in place of N * P, and the B x N x P x F tensor is never built

What lies between, the hidden layers of all pairs and their mixing, is `nsi/pairs.py`.

Shapes: B images, N slots, P patches, D slot width, H hidden width, F features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from nsi.layers import Activation
from nsi.pairs import mix_pairs


class BroadcastDecoder(nn.Module):
    """An MLP of `depth` hidden layers on slot + learned position, with an alpha logit and F features as output.

    `position_std` is that of the position table's first values. `recompute`: the backward computes the hidden layers
    a second time, and nothing of B x N x P x H is kept for it; the same numbers for a third more arithmetic.
    """

    def __init__(
        self,
        slot_dim: int,
        feature_dim: int,
        num_patches: int,
        hidden_dim: int,
        depth: int,
        position_std: float = 0.02,
        activation: Activation = "relu",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"a decoder has at least one hidden layer, not {depth}")
        self.activation: Activation = activation
        self.recompute = recompute
        self.positions = nn.Parameter(torch.randn(num_patches, slot_dim) * position_std)
        # The first layer's weight serves two products, so this module owns it: DeepSpeed's ZeRO 3 has a parameter
        # whole only while the forward of its own module runs.
        first = nn.Linear(slot_dim, hidden_dim)
        self.first_weight, self.first_bias = first.weight, first.bias
        self.hidden = nn.ModuleList(Weights(hidden_dim, hidden_dim) for _ in range(depth - 1))
        self.alpha = Weights(hidden_dim, 1)
        self.features = nn.Linear(hidden_dim, feature_dim)

    def forward(self, slots_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Returns reconstruction_BPF and alphas_BNP, which sum to 1 over the slots of a patch.

        The products are of the parameters' dtype, or autocast's; alphas, their softmax and sums float32 at the least.
        """
        from_slot_BNH = functional.linear(slots_BND, self.first_weight, self.first_bias)
        from_position_PH = functional.linear(self.positions, self.first_weight)
        layers = [layer(from_slot_BNH.dtype) for layer in (*self.hidden, self.alpha)]
        mixed_BPH, alphas_BPN = mix_pairs(from_slot_BNH, from_position_PH, layers, self.activation, self.recompute)
        return self.features(mixed_BPH), alphas_BPN.transpose(1, 2)


class Weights(nn.Module):
    """A linear layer's weight and bias, named and drawn as in nn.Linear; the caller computes with them."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        layer = nn.Linear(in_dim, out_dim)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias in `dtype`: copies, because ZeRO 3 empties the parameters when this forward ends."""
        return self.weight.to(dtype, copy=True), self.bias.to(dtype, copy=True)
