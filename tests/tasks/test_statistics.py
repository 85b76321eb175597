"""The site's statistics against reference implementations, and what they withhold."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score, roc_curve

from fedimaging.tasks import statistics as stats


@pytest.fixture
def scored():
    generator = np.random.default_rng(0)
    positive = generator.random(120) < 0.4
    return (generator.normal(size=120) + positive).round(1), positive, [f"p{i // 2}" for i in range(120)]


def test_auroc_agrees_with_scikit_learn_ties_included(scored):
    scores, positive, _ = scored
    assert stats.auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))


def test_a_resample_is_the_weighted_auroc(scored):
    scores, positive, patients = scored
    weights = stats.resample_weights(patients, seed=1)[:20]
    expected = [roc_auc_score(positive, scores, sample_weight=w) for w in weights]
    assert stats.resampled_auroc(scores, positive, weights) == pytest.approx(expected, abs=1e-5)


def test_resampling_draws_patients_with_all_their_images(scored):
    weights = stats.resample_weights(scored[2], seed=1)
    assert (weights[:, ::2] == weights[:, 1::2]).all()
    assert (weights.sum(1) == 120).all()


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(3)
    covered = 0
    for trial in range(100):
        positive = np.arange(80) < 40
        scores = generator.normal(size=80) + positive
        _, bounds = stats.auroc_with_interval(scores, positive, list(range(80)), seed=trial)
        covered += bounds[0] <= 0.7602 <= bounds[1]  # Phi(1 / sqrt(2))
    assert 88 <= covered <= 99


def test_the_binned_curve_follows_the_curve(scored):
    scores, positive, _ = scored
    curve = stats.roc_curve(scores, positive)
    assert len(curve["fpr"]) == len(curve["tpr"]) == 21
    fpr, tpr, _ = roc_curve(positive, scores)
    for rate, value in zip(curve["fpr"], curve["tpr"], strict=True):
        reachable = tpr[fpr <= rate + 1e-9].max()
        assert value <= reachable + 1e-4
        assert value >= reachable - 0.1


def test_youden_s_threshold_is_the_best_one(scored):
    scores, positive, _ = scored
    threshold = stats.youden_threshold(scores, positive)

    def youden(t):
        return (scores[positive] > t).mean() + (scores[~positive] <= t).mean()

    assert youden(threshold) == pytest.approx(max(youden(t) for t in scores))
    assert threshold not in scores


def test_calibration_of_a_calibrated_and_of_an_overconfident_model():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1, 4000)
    correct = generator.random(4000) < confidence
    assert stats.calibration(confidence, correct)["ece"] < 0.03
    assert stats.calibration(np.full(4000, 0.95), correct)["ece"] == pytest.approx(0.95 - correct.mean(), abs=1e-3)
    assert brier_score_loss(correct, confidence) < 0.25


def test_small_cells_are_withheld():
    rows = stats.calibration(np.array([0.95] * 20 + [0.55] * 4), np.array([True] * 24))["bins"]
    assert rows[9] == {"confidence": 0.95, "accuracy": 1.0}
    assert rows[5] == rows[0] == {"confidence": None, "accuracy": None}
    assert stats.withhold_counts({"a": 20, "b": 5}) == {"a": 20, "b": 5}
    assert stats.withhold_counts({"a": 20, "b": 4}) == {"a": None, "b": None}, "the total would give 4 away"
    few = np.arange(20) < 4
    assert stats.auroc_with_interval(few.astype(float), few, list(range(20)), 0) == (None, None)
