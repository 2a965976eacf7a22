"""Retrieval against torchmetrics, scikit-learn, sorting by hand, exact chance levels and invariances."""

import json
from itertools import permutations
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import top_k_accuracy_score
from torchmetrics.retrieval import RetrievalHitRate

from nsi.metrics import retrieval as module
from nsi.metrics.retrieval import chance, ranks, retrieval, schema_groups

frozen = settings(derandomize=True, max_examples=60, deadline=None)
N = 7
# Few distinct values, so that ties are common; few groups, so that twins are.
score_maps = arrays(np.float64, (N, N), elements=st.integers(0, 4).map(float))
group_maps = arrays(np.int64, (N,), elements=st.integers(0, 4))


def random_scores(n, seed=0):
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ranks_by_sorting(scores, groups, best_case):
    """Each row's items in order, ties settled for or against the relevant ones; competitors before the first."""
    found = []
    for row, group in zip(scores, groups, strict=True):
        order = sorted(range(len(row)), key=lambda s: (-row[s], (groups[s] == group) != best_case))
        first = next(place for place, s in enumerate(order) if groups[s] == group)
        found.append(first + 1)
    return found


def test_hit_rates_agree_with_torchmetrics_and_scikit_learn():
    n, scores = 30, random_scores(30)
    groups = torch.arange(n) // 2 * 2 % 14  # groups of several sizes
    figures = retrieval(scores, groups)
    queries = torch.arange(n)[:, None].expand(n, n)
    for k in (1, 5, 10):
        for directed, name in ((scores, "image_to_schema"), (scores.T, "schema_to_image")):
            judge = RetrievalHitRate(top_k=k)
            hit = judge(directed.reshape(-1), (groups[:, None] == groups).reshape(-1), indexes=queries.reshape(-1))
            assert getattr(figures, name)[f"R@{k}"] == pytest.approx(float(hit), abs=1e-6)
        plain = top_k_accuracy_score(np.arange(n), scores.numpy(), k=k)
        assert retrieval(scores).image_to_schema[f"R@{k}"] == pytest.approx(plain)


@frozen
@given(score_maps, group_maps)
def test_ranks_agree_with_sorting(scores, groups):
    pessimistic, optimistic = ranks(torch.from_numpy(scores), torch.from_numpy(groups))
    assert optimistic.tolist() == ranks_by_sorting(scores, groups, best_case=True)
    # Against the model: irrelevant items go before all relevant ones of the same score.
    assert pessimistic.tolist() == ranks_by_sorting(scores, groups, best_case=False)


