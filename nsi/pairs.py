"""The decoder's hidden layers over all pairs of a patch and a slot, and their mixing: forward and backward by hand.

Autograd would keep every hidden layer of all pairs and build gradients as large beside them. Here the first hidden
layer, a sum and an activation, is computed again where it is needed; of each further one a tensor is kept, or none
(`recompute`); everything else lives for one chunk of pairs at a time, which a CPU's cache holds.

Shapes: B images, P patches, N slots, H hidden width; a chunk has I images and Q patches of each: C = I * Q patches,
R = C * N pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsi.layers import Activation

Layer = tuple[Tensor, Tensor]  # weight and bias
Chunk = tuple[slice, slice]  # of images and of patches

# Of one hidden layer of a chunk: 4 MiB in float32 for a CPU's cache; on a GPU enough rows to fill it.
MAX_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def mix_pairs(
    from_slot_BNH: Tensor,
    from_position_PH: Tensor,
    layers: Sequence[Layer],
    activation: Activation = "relu",
    recompute: bool = False,
    max_elements: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns mixed_BPH, the last hidden layer summed over the slots by alpha, and alphas_BPN, a softmax over slots.

    The first hidden layer is activation(from_slot + from_position); `layers` lead from one to the next, and the last
    of them to the alpha logit. All inputs have one dtype. Alphas, their softmax and whatever is added up over chunks
    are float32 at the least. Kept for the backward is one B x P x N x H tensor for each layer but the last, none with
    `recompute` or without gradients. A chunk has max_elements elements, or one patch. Not differentiable twice.
    """
    device = from_slot_BNH.device.type
    if max_elements is None:
        max_elements = MAX_ELEMENTS.get(device, MAX_ELEMENTS["cuda"])
    keep = torch.is_grad_enabled() and not recompute  # asked here, since inside of it autograd is always off
    flat = [tensor for layer in layers for tensor in layer]
    mixed_BPH, alphas_BPN = _MixPairs.apply(from_slot_BNH, from_position_PH, activation, keep, max_elements, *flat)
    return mixed_BPH, alphas_BPN


class _Inputs(NamedTuple):
    from_slot_BNH: Tensor
    from_position_PH: Tensor
    layers: list[Layer]  # from hidden to hidden
    alpha: Layer
    activation: Activation


