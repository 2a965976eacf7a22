"""The decoder's hidden layers by hand: gradients against finite differences, chunks that change nothing, memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsi.pairs import mix_pairs

B, N, P, H = 3, 4, 10, 8
PATCH = N * H  # elements of one patch


def inputs(layers: int, images: int = B, slots: int = N, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """from_slot, from_position, and weight and bias of each layer, flat."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(images, slots, H), (P, H), *((H, H), (H,)) * layers, (1, H), (1,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def mix(flat: list[torch.Tensor], **options) -> tuple[torch.Tensor, torch.Tensor]:
    slots, positions, *layers = flat
    return mix_pairs(slots, positions, list(zip(layers[::2], layers[1::2], strict=True)), **options)


def gradients(flat: list[torch.Tensor], **options) -> list[torch.Tensor]:
    """The two results and the gradients of all inputs."""
    mixed, alphas = mix(flat, **options)
    loss = mixed.double().sin().sum() + alphas.double().square().sum()
    return [mixed, alphas, *torch.autograd.grad(loss, flat)]


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_gradients_are_those_of_finite_differences(activation: str, recompute: bool, layers: int) -> None:
    def function(*flat):
        return mix(list(flat), activation=activation, recompute=recompute, max_elements=3 * PATCH)

    assert torch.autograd.gradcheck(function, inputs(layers, images=2))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_chunks_and_recomputing_change_nothing(activation: str) -> None:
    flat = inputs(2)
    whole = gradients(flat, activation=activation, max_elements=B * P * PATCH)
    sizes = [1, 3 * PATCH, P * PATCH, 2 * P * PATCH]  # a patch, three, an image, two
    for size, recompute in itertools.product(sizes, [False, True]):
        found = gradients(flat, activation=activation, recompute=recompute, max_elements=size)
        for ours, theirs in zip(found, whole, strict=True):  # the gradient of alpha's bias is zero
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recompute", [False, True])
def test_twice_the_same_bits(recompute: bool) -> None:
    flat = inputs(2, dtype=torch.float32)
    first, second = (gradients(flat, recompute=recompute, max_elements=3 * PATCH) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("images", "slots"), [(1, 1), (0, N), (500, N)])
def test_one_slot_no_image_many_images(images: int, slots: int) -> None:
    flat = inputs(1, images, slots)
    mixed, alphas, *grads = gradients(flat, max_elements=7 * PATCH)
    assert mixed.shape == (images, P, H)
    torch.testing.assert_close(alphas.sum(dim=-1), torch.ones(images, P, dtype=torch.float64))
    assert all(grad.isfinite().all() for grad in grads)
    if images == 0:
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_up_in_float32(dtype: torch.dtype) -> None:
    """Over 500 images: a sum kept in bfloat16 would stop growing long before."""
    flat = [(tensor.detach() / 4).to(dtype).requires_grad_() for tensor in inputs(2, images=500)]
    truth = gradients([tensor.detach().double().requires_grad_() for tensor in flat])
    mixed, alphas, *grads = gradients(flat, max_elements=5 * PATCH)
    assert alphas.dtype == torch.float32
    assert (alphas.sum(dim=-1) - 1).abs().max() < 1e-6
    *grads, bias = grads
    for ours, theirs in zip([mixed, alphas, *grads], truth[:-1], strict=True):
        assert (ours.double() - theirs).norm() <= 0.02 * theirs.norm()
    assert bias.abs() < 1e-3  # truly zero: a softmax forgets what all its logits share


class Largest(TorchDispatchMode):
    """Notes the most elements of a tensor that any operation makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in held:
                self.numel = max(self.numel, x.numel())
        return result


def test_what_is_built_and_what_is_kept() -> None:
    images = 20
    flat = inputs(2, images)
    chunk, whole = 5 * PATCH, images * P * PATCH
    assert chunk < images * P * H < whole  # so that the results are told from chunks and from hidden layers

    def measured(recompute: bool) -> tuple[int, int, int]:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            with Largest() as forward:
                mixed, alphas = mix(flat, recompute=recompute, max_elements=chunk)
            with Largest() as backward:
                torch.autograd.grad(mixed.sum() + alphas.sum(), flat)
        return forward.numel, backward.numel, sum(kept)

    small = images * P * H  # mixed_BPH and its gradient
    forward, backward, kept = measured(recompute=False)
    assert forward == whole
    assert backward <= small
    assert 2 * whole <= kept < 2 * whole + 2 * small
    forward, backward, kept = measured(recompute=True)
    assert max(forward, backward) == small
    assert kept < 2 * small
    with torch.no_grad(), Largest() as forward:
        mix(flat, max_elements=chunk)
    assert forward.numel == small
