"""Discovery figures against scikit-learn, brute-force loops, named cases and invariances."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix

from nsi.metrics.discovery import (
    ari,
    contingency,
    discovery,
    fg_ari,
    iou,
    mean_best_overlap,
    mean_iou_hungarian,
    mean_iou_official,
    summarise_discovery,
)

SLOTS, OBJECTS = 5, 4
frozen = settings(derandomize=True, max_examples=60, deadline=None)
slot_maps = arrays(np.int64, (5, 6), elements=st.integers(0, SLOTS - 1))
object_maps = arrays(np.uint8, (5, 6), elements=st.integers(0, OBJECTS))


def table_of(pred, true):
    return contingency(np.array(pred), np.array(true, dtype=np.uint8), slots=SLOTS, objects=OBJECTS)


def iou_by_loops(pred, true):
    result = np.zeros((OBJECTS + 1, SLOTS))
    for t in range(OBJECTS + 1):
        for k in range(SLOTS):
            union = ((true == t) | (pred == k)).sum()
            result[t, k] = ((true == t) & (pred == k)).sum() / union if union else 0
    return result


def test_contingency_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    pred, true = rng.integers(0, 6, (20, 30)), rng.integers(0, 9, (20, 30)).astype(np.uint8)
    assert (contingency(pred, true) == contingency_matrix(true.ravel(), pred.ravel())).all()


def test_contingency_keeps_empty_rows_and_columns():
    table = contingency(np.array([[0, 2]]), np.array([[0, 1]]), slots=4, objects=3)
    assert table.shape == (4, 4)
    assert table.sum() == 2
    assert table[0, 0] == table[1, 2] == 1


@pytest.mark.parametrize(
    ("pred", "true", "words"),
    [
        ([[0, 1]], [[0]], "shape"),
        (np.zeros((0, 3), int), np.zeros((0, 3), int), "pixels"),
        ([[0.0]], [[0]], "integers"),
        ([[-1]], [[0]], "slot ids"),
        ([[7]], [[0]], "slot ids"),
        ([[0]], [[9]], "object ids"),
    ],
)
def test_bad_label_maps_are_refused(pred, true, words):
    with pytest.raises(ValueError, match=words):
        contingency(np.array(pred), np.array(true), slots=SLOTS, objects=OBJECTS)


@frozen
@given(slot_maps, object_maps)
def test_figures_agree_with_judges_and_loops(pred, true):
    table = table_of(pred, true)
    assert ari(table) == pytest.approx(adjusted_rand_score(true.ravel(), pred.ravel()), abs=1e-12)
    seen = true > 0
    if seen.any():
        assert fg_ari(table) == pytest.approx(adjusted_rand_score(true[seen], pred[seen]), abs=1e-12)
    iou_TN = iou_by_loops(pred, true)
    np.testing.assert_allclose(iou(table), iou_TN, atol=1e-15)
    there = [t for t in range(1, OBJECTS + 1) if (true == t).any()]
    if there:
        assert mean_best_overlap(table) == pytest.approx(np.mean([max(iou_TN[t]) for t in there]))
        best = max(sum(iou_TN[t, k] for t, k in zip(there, ks, strict=False)) for ks in permutations(range(SLOTS)))
        assert mean_iou_hungarian(table) == pytest.approx(best / len(there))


@frozen
@given(slot_maps, object_maps, st.integers(SLOTS, SLOTS + 3), st.integers(OBJECTS, OBJECTS + 3))
def test_official_miou_is_the_evaluators(pred, true, slots, objects):
    size = max(slots, objects + 1)  # the evaluator pads both sides with empty masks
    iou_KK = np.zeros((size, size))
    iou_KK[: OBJECTS + 1, :SLOTS] = iou_by_loops(pred, true)
    rows, columns = linear_sum_assignment(-iou_KK)
    pairs = sum(bool((true == t).any() or (pred == k).any()) for t, k in zip(rows, columns, strict=True))
    ours = mean_iou_official(contingency(pred, true, slots=slots, objects=objects))
    assert ours == pytest.approx(iou_KK[rows, columns].sum() / pairs)


@pytest.mark.parametrize(
    ("pred", "true", "expected"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], 1.0),  # the same partition
        ([0, 0, 1, 2], [0, 0, 1, 1], (1 + 0.5) / 3),  # a slot without a partner is a pair of its own
        ([0, 0, 0, 0], [0, 0, 1, 1], 0.5 / 2),  # an object without a partner too
        ([3, 3, 3, 3], [0, 0, 0, 0], 1.0),  # background alone
    ],
)
def test_official_miou_counts_pairs_with_either_mask(pred, true, expected):
    assert mean_iou_official(contingency(np.array(pred), np.array(true))) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("pred", "true", "expected"),
    [
        ([3, 3, 0, 0], [1, 1, 0, 0], 1.0),  # one object, one segment
        ([3, 3, 3, 3], [1, 1, 0, 0], 1.0),  # ... that spills into the background
        ([3, 2, 0, 0], [1, 1, 0, 0], 0.0),  # one object, two segments
        ([3, 3, 0, 0], [1, 2, 0, 0], 0.0),  # two objects, one segment
        ([3, 2, 0, 0], [1, 2, 0, 0], 1.0),  # two objects, two segments
        ([3, 0, 0, 0], [1, 0, 0, 0], 1.0),  # one pixel: nothing to get wrong
        ([3, 2, 0, 0], [0, 0, 0, 0], None),  # no foreground
    ],
)
def test_named_cases_of_fg_ari(pred, true, expected):
    assert fg_ari(table_of(pred, true)) == expected  # exactly: the counts are integers


@pytest.mark.parametrize(
    ("pred", "true", "expected"),
    [([0, 0], [0, 0], 1.0), ([0], [0], 1.0), ([0, 1], [0, 0], 0.0), ([0, 0], [0, 1], 0.0), ([0, 1], [0, 1], 1.0)],
)
def test_trivial_partitions_of_ari(pred, true, expected):
    assert ari(table_of(pred, true)) == expected == adjusted_rand_score(true, pred)


def test_ari_is_exact_on_frames_whose_products_pass_64_bits():
    true = np.zeros((240, 320), np.uint8)
    true[:, 160:] = 1
    assert ari(contingency(1 - true, true)) == 1.0
    shifted = np.roll(true, 7, axis=1)
    assert ari(contingency(shifted, true)) == pytest.approx(adjusted_rand_score(true.ravel(), shifted.ravel()))


def test_ari_without_pixels_is_an_error():
    with pytest.raises(ValueError, match="at least one pixel"):
        ari(np.zeros((2, 2), int))


def test_reuse_of_a_slot_helps_mbo_and_not_miou():
    table = table_of([3, 3, 0, 0], [1, 2, 0, 0])
    assert mean_best_overlap(table) == 0.5
    assert mean_iou_hungarian(table) == 0.25


def test_more_objects_than_slots():
    table = contingency(np.array([0, 0, 0, 0]), np.array([0, 1, 2, 3]), slots=1)
    assert mean_iou_hungarian(table) == pytest.approx(0.25 / 3)
    assert mean_iou_official(table) == pytest.approx(0.25 / 4)


@frozen
@given(slot_maps, object_maps, st.permutations(range(SLOTS)), st.permutations(range(1, OBJECTS + 1)))
def test_names_of_slots_and_objects_change_nothing(pred, true, slots, objects):
    before = discovery(table_of(pred, true))
    after = discovery(table_of(np.array(slots)[pred], np.array([0, *objects], dtype=np.uint8)[true]))
    for name in ("ari", "fg_ari", "mbo", "miou"):
        assert getattr(before, name) == pytest.approx(getattr(after, name))


@frozen
@given(slot_maps, object_maps)
def test_bounds(pred, true):
    figures = discovery(table_of(pred, true))
    assert -1 <= figures.ari <= 1
    assert 0 < figures.miou_official <= 1
    if figures.mbo is not None and figures.miou is not None:
        assert 0 < figures.miou <= figures.mbo + 1e-12
        assert figures.mbo <= 1


@frozen
@given(object_maps)
def test_a_perfect_prediction_gets_ones(true):
    figures = discovery(table_of(true, true))
    known = [figure for figure in vars(figures).values() if figure is not None]
    assert known == [1.0] * (5 if true.any() else 2)


def test_summary_leaves_out_and_counts_images_without_foreground():
    perfect = discovery(table_of([3, 2, 0, 0], [1, 2, 0, 0]))
    merged = discovery(table_of([3, 3, 0, 0], [1, 2, 0, 0]))
    empty = discovery(table_of([3, 2, 0, 0], [0, 0, 0, 0]))
    summary = summarise_discovery([perfect, merged, empty]).as_dict()
    assert (summary["images"], summary["images_left_out"]) == (3, 1)
    assert (summary["FG-ARI"], summary["mBO"], summary["mIoU"]) == (0.5, 0.75, 0.625)
    assert summary["ARI"] == pytest.approx((perfect.ari + merged.ari + empty.ari) / 3)
    assert list(summary) == ["ARI", "FG-ARI", "mBO", "mIoU", "mIoU_official", "images", "images_left_out"]
    assert summarise_discovery([empty]).fg_ari is None
    with pytest.raises(ValueError, match="no image"):
        summarise_discovery([])