def test_a_hand_case_with_ties_and_directions():
    scores = torch.tensor([[3.0, 3.0, 1.0], [0.0, 2.0, 5.0], [0.0, 1.0, 4.0]])
    figures = retrieval(scores)
    assert figures.gallery == 3
    i2s, s2i = figures.image_to_schema, figures.schema_to_image
    assert (i2s["R@1"], i2s["R@1_optimistic"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (i2s["median_rank"], i2s["median_rank_optimistic"]) == (2, 1)
    assert (s2i["R@1"], s2i["R@1_optimistic"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert s2i["median_rank"] == 2
    assert figures.chance == {"R@1": 1 / 3, "R@5": 1.0, "R@10": 1.0}


def test_constant_scores_are_worthless_and_pessimism_says_so():
    figures = retrieval(torch.zeros(20, 20))
    for direction in (figures.image_to_schema, figures.schema_to_image):
        assert (direction["R@10"], direction["median_rank"]) == (0, 20)
        assert (direction["R@1_optimistic"], direction["median_rank_optimistic"]) == (1, 1)


def test_perfect_scores_and_the_median_of_an_even_gallery():
    figures = retrieval(torch.eye(4))
    assert figures.image_to_schema["R@1"] == figures.schema_to_image["R@1"] == 1
    ranked = retrieval(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).image_to_schema
    assert ranked["median_rank"] == 1.5


def test_twins_are_relevant_to_each_others_images():
    scores = torch.tensor([[0.0, 9.0, 1.0], [8.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert retrieval(scores).image_to_schema["R@1"] == pytest.approx(1 / 3)
    assert retrieval(scores, torch.tensor([4, 4, 2])).image_to_schema["R@1"] == 1
    assert retrieval(scores, np.array([4, 4, 2])).schema_to_image["R@1"] == pytest.approx(2 / 3)


@frozen
@given(score_maps, group_maps, st.permutations(range(N)))
def test_the_order_of_the_gallery_changes_nothing(scores, groups, order):
    order = np.array(order)
    before = retrieval(torch.from_numpy(scores), groups)
    assert retrieval(torch.from_numpy(scores[order][:, order].copy()), groups[order]) == before


@frozen
@given(score_maps, group_maps)
def test_recall_at_the_gallery_is_one_and_figures_are_in_order(scores, groups):
    figures = retrieval(torch.from_numpy(scores), groups)
    for direction in (figures.image_to_schema, figures.schema_to_image):
        assert direction["R@10"] == 1  # N is 7
        assert direction["R@1"] <= direction["R@1_optimistic"]
        assert direction["R@1"] <= direction["R@5"] <= direction["R@10"]
        assert 1 <= direction["median_rank_optimistic"] <= direction["median_rank"] <= N


def test_monotone_maps_and_float_types_change_nothing():
    scores = (random_scores(25) * 3).round()  # small integers: exact in every type
    wanted = retrieval(scores)
    for other in (scores * 2 + 1, scores.float(), scores.bfloat16(), scores.half()):
        assert retrieval(other) == wanted


def test_blocks_change_nothing(monkeypatch):
    scores, groups = random_scores(23), torch.arange(23) % 9
    wanted = retrieval(scores, groups)
    for block in (1, 23, 23 * 5 + 1):
        monkeypatch.setattr(module, "BLOCK", block)
        assert retrieval(scores, groups) == wanted


def test_chance_is_k_over_n_without_twins():
    assert chance(np.arange(40)) == {"R@1": 0.025, "R@5": 0.125, "R@10": 0.25}
    assert chance(np.arange(8)) == {"R@1": 0.125, "R@5": 0.625, "R@10": 1.0}


def test_chance_with_twins_is_the_mean_over_all_orders():
    groups = np.array([0, 0, 1, 2, 2, 2])
    hits = [
        any(groups[item] == group for item in order[:1])
        for group in groups
        for order in permutations(range(len(groups)))
    ]
    assert chance(groups)["R@1"] == pytest.approx(np.mean(hits))
    groups = np.array([0] * 3 + list(range(1, 18)))
    twins, single = 1 - comb(17, 5) / comb(20, 5), 5 / 20
    assert chance(groups)["R@5"] == pytest.approx((3 * twins + 17 * single) / 20)


def test_names_are_those_of_the_evaluation_file():
    figures = json.loads(json.dumps(retrieval(random_scores(3)).as_dict()))
    names = ["R@1", "R@5", "R@10", "median_rank"]
    assert list(figures) == ["gallery", "chance", "schema_to_image", "image_to_schema"]
    assert list(figures["chance"]) == names[:3]
    assert list(figures["schema_to_image"]) == names + [f"{name}_optimistic" for name in names]


@pytest.mark.parametrize(
    ("scores", "groups", "words"),
    [
        (torch.zeros(2, 3), None, "square"),
        (torch.zeros(0, 0), None, "empty"),
        (torch.tensor([[0.0, float("nan")], [0.0, 0.0]]), None, "not a number"),
        (torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64), "group ids"),
    ],
)
def test_bad_input_is_refused(scores, groups, words):
    with pytest.raises(ValueError, match=words):
        retrieval(scores, groups)


def schemas():
    """Four schemas: 0 and 1 the same multiset in another order and with other padding, 2 has a repeat, 3 none."""
    a, b = ([0, 1, 2], [0.1, 0.2, 0.3]), ([2, 1, 0], [1.0, -2.0, 0.3])
    pad = ([1, 1, 1], [7.0, 7.0, 7.0])
    rows = [[a, b, pad], [pad, b, a], [a, b, b], [pad, pad, pad]]
    real = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    labels = torch.tensor([[label for label, _ in row] for row in rows])
    positions = torch.tensor([[place for _, place in row] for row in rows])
    return labels, real, positions


def test_groups_are_equal_multisets():
    labels, real, positions = schemas()
    assert schema_groups(labels, real, positions).tolist() == [0, 0, 1, 2]
    assert schema_groups(labels, real).tolist() == [0, 0, 1, 2]


def test_positions_count_exactly_or_not_at_all():
    labels, real, positions = schemas()
    positions[1, 1, 0] = torch.nextafter(positions[1, 1, 0], torch.tensor(9.0))
    assert schema_groups(labels, real, positions).tolist() == [0, 1, 2, 3]
    assert schema_groups(labels, real, positions[..., 1:]).tolist() == [0, 0, 1, 2]
    assert schema_groups(labels, real).tolist() == [0, 0, 1, 2]


def test_labels_stay_with_their_positions():
    labels = torch.tensor([[[0, 0, 0], [1, 1, 1]]] * 2)
    positions = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]])
    assert schema_groups(labels, torch.ones(2, 2, dtype=torch.bool), positions).tolist() == [0, 1]
    with pytest.raises(ValueError, match="last axis"):
        schema_groups(labels, torch.ones(2, 3, dtype=torch.bool))
