"""Grounding figures against loops over pixels and assignments, named cases and invariances."""

import json
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nsi.metrics.discovery import contingency
from nsi.metrics.grounding import FIGURES, grounding, summarise_grounding

T, SLOTS = 3, 4
frozen = settings(derandomize=True, max_examples=60, deadline=None)
slot_maps = arrays(np.int64, (4, 6), elements=st.integers(0, SLOTS - 1))
object_maps = arrays(np.uint8, (4, 6), elements=st.integers(0, T))
peak_spots = arrays(np.int64, (SLOTS,), elements=st.integers(0, 23))
# Powers of two: no two sums are equal, so there is one best assignment.
orders = st.permutations(range(T * SLOTS)).map(lambda order: np.exp2(np.array(order)).reshape(T, SLOTS))


def ground(similarity, pred, true, spots, sizes=(0, 1, 0)):
    similarity, pred, true = np.array(similarity, float), np.array(pred), np.array(true)
    table = contingency(pred, true, slots=similarity.shape[1], objects=similarity.shape[0])
    return grounding(similarity, table, true.ravel()[np.array(spots)], np.array(sizes))


def hits_by_loops(pred, true, spots, t, slot, slots):
    """The three hits of one slot for one object, straight from the words of the definitions."""
    mask = true == t + 1

    def overlap(k):
        union = (mask | (pred == k)).sum()
        return (mask & (pred == k)).sum() / union if union else 0

    best = max(overlap(k) for k in range(slots))
    return [overlap(slot) == best, overlap(slot) >= 0.5, bool(mask.ravel()[spots[slot]])]


@frozen
@given(orders, slot_maps, object_maps, peak_spots)
def test_all_choices_agree_with_loops(similarity, pred, true, spots):
    result = ground(similarity, pred, true, spots)
    visible = [t for t in range(T) if (true == t + 1).any()]
    one_to_one = max(permutations(range(SLOTS), T), key=lambda ks: sum(similarity[t, k] for t, k in enumerate(ks)))
    assert result.hidden == T - len(visible)
    assert len(result.argmax_VF) == len(visible)
    for row, t in enumerate(visible):
        every = [hits_by_loops(pred, true, spots, t, k, SLOTS) for k in range(SLOTS)]
        assert result.argmax_VF[row].tolist() == every[int(np.argmax(similarity[t]))]
        assert result.oracle_VF[row].tolist() == [any(hit[f] for hit in every) for f in range(3)]
        np.testing.assert_allclose(result.floor_VF[row], np.mean(every, axis=0))
    wanted = [hits_by_loops(pred, true, spots, t, one_to_one[t], SLOTS) for t in visible]
    assert result.hungarian_VF.tolist() == wanted


@frozen
@given(orders, slot_maps, object_maps, peak_spots, st.permutations(range(SLOTS)), st.permutations(range(T)))
def test_names_of_slots_and_primitives_change_nothing(similarity, pred, true, spots, slots, objects):
    slots, objects = np.array(slots), np.array(objects)
    places, names = np.argsort(slots), np.argsort(objects)
    before = summarise_grounding([ground(similarity, pred, true, spots, [0, 1, 2])])
    relabelled = np.concatenate(([0], objects + 1))[true]  # object t becomes object objects[t]
    after = summarise_grounding(
        [ground(similarity[names][:, places], slots[pred], relabelled, spots[places], np.arange(3)[names])]
    )
    flat_before, flat_after = flatten(before), flatten(after)
    assert flat_before.keys() == flat_after.keys()
    for name, figure in flat_before.items():
        assert flat_after[name] == pytest.approx(figure)


@frozen
@given(orders, slot_maps, object_maps, peak_spots)
def test_no_choice_beats_the_oracle(similarity, pred, true, spots):
    result = ground(similarity, pred, true, spots)
    for chosen in (result.argmax_VF, result.hungarian_VF, result.floor_VF):
        assert (chosen <= result.oracle_VF).all()
    assert (result.oracle_VF[:, 0] == 1).all()


def flatten(figures, prefix=""):
    flat = {}
    for name, value in figures.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


PERFECT = [[0, 9, 0], [0, 0, 9]]  # primitive 0 picks slot 1, primitive 1 slot 2


