"""Slot attention: from patch features to slots.

Locatello et al., "Object-Centric Learning with Slot Attention", NeurIPS 2020, algorithm 1, with the input MLP and
the shared Gaussian start of arXiv 2403.07887.

Shapes: B images, P patches, F features, N slots, D slot width, H heads, K = D / H.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nsi.layers import xavier_linear, xavier_mlp

EPSILON = 1e-8  # keeps a slot that no patch wants from dividing by zero


class SlotAttention(nn.Module):
    """Slots compete for patches over some iterations, then each is a recurrent state's last value."""

    def __init__(
        self, feature_dim: int, slot_dim: int, mlp_hidden_size: int, num_iterations: int, num_heads: int = 1
    ) -> None:
        super().__init__()
        if slot_dim % num_heads:
            raise ValueError(f"a slot of {slot_dim} doesn't split into {num_heads} heads")
        self.num_iterations, self.num_heads = num_iterations, num_heads

        self.input_norm = nn.LayerNorm(feature_dim)
        self.input_mlp = xavier_mlp(feature_dim, feature_dim, feature_dim)

        # All slots share one Gaussian, so they are exchangeable and their number is free. std is 1 / sqrt(D) for mu
        # (Xavier's for a D x D matrix), and near 1 for the noise.
        bound = math.sqrt(3 / slot_dim)
        self.slot_mu = nn.Parameter(torch.empty(slot_dim).uniform_(-bound, bound))
        self.slot_log_sigma = nn.Parameter(torch.empty(slot_dim).uniform_(-bound, bound))

        self.norm_inputs = nn.LayerNorm(feature_dim)
        self.norm_slots = nn.LayerNorm(slot_dim)
        self.norm_mlp = nn.LayerNorm(slot_dim)
        self.project_q = xavier_linear(slot_dim, slot_dim, bias=False)
        self.project_k = xavier_linear(feature_dim, slot_dim, bias=False)
        self.project_v = xavier_linear(feature_dim, slot_dim, bias=False)
        self.gru = _gru_cell(slot_dim)
        self.mlp = xavier_mlp(slot_dim, mlp_hidden_size, slot_dim)

    def forward(self, features_BPF: Tensor, noise_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Standard normal noise decides how many slots there are and where each of them starts.

        Returns slots_BND and attention_BNP, the last iteration's, which sums to 1 over the slots of a patch.
        """
        B, N, D = noise_BND.shape
        inputs_BPF = self.norm_inputs(self.input_mlp(self.input_norm(features_BPF)))
        k_BHPK = self._split(self.project_k(inputs_BPF)) * (D // self.num_heads) ** -0.5
        v_BHPK = self._split(self.project_v(inputs_BPF))

        slots_BND = self.slot_mu + self.slot_log_sigma.exp() * noise_BND.to(self.slot_mu.dtype)
        attention_BHNP = k_BHPK.new_empty(0)
        for _ in range(self.num_iterations):
            q_BHNK = self._split(self.project_q(self.norm_slots(slots_BND)))
            logits_BHNP = q_BHNK @ k_BHPK.transpose(-1, -2)
            # The competition: a patch has one unit to give, over all heads and slots together.
            attention_BHNP = logits_BHNP.flatten(1, 2).softmax(dim=1).view_as(logits_BHNP)
            weights_BHNP = attention_BHNP + EPSILON
            weights_BHNP = weights_BHNP / weights_BHNP.sum(dim=-1, keepdim=True)
            updates_BND = (weights_BHNP @ v_BHPK).transpose(1, 2).reshape(B, N, D)
            slots_BND = self.gru(updates_BND.flatten(0, 1), slots_BND.flatten(0, 1)).view(B, N, D)
            slots_BND = slots_BND + self.mlp(self.norm_mlp(slots_BND))
        return slots_BND, attention_BHNP.sum(dim=1)

    def _split(self, x_BMD: Tensor) -> Tensor:
        """x_BMD -> x_BHMK, for any M members."""
        return x_BMD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _gru_cell(dim: int) -> nn.GRUCell:
    """A GRU cell whose three gates start with Xavier-uniform input weights, orthogonal recurrent ones, no biases."""
    cell = nn.GRUCell(dim, dim)
    for weight_ih, weight_hh in zip(cell.weight_ih.chunk(3), cell.weight_hh.chunk(3), strict=True):
        nn.init.xavier_uniform_(weight_ih)
        nn.init.orthogonal_(weight_hh)
    nn.init.zeros_(cell.bias_ih)
    nn.init.zeros_(cell.bias_hh)
    return cell
