"""The broadcast decoder: each slot paints all patches and an alpha mask, the masks mix the paintings.

Watters et al., "Spatial Broadcast Decoder", 2019, in the MLP form of Seitzer et al. (DINOSAUR, ICLR 2023). The
textbook form runs an MLP on slot + position for all N * P pairs, F + 1 outputs each. The same numbers come cheaper:

    first layer   W (slot + position) = W slot + W position          N + P rows in place of N * P
    last layer    sum_n alpha_n (W h_n + b) = W (sum_n alpha_n h_n) + b, because the alphas sum to 1:
                  P rows in place of N * P, and the B x N x P x F tensor is never built

Shapes: B images, N slots, P patches, D slot width, H hidden width, F features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


class BroadcastDecoder(nn.Module):
    """An MLP of `depth` hidden layers on slot + learned position, with an alpha logit and F features as output.

    `position_std` is that of the position table's first values.
    """

    def __init__(
        self, slot_dim: int, feature_dim: int, num_patches: int, hidden_dim: int, depth: int, position_std: float = 0.02
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"a decoder has at least one hidden layer, not {depth}")
        self.positions = nn.Parameter(torch.randn(num_patches, slot_dim) * position_std)
        # The first layer's weight serves two products, so this module owns it: DeepSpeed's ZeRO 3 has a parameter
        # whole only while the forward of its own module runs.
        first = nn.Linear(slot_dim, hidden_dim)
        self.first_weight, self.first_bias = first.weight, first.bias
        self.hidden = nn.ModuleList(nn.Linear(hidden_dim, hidden_dim) for _ in range(depth - 1))
        self.alpha = nn.Linear(hidden_dim, 1)
        self.features = nn.Linear(hidden_dim, feature_dim)

    def forward(self, slots_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Returns reconstruction_BPF and alphas_BNP, which sum to 1 over the slots of a patch."""
        from_slot_BNH = functional.linear(slots_BND, self.first_weight, self.first_bias)
        from_position_PH = functional.linear(self.positions, self.first_weight)
        # Slots next to the width, so that the mixing below is one batched product without a copy.
        h_BPNH = (from_slot_BNH[:, None] + from_position_PH[:, None]).relu()
        for layer in self.hidden:
            h_BPNH = layer(h_BPNH).relu()
        alphas_BPN = self.alpha(h_BPNH).squeeze(-1).softmax(dim=-1)
        mixed_BPH = (alphas_BPN[:, :, None] @ h_BPNH).squeeze(2)
        return self.features(mixed_BPH), alphas_BPN.transpose(1, 2)