def test_a_perfect_model_and_its_floor():
    result = ground(PERFECT, [0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [0, 2, 4], [0, 1])
    assert result.argmax_VF.tolist() == result.hungarian_VF.tolist() == [[1, 1, 1]] * 2
    np.testing.assert_allclose(result.floor_VF, 1 / 3)


def test_merged_objects_share_a_slot():
    # Slot 1 covers both objects: each has an IoU of a half with it, and its peak lies in the first.
    pred, true, spots = [0, 0, 1, 1], [0, 0, 1, 2], [0, 2]
    greedy = ground([[0, 9], [0, 8]], pred, true, spots, [0, 1])
    assert greedy.argmax_VF.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert greedy.hungarian_VF.tolist() == [[1, 1, 1], [0, 0, 0]]  # the second object must take slot 0
    assert greedy.oracle_VF.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_ties_of_similarity_go_to_the_lowest_slot():
    result = ground([[5, 5]], [0, 1, 1], [1, 0, 0], [0, 1], [0])
    assert result.argmax_VF.tolist() == [[1, 1, 1]]


def test_slots_that_tie_for_the_best_overlap_are_both_right():
    result = ground([[0, 5]], [0, 1], [1, 1], [0, 1], [0])
    assert result.argmax_VF.tolist() == [[1, 1, 1]]
    assert result.floor_VF.tolist() == [[1, 1, 1]]


def test_a_hidden_object_takes_part_in_the_assignment_and_in_no_figure():
    # Primitive 0 is out of view and takes slot 1 from primitive 1, as it may in the model.
    result = ground([[0, 9], [0, 8]], [0, 1], [0, 2], [0, 1], [0, 1])
    assert (result.hidden, result.objects, result.sizes_V.tolist()) == (1, 2, [1])
    assert result.argmax_VF.tolist() == [[1, 1, 1]]
    assert result.hungarian_VF.tolist() == [[0, 0, 0]]


def test_more_primitives_than_slots():
    result = ground([[9], [8]], [0, 0], [1, 2], [0], [0, 0])
    assert result.argmax_VF.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert result.hungarian_VF.tolist() == [[1, 1, 1], [0, 0, 0]]


def test_a_scene_without_objects():
    result = grounding(np.zeros((0, 2)), np.array([[3, 1]]), np.array([0, 0]), np.array([], dtype=int))
    assert result.argmax_VF.shape == (0, 3)
    summary = summarise_grounding([result])
    assert (summary["primitives"], summary["primitives_left_out"]) == (0, 0)
    assert summary["argmax"] == dict.fromkeys(FIGURES)
    assert summary["by_size"] == summary["by_objects"] == {}


def test_summary_is_a_mean_over_primitives_with_its_parts():
    good = ground(PERFECT, [0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [0, 2, 4], [0, 1])
    bad = ground([[9, 0]], [0, 1], [0, 1], [0, 1], [1])
    hidden = ground([[9, 0]], [0, 1], [0, 0], [0, 1], [1])
    summary = summarise_grounding([good, bad, hidden], ["large", "small"])
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["primitives"], summary["primitives_left_out"]) == (3, 1)
    assert summary["argmax"] == {name: pytest.approx(2 / 3) for name in FIGURES}
    assert summary["oracle"] == dict.fromkeys(FIGURES, 1.0)
    assert summary["floor"]["pointing"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    assert summary["by_size"]["large"]["argmax"]["pointing"] == 1
    assert summary["by_size"]["small"]["argmax"]["pointing"] == 0.5
    assert {name: part["primitives"] for name, part in summary["by_objects"].items()} == {"1": 1, "2": 2}
    assert list(summarise_grounding([good])["by_size"]) == ["0", "1"]
    with pytest.raises(ValueError, match="no image"):
        summarise_grounding([])


@pytest.mark.parametrize(
    ("similarity", "table", "peaks", "sizes"),
    [
        ([[1.0, 2.0]], [[1, 1]], [0, 0], [0]),
        ([[1.0, 2.0]], [[1, 1], [1, 1]], [0], [0]),
        ([[1.0, 2.0]], [[1, 1], [1, 1]], [0, 0], [0, 1]),
        ([[1.0, np.nan]], [[1, 1], [1, 1]], [0, 0], [0]),
        (np.zeros((1, 0)), np.zeros((2, 0)), [], [0]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(similarity, table, peaks, sizes):
    with pytest.raises(ValueError, match=r"do not fit|must be finite"):
        grounding(np.array(similarity), np.array(table), np.array(peaks), np.array(sizes))
