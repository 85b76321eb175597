"""Which model is the best: votes by validation cases; what is undefined does not vote."""

import pytest

from fedimaging.federation.selection import ModelSelection, vote


def sites(**figures):
    return {name: {"auroc": value, "cases": cases} for name, (value, cases) in figures.items()}


def test_sites_vote_with_their_validation_cases():
    value, best = ModelSelection("auroc").judge(0, sites(a=(0.9, 30), b=(0.6, 10)))
    assert value == pytest.approx((0.9 * 30 + 0.6 * 10) / 40)
    assert best


def test_the_best_is_kept_until_a_better_one_comes():
    selection = ModelSelection("auroc")
    verdicts = [selection.judge(i, sites(a=(value, 10)))[1] for i, value in enumerate([0.5, 0.7, 0.7, 0.6, 0.8])]
    assert verdicts == [True, True, False, False, True]
    assert (selection.best_index, selection.best_value) == (4, 0.8)


@pytest.mark.parametrize(
    "metrics",
    [{}, {"auroc": float("nan"), "cases": 9}, {"auroc": "0.99", "cases": 9}, {"auroc": True, "cases": 9},
     {"auroc": 0.99}, {"auroc": 0.99, "cases": -5}, {"auroc": 0.99, "cases": float("inf")}],
)  # fmt: skip
def test_a_site_without_a_defined_metric_does_not_vote(metrics):
    assert vote(metrics, "auroc") is None
    value, _ = ModelSelection("auroc").judge(0, {"a": metrics, **sites(b=(0.6, 10))})
    assert value == pytest.approx(0.6)


def test_without_any_vote_the_newest_model_is_kept():
    selection = ModelSelection("auroc")
    assert selection.judge(0, {"a": {}}) == (None, True)
    assert selection.judge(1, {"a": {}}) == (None, True)
    assert selection.judge(2, sites(a=(0.4, 5))) == (0.4, True)
    assert selection.judge(3, {"a": {}}) == (None, False)
    assert selection.best_index == 2
