"""Statistics of models judged on the same cases: intervals bootstrapped by patient and paired tests.

A measure of a model on a sample is kept as an :class:`Estimate`: its value, its bootstrap replicates, and what each
patient adds to its error. Estimates on the same cases share their resamples, so that differences are paired; those on
the cases of different hospitals must not, so each hospital has a seed of its own. Means over seeds and over hospitals
are estimates again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from scipy import stats as distributions

from fedimaging.tasks import statistics as stats

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]

_NO_ERROR = 1e-9
"""what rounding leaves of a standard error of 0"""


@dataclass(frozen=True)
class Estimate:
    """A measure with its error.

    Attributes:
        value: the measure.
        resampled: its value in each bootstrap resample (resamples,).
        parts: what each patient adds to its error (patients,); their squares sum to its variance.
    """

    value: float
    resampled: Floats
    parts: Floats

    def interval(self) -> stats.Interval | None:
        """The 95 % percentile interval."""
        return stats.interval(self.resampled)

    def minus(self, other: Estimate) -> Estimate:
        """The difference to an estimate on the same patients."""
        return Estimate(self.value - other.value, self.resampled - other.resampled, self.parts - other.parts)

    def p_value(self) -> float | None:
        """Two-sided p-value of the hypothesis that the value is 0, from the normal distribution.

        None where no patient differs from another, as between equal models, or two that are always right and always
        wrong: without a variance there is no test.

        For a difference of two AUROCs this is the test of DeLong et al. (1988) where each patient has one case, and
        that of Obuchowski (1997) where patients have several.
        """
        error = float(np.sqrt((self.parts**2).sum()))
        return None if error < _NO_ERROR else float(2 * distributions.norm.sf(abs(self.value) / error))


def mean_over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of estimates of models of different seeds on the same patients."""
    return Estimate(
        fmean(e.value for e in estimates),
        np.mean([e.resampled for e in estimates], axis=0),
        np.mean([e.parts for e in estimates], axis=0),
    )


def mean_over_sites(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of estimates on different patients, drawn with different seeds, each hospital with the same weight."""
    return Estimate(
        fmean(e.value for e in estimates),
        np.mean([e.resampled for e in estimates], axis=0),
        np.concatenate([e.parts for e in estimates]) / len(estimates),
    )


def macro_auroc(scores: Floats, positive: Bools, patients: Sequence[Hashable], seed: Sequence[int]) -> Estimate | None:
    """The mean over classes of the AUROC of each against the rest; None where a class has too few cases.

    Args:
        scores: (cases, classes).
        positive: (cases, classes), which case is of which class.
        seed: of the resamples.
    """
    columns = range(scores.shape[1])
    if not len(scores) or not all(stats.enough(positive[:, c]) for c in columns):
        return None
    weights = stats.resample_weights(patients, seed)
    return Estimate(
        float(np.mean([stats.auroc(scores[:, c], positive[:, c]) for c in columns])),
        np.mean([stats.resampled_auroc(scores[:, c], positive[:, c], weights) for c in columns], axis=0),
        _by_patient(np.mean([auroc_parts(scores[:, c], positive[:, c]) for c in columns], axis=0), patients),
    )


def auroc_parts(scores: Floats, positive: Bools) -> Floats:
    """DeLong's structural components (cases,), less their mean and scaled so that their squares sum to the variance."""
    wins = (scores[positive][:, None] > scores[~positive][None]).astype(np.float64)
    wins += 0.5 * (scores[positive][:, None] == scores[~positive][None])
    parts = np.empty(len(scores))
    for inside, components in ((positive, wins.mean(1)), (~positive, wins.mean(0))):
        count = len(components)
        parts[inside] = (components - wins.mean()) / np.sqrt(count * (count - 1))
    return parts


def mean(values: Floats, patients: Sequence[Hashable], seed: Sequence[int]) -> Estimate | None:
    """The mean of a value of each case (a Dice coefficient, right or wrong); None for too few cases."""
    if len(values) < stats.MIN_CELL:
        return None
    return Estimate(
        float(values.mean()),
        stats.resampled_mean(values, stats.resample_weights(patients, seed)),
        _by_patient((values - values.mean()) / np.sqrt(len(values) * (len(values) - 1)), patients),
    )


def _by_patient(parts: Floats, patients: Sequence[Hashable]) -> Floats:
    _, member = np.unique(np.asarray([str(patient) for patient in patients]), return_inverse=True)
    summed: Floats = np.bincount(member, weights=parts).astype(np.float64)
    return summed
