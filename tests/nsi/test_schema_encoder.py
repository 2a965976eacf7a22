"""The schema encoder: sets stay sets, padding stays unseen, nothing turns into NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsi.errors import UserError
from nsi.noise import KeyedNoise
from nsi.schema_encoder import SchemaEncoder

COUNTS = (3, 4, 6)
T = 5


def encoder(**change) -> SchemaEncoder:
    torch.manual_seed(0)
    settings_ = {"d_model": 8, "embed_dim": 6, "num_blocks": 2, "num_heads": 2, **change}
    return SchemaEncoder(COUNTS, **settings_).double()


def schemas(lengths, seed=0):
    """labels_BT3, positions_BT3, objects_BT, with noise in the padding, and the keyed noise of step 0."""
    generator = torch.Generator().manual_seed(seed)
    B = len(lengths)
    labels_BT3 = torch.stack([torch.randint(0, n, (B, T), generator=generator) for n in COUNTS], dim=-1)
    positions_BT3 = torch.rand(B, T, 3, generator=generator, dtype=torch.float64) * 6 - 3
    objects_BT = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
    return labels_BT3, positions_BT3, objects_BT, KeyedNoise(0, 0, torch.arange(B))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@given(st.lists(st.integers(0, T), min_size=1, max_size=4), st.integers(0, 1000), st.integers(0, 3))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_order_and_padding_never_change_an_embedding(lengths, seed, num_blocks):
    m = encoder(num_blocks=num_blocks)
    labels_BT3, positions_BT3, objects_BT, noise = schemas(lengths, seed)
    embeddings_BTE, hidden_BTD = m(labels_BT3, positions_BT3, objects_BT, noise)
    assert embeddings_BTE.isfinite().all()
    assert hidden_BTD.isfinite().all()

    other_labels, other_positions, *_ = schemas(lengths, seed + 1)
    real = objects_BT[..., None]
    swapped_BTE, _ = m(labels_BT3.where(real, other_labels), positions_BT3.where(real, other_positions * 100), *_)
    close(swapped_BTE[objects_BT], embeddings_BTE[objects_BT])

    order = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    permuted_BTE, _ = m(labels_BT3[:, order], positions_BT3[:, order], objects_BT[:, order], noise)
    close(permuted_BTE[objects_BT[:, order]], embeddings_BTE[:, order][objects_BT[:, order]])


def test_padding_that_is_attended_to_is_an_object_of_the_named_ids():
    labels_BT3, positions_BT3, objects_BT, noise = schemas([3])
    padding = ~objects_BT
    named, everything = encoder(attend_padding=True, padding_labels=(2, 1, 5)), torch.ones_like(objects_BT)
    positions_BT3[padding] = 0.0
    given, _ = named(labels_BT3, positions_BT3, objects_BT, noise)
    written_BT3 = labels_BT3.clone()
    written_BT3[padding] = torch.tensor([2, 1, 5])
    close(given, encoder(attend_padding=True)(written_BT3, positions_BT3, everything, noise)[0])
    written_BT3[padding] = 0
    close(
        encoder(attend_padding=True)(labels_BT3, positions_BT3, objects_BT, noise)[0],
        encoder(attend_padding=True)(written_BT3, positions_BT3, everything, noise)[0],
    )
    with pytest.raises(UserError, match="--padding_labels"):
        encoder(attend_padding=True, padding_labels=(3, 0, 0))


def test_one_scene_alone_is_the_scene_in_its_batch():
    m = encoder()
    batch = schemas([3, 0, 5])
    whole, _ = m(*batch)
    for b in range(3):
        alone, _ = m(*(x[b : b + 1] for x in batch[:3]), batch[3])
        close(alone, whole[b : b + 1])


def test_attending_to_padding_lets_it_matter():
    m = encoder(attend_padding=True)
    labels_BT3, positions_BT3, objects_BT, noise = schemas([2])
    before, _ = m(labels_BT3, positions_BT3, objects_BT, noise)
    positions_BT3[0, 4] += 1
    after, _ = m(labels_BT3, positions_BT3, objects_BT, noise)
    assert not torch.allclose(before[objects_BT], after[objects_BT])


def test_the_other_primitives_matter_only_with_blocks():
    for num_blocks, same in ((0, True), (1, False)):
        m = encoder(num_blocks=num_blocks)
        labels_BT3, positions_BT3, objects_BT, noise = schemas([3])
        before, _ = m(labels_BT3, positions_BT3, objects_BT, noise)
        positions_BT3[0, 1] += 1
        after, _ = m(labels_BT3, positions_BT3, objects_BT, noise)
        assert torch.allclose(before[0, 0], after[0, 0]) == same


@pytest.mark.parametrize("num_blocks", [0, 2])
def test_an_empty_scene_gives_finite_gradients_and_every_parameter_has_one(num_blocks):
    m = encoder(num_blocks=num_blocks)
    batch = schemas([0, 2])
    embeddings_BTE, _ = m(*batch)
    embeddings_BTE[batch[2]].square().sum().backward()
    for name, parameter in m.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_two_position_dims_leave_the_height_unseen():
    m = encoder(position_dims=2)
    labels_BT3, positions_BT3, objects_BT, noise = schemas([4])
    before, _ = m(labels_BT3, positions_BT3, objects_BT, noise)
    positions_BT3[..., 2] += 1
    after, _ = m(labels_BT3, positions_BT3, objects_BT, noise)
    assert torch.equal(before, after)


@pytest.mark.parametrize("which", ["dropout", "head_dropout"])
def test_dropout_is_keyed_and_off_in_eval_mode(which):
    m = encoder(**{which: 0.5})
    *batch, noise = schemas([5, 5])
    first, _ = m(*batch, noise)
    assert torch.equal(first, m(*batch, noise)[0])
    assert not torch.equal(first, m(*batch, KeyedNoise(0, 1, noise.sample_ids_B))[0])
    alone, _ = m(*(x[1:] for x in batch), KeyedNoise(0, 0, noise.sample_ids_B[1:]))
    close(alone, first[1:])
    assert torch.equal(m.eval()(*batch, noise)[0], encoder()(*batch, noise)[0])


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="3 heads"):
        encoder(num_heads=3)