class _MixPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, from_slot_BNH, from_position_PH, activation, keep, max_elements, *flat):
        given = _inputs(from_slot_BNH, from_position_PH, activation, flat)
        alpha_weight_1H, alpha_bias_1 = given.alpha
        B, N, H = from_slot_BNH.shape
        P = len(from_position_PH)
        chunks = _chunks(B, P, N * H, max_elements)
        kept_BPNHs = [from_slot_BNH.new_empty(B, P, N, H) for _ in given.layers] if keep else []
        buffers_RH = _buffers(from_slot_BNH, chunks, 2 + (0 if keep else len(given.layers)))
        mixed_BPH = from_slot_BNH.new_empty(B, P, H)
        alphas_BPN = from_slot_BNH.new_empty(B, P, N, dtype=torch.promote_types(from_slot_BNH.dtype, torch.float32))
        with torch.autocast(from_slot_BNH.device.type, enabled=False):
            for chunk in chunks:
                spare_RH, *stored_RHs = _cut(chunk, given, buffers_RH, kept_BPNHs)
                _fill(given, chunk, given.layers, stored_RHs, spare_RH)
                h_RH = _value(stored_RHs[-1], activation, spare_RH)
                logits_R = torch.addmv(alpha_bias_1, h_RH, alpha_weight_1H[0])
                alphas_CN = logits_R.view(-1, N).to(alphas_BPN.dtype).softmax(dim=-1)
                mixed_C1H = alphas_CN.to(h_RH.dtype)[:, None] @ h_RH.view(-1, N, H)
                alphas_BPN[chunk] = alphas_CN.view(alphas_BPN[chunk].shape)
                mixed_BPH[chunk] = mixed_C1H.view(mixed_BPH[chunk].shape)
        ctx.save_for_backward(from_slot_BNH, from_position_PH, alphas_BPN, *flat, *kept_BPNHs)
        ctx.activation, ctx.chunks, ctx.flat = activation, chunks, len(flat)
        return mixed_BPH, alphas_BPN

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_mixed_BPH, grad_alphas_BPN = grads
        from_slot_BNH, from_position_PH, alphas_BPN, *others = ctx.saved_tensors
        flat, kept_BPNHs = others[: ctx.flat], others[ctx.flat :]
        given = _inputs(from_slot_BNH, from_position_PH, ctx.activation, flat)
        activation, alpha_weight_H = given.activation, given.alpha[0][0]
        N, H = from_slot_BNH.shape[1:]
        recompute = given.layers if not kept_BPNHs else []
        buffers_RH = _buffers(from_slot_BNH, ctx.chunks, 4 + len(recompute))
        totals = [torch.zeros_like(x, dtype=alphas_BPN.dtype) for x in (from_slot_BNH, from_position_PH, *flat)]
        grad_from_slot_BNH, grad_from_position_PH, *grad_flat = totals
        *grad_layers, (grad_alpha_weight_1H, grad_alpha_bias_1) = _paired(grad_flat)
        with torch.autocast(from_slot_BNH.device.type, enabled=False):
            for chunk in ctx.chunks:
                grad_RH, other_RH, spare_RH, *stored_RHs = _cut(chunk, given, buffers_RH, kept_BPNHs)
                _fill(given, chunk, recompute, stored_RHs, spare_RH)
                h_RH = _value(stored_RHs[-1], activation, spare_RH)
                alphas_CN, grad_mixed_CH = alphas_BPN[chunk].view(-1, N), grad_mixed_BPH[chunk].reshape(-1, H)

                # Mixing and softmax: a hidden row has its gradient from the mixed one and from its own logit.
                grad_alphas_CN = (h_RH.view(-1, N, H) @ grad_mixed_CH[:, :, None]).view(-1, N)
                grad_alphas_CN = grad_alphas_CN.to(alphas_CN.dtype) + grad_alphas_BPN[chunk].reshape(-1, N)
                centred_CN = grad_alphas_CN - (alphas_CN * grad_alphas_CN).sum(dim=-1, keepdim=True)
                grad_logits_CN = alphas_CN * centred_CN
                grad_alpha_bias_1 += grad_logits_CN.sum()
                weights_CN2 = torch.stack([alphas_CN, grad_logits_CN], dim=-1).to(h_RH.dtype)
                _add_product(grad_alpha_weight_1H, weights_CN2[..., 1].reshape(1, -1), h_RH)
                rows_C2H = torch.stack([grad_mixed_CH, alpha_weight_H.expand_as(grad_mixed_CH)], dim=1)
                torch.bmm(weights_CN2, rows_C2H, out=grad_RH.view(-1, N, H))

                _through_activation_(grad_RH, stored_RHs[-1], activation)
                for index in reversed(range(len(given.layers))):
                    grad_weight_HH, grad_bias_H = grad_layers[index]
                    below_RH = stored_RHs[index]
                    _add_product(grad_weight_HH, grad_RH.T, _value(below_RH, activation, spare_RH))
                    grad_bias_H += grad_RH.sum(dim=0, dtype=grad_bias_H.dtype)
                    torch.mm(grad_RH, given.layers[index][0], out=other_RH)
                    grad_RH, other_RH = other_RH, grad_RH
                    _through_activation_(grad_RH, below_RH, activation)

                grad_IQNH = grad_RH.view(*alphas_BPN[chunk].shape, H)
                images, patches = chunk
                grad_from_slot_BNH[images] += grad_IQNH.sum(dim=1, dtype=alphas_BPN.dtype)
                grad_from_position_PH[patches] += grad_IQNH.sum(dim=(0, 2), dtype=alphas_BPN.dtype)
        first, second, *rest = (total.to(from_slot_BNH.dtype) for total in totals)
        return first, second, None, None, None, *rest


