"""Paired statistics against independent implementations and simulation."""

import math

import numpy as np
import pytest
from scipy import stats as distributions
from sklearn.metrics import roc_auc_score

from fedimaging.compare import paired


def scores(rng, cases, strength=1.0):
    """(scores, positive) of one class against the rest."""
    positive = np.arange(cases) % 3 == 0
    return rng.normal(size=cases) + strength * positive, positive


def delong_by_definition(first, second, positive):
    """p-value of DeLong et al. 1988, equation by equation."""

    def psi(x, y):
        return 1.0 if x > y else 0.5 if x == y else 0.0

    v10, v01, areas = [], [], []
    for values in (first, second):
        x, y = values[positive], values[~positive]
        table = np.array([[psi(a, b) for b in y] for a in x])
        areas.append(table.mean())
        v10.append(table.mean(1))
        v01.append(table.mean(0))
    covariance = np.cov(v10) / len(v10[0]) + np.cov(v01) / len(v01[0])
    contrast = np.array([1.0, -1.0])
    z = (areas[0] - areas[1]) / math.sqrt(contrast @ covariance @ contrast)
    return 2 * distributions.norm.sf(abs(z))


@pytest.mark.parametrize("seed", range(3))
def test_the_p_value_of_two_aurocs_is_delong_s(seed):
    rng = np.random.default_rng(seed)
    first, positive = scores(rng, 60)
    second = np.round(first + rng.normal(size=60), 1)
    patients = range(60)
    one, other = (paired.macro_auroc(v[:, None], positive[:, None], patients, [0]) for v in (first, second))
    assert one.value == pytest.approx(roc_auc_score(positive, first))
    assert one.minus(other).p_value() == pytest.approx(delong_by_definition(first, second, positive), rel=1e-5)


def test_without_a_difference_the_p_value_is_uniform():
    rng, values = np.random.default_rng(0), []
    for _ in range(300):
        truth, positive = scores(rng, 90)
        pair = [truth + rng.normal(size=90) for _ in range(2)]
        one, other = (
            paired.Estimate(roc_auc_score(positive, v), np.empty(0), paired.auroc_parts(v, positive)) for v in pair
        )
        values.append(one.minus(other).p_value())
    assert distributions.kstest(values, "uniform").pvalue > 0.01


def test_intervals_cover_the_true_auroc():
    rng, covered, true = np.random.default_rng(1), 0, distributions.norm.cdf(1 / math.sqrt(2))
    for _ in range(60):
        values, positive = scores(rng, 120)
        low, high = paired.macro_auroc(values[:, None], positive[:, None], range(120), [0]).interval()
        covered += low <= true <= high
    assert 51 <= covered <= 60


def test_copies_of_a_patient_s_case_tell_nothing_new():
    rng = np.random.default_rng(2)
    values, positive = scores(rng, 60)
    copies = np.repeat(np.arange(60), 4)
    once = paired.macro_auroc(values[:, None], positive[:, None], range(60), [0])
    naive = paired.macro_auroc(values[copies, None], positive[copies, None], range(240), [0])
    grouped = paired.macro_auroc(values[copies, None], positive[copies, None], copies, [0])
    error = {name: math.sqrt((e.parts**2).sum()) for name, e in (("o", once), ("n", naive), ("g", grouped))}
    assert error["n"] < 0.6 * error["o"]
    assert error["g"] == pytest.approx(error["o"], rel=0.05)
    widths = [interval[1] - interval[0] for interval in (once.interval(), naive.interval(), grouped.interval())]
    assert widths[1] < 0.7 * widths[0]
    assert widths[2] == pytest.approx(widths[0], rel=0.2)


def test_a_mean_of_cases_has_the_paired_z_test():
    rng = np.random.default_rng(3)
    first, second = rng.uniform(0.6, 0.9, (2, 40))
    one, other = (paired.mean(values, range(40), [0]) for values in (first, second))
    difference = first - second
    z = difference.mean() / (difference.std(ddof=1) / math.sqrt(40))
    assert one.minus(other).p_value() == pytest.approx(2 * distributions.norm.sf(abs(z)))


def test_without_a_variance_there_is_no_p_value():
    right, wrong = (paired.mean(np.full(40, value), range(40), [0]) for value in (1.0, 0.0))
    assert right.minus(wrong).value == 1
    assert right.minus(wrong).p_value() is None, "every case differs by the same: no test, least of all p = 0"
    some = paired.mean(np.random.default_rng(3).uniform(size=40), range(40), [0])
    assert some.minus(some).p_value() is None
    thirds = paired.mean_over_seeds([some.minus(some), some, some])
    assert thirds.minus(paired.mean_over_seeds([some, some, some.minus(some)])).p_value() is None, "rounding is none"


def test_the_macro_mean_adds_the_hospitals_errors_as_independent_ones():
    rng = np.random.default_rng(4)
    found = [paired.mean(rng.normal(size=n), range(n), [0]) for n in (30, 50)]
    macro = paired.mean_over_sites(found)
    assert macro.value == pytest.approx((found[0].value + found[1].value) / 2)
    assert (macro.parts**2).sum() == pytest.approx(sum((e.parts**2).sum() for e in found) / 4)


def test_too_few_cases_give_no_figure():
    values, positive = np.linspace(0, 1, 20)[:, None], np.arange(20)[:, None] < 4
    assert paired.macro_auroc(values, positive, range(20), [0]) is None
    assert paired.mean(np.ones(4), range(4), [0]) is None
