"""Slot attention: from patch features to slots.

Locatello et al., "Object-Centric Learning with Slot Attention", NeurIPS 2020, algorithm 1, with the input MLP and
the shared Gaussian start of arXiv 2403.07887. Two options of later work: slots that start where they have learned to
(Jia, Liu and Huang, "Improving Object-centric Learning with Query Optimization", ICLR 2023), and a gradient through the
last iteration alone (Chang, Griffiths and Levine, "Object Representations as Fixed Points", NeurIPS 2022).

The patches' projections, which are wide, run in the training precision; the slots' competition and their state run in
float32 at least.

Shapes: B images, P patches, F features, N slots, D slot width, H heads, K = D / H.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from nsi.layers import (
    Activation,
    GRUCell,
    LayerNorm,
    Linear,
    activation_layer,
    in_full_precision,
    wide,
    xavier,
    xavier_mlp,
)

EPSILON = 1e-8  # keeps a slot that no patch wants from dividing by zero

SlotStart = Literal["noise", "learned"]


class SlotAttention(nn.Module):
    """Slots compete for patches over some iterations, then each is a recurrent state's last value.

    `start` "noise": all slots are drawn from one learned Gaussian, so they are exchangeable and their number is free.
    "learned": each of `num_slots` slots has a learned start of its own, and nothing is drawn.

    `bilevel`: iterations before the last have no gradient, as if they had found a fixed point; the start gets its
    gradient straight through them (Jia et al., equation 8).
    """

    def __init__(
        self,
        feature_dim: int,
        slot_dim: int,
        mlp_hidden_size: int,
        num_iterations: int,
        num_heads: int = 1,
        num_slots: int = 0,
        start: SlotStart = "noise",
        bilevel: bool = False,
        activation: Activation = "relu",
    ) -> None:
        """`num_slots` is that of "learned" starts alone."""
        super().__init__()
        if slot_dim % num_heads:
            raise ValueError(f"a slot of {slot_dim} doesn't split into {num_heads} heads")
        self.num_iterations, self.num_heads, self.start, self.bilevel = num_iterations, num_heads, start, bilevel

        self.input_norm = LayerNorm(feature_dim)
        self.input_mlp = nn.Sequential(
            xavier(nn.Linear(feature_dim, feature_dim), then="activation"),
            activation_layer(activation),
            xavier(nn.Linear(feature_dim, feature_dim)),
        )

        # std is 1 / sqrt(D) for mu (Xavier's for a D x D matrix), and near 1 for the noise.
        bound = math.sqrt(3 / slot_dim)
        if start == "noise":
            self.slot_mu = nn.Parameter(torch.empty(slot_dim).uniform_(-bound, bound))
            self.slot_log_sigma = nn.Parameter(torch.empty(slot_dim).uniform_(-bound, bound))
        else:
            self.slot_starts = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_slots, slot_dim)))

        self.norm_inputs = LayerNorm(feature_dim)
        self.norm_slots = LayerNorm(slot_dim)
        self.norm_mlp = LayerNorm(slot_dim)
        self.project_q = xavier(Linear(slot_dim, slot_dim, bias=False))
        self.project_k = xavier(nn.Linear(feature_dim, slot_dim, bias=False))
        self.project_v = xavier(nn.Linear(feature_dim, slot_dim, bias=False))
        self.gru = _gru_cell(slot_dim)
        self.mlp = xavier_mlp(slot_dim, mlp_hidden_size, slot_dim, activation)

    def forward(self, features_BPF: Tensor, noise_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Standard normal noise decides how many slots there are and, unless they have learned it, where they start.

        Returns slots_BND and attention_BNP, the last iteration's, which sums to 1 over the slots of a patch. Both are
        float32 at least.
        """
        dtype = features_BPF.dtype
        inputs_BPF = self.norm_inputs(self.input_mlp(self.input_norm(features_BPF).to(dtype))).to(dtype)
        k_BHPK = wide(self._split(self.project_k(inputs_BPF)))
        v_BHPK = wide(self._split(self.project_v(inputs_BPF)))
        k_BHPK = k_BHPK * k_BHPK.shape[-1] ** -0.5

        start_BND = slots_BND = self._start(noise_BND.to(k_BHPK.dtype))
        with in_full_precision(k_BHPK):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.bilevel):
                for _ in range(self.num_iterations - 1):
                    slots_BND, _ = self._iterate(slots_BND, k_BHPK, v_BHPK)
            if self.bilevel:
                slots_BND = slots_BND.detach() + start_BND - start_BND.detach()
            slots_BND, attention_BHNP = self._iterate(slots_BND, k_BHPK, v_BHPK)
        return slots_BND, attention_BHNP.sum(dim=1)

    def _start(self, noise_BND: Tensor) -> Tensor:
        if self.start == "learned":
            return self.slot_starts.to(noise_BND.dtype).expand_as(noise_BND)
        mu_D, log_sigma_D = self.slot_mu.to(noise_BND.dtype), self.slot_log_sigma.to(noise_BND.dtype)
        return mu_D + log_sigma_D.exp() * noise_BND

    def _iterate(self, slots_BND: Tensor, k_BHPK: Tensor, v_BHPK: Tensor) -> tuple[Tensor, Tensor]:
        """One round of competition: the slots after it, and attention_BHNP."""
        B, N, D = slots_BND.shape
        q_BHNK = self._split(self.project_q(self.norm_slots(slots_BND)))
        logits_BHNP = q_BHNK @ k_BHPK.transpose(-1, -2)
        # The competition: a patch has one unit to give, over all heads and slots together.
        attention_BHNP = logits_BHNP.flatten(1, 2).softmax(dim=1).view_as(logits_BHNP)
        weights_BHNP = attention_BHNP + EPSILON
        weights_BHNP = weights_BHNP / weights_BHNP.sum(dim=-1, keepdim=True)
        updates_BND = (weights_BHNP @ v_BHPK).transpose(1, 2).reshape(B, N, D)
        slots_BND = self.gru(updates_BND.flatten(0, 1), slots_BND.flatten(0, 1)).view(B, N, D)
        return slots_BND + self.mlp(self.norm_mlp(slots_BND)), attention_BHNP

    def _split(self, x_BMD: Tensor) -> Tensor:
        """x_BMD -> x_BHMK, for any M members."""
        return x_BMD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _gru_cell(dim: int) -> GRUCell:
    """A GRU cell whose three gates start with Xavier-uniform input weights, orthogonal recurrent ones, no biases."""
    cell = GRUCell(dim, dim)
    for weight_ih, weight_hh in zip(cell.weight_ih.chunk(3), cell.weight_hh.chunk(3), strict=True):
        nn.init.xavier_uniform_(weight_ih)
        nn.init.orthogonal_(weight_hh)
    nn.init.zeros_(cell.bias_ih)
    nn.init.zeros_(cell.bias_hh)
    return cell