def _inputs(from_slot_BNH: Tensor, from_position_PH: Tensor, activation: Activation, flat: Sequence[Tensor]) -> _Inputs:
    *layers, alpha = _paired(flat)
    return _Inputs(from_slot_BNH, from_position_PH, layers, alpha, activation)


def _paired(flat: Sequence[Tensor]) -> list[Layer]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _chunks(images: int, patches: int, elements: int, max_elements: int) -> list[Chunk]:
    """Some patches of one image, or all patches of some images; `elements` belong to one patch."""
    some = min(patches, max(1, max_elements // elements))
    several = max(1, max_elements // (elements * patches)) if some == patches else 1
    return [
        (slice(image, min(image + several, images)), slice(patch, min(patch + some, patches)))
        for image in range(0, images, several)
        for patch in range(0, patches, some)
    ]


def _buffers(from_slot_BNH: Tensor, chunks: Sequence[Chunk], count: int) -> list[Tensor]:
    """So many tensors, each with room for a hidden layer of any of the chunks."""
    _, N, H = from_slot_BNH.shape
    return [from_slot_BNH.new_empty(max((_pairs(chunk, N) for chunk in chunks), default=0), H) for _ in range(count)]


def _pairs(chunk: Chunk, slots: int) -> int:
    images, patches = chunk
    return (images.stop - images.start) * (patches.stop - patches.start) * slots


def _cut(chunk: Chunk, given: _Inputs, buffers_RH: Sequence[Tensor], kept_BPNHs: Sequence[Tensor]) -> list[Tensor]:
    """The buffers cut to the chunk's pairs, then what is kept of them."""
    N, H = given.from_slot_BNH.shape[1:]
    rows = _pairs(chunk, N)
    return [*(buffer[:rows] for buffer in buffers_RH), *(kept[chunk].view(rows, H) for kept in kept_BPNHs)]


def _fill(
    given: _Inputs, chunk: Chunk, layers: Iterable[Layer], stored_RHs: Sequence[Tensor], spare_RH: Tensor
) -> None:
    """Computes the first hidden layer and those that `layers` lead to: their values for ReLU, whose derivative they
    tell; what their activation is given for SiLU."""
    images, patches = chunk
    slot_I1NH = given.from_slot_BNH[images, None]
    position_Q1H = given.from_position_PH[patches, None]
    first_IQNH = stored_RHs[0].view(len(slot_I1NH), len(position_Q1H), *slot_I1NH.shape[2:])
    torch.add(slot_I1NH, position_Q1H, out=first_IQNH)
    if given.activation == "relu":
        first_IQNH.relu_()
    for (weight_HH, bias_H), below_RH, above_RH in zip(layers, stored_RHs, stored_RHs[1:], strict=False):
        torch.addmm(bias_H, _value(below_RH, given.activation, spare_RH), weight_HH.T, out=above_RH)
        if given.activation == "relu":
            above_RH.relu_()


def _value(stored_RH: Tensor, activation: Activation, spare_RH: Tensor) -> Tensor:
    """A hidden layer from what is stored of it."""
    return stored_RH if activation == "relu" else torch.ops.aten.silu.out(stored_RH, out=spare_RH)


def _through_activation_(grad_RH: Tensor, stored_RH: Tensor, activation: Activation) -> None:
    """The gradient of a hidden layer becomes that of what its activation was given."""
    if activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(grad_RH, stored_RH, 0, grad_input=grad_RH)
    else:
        torch.ops.aten.silu_backward.grad_input(grad_RH, stored_RH, grad_input=grad_RH)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may have a wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
