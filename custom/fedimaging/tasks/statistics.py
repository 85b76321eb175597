"""Statistics that a site computes of its own cases, fit to leave it: intervals, binned curves, withheld small cells."""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_roc_auc
from numpy.typing import NDArray
from scipy.stats.mstats import hdquantiles

from fedimaging.datasets.manifest import COVARIATES, Case

MIN_CELL = 5
"""No figure that leaves a site rests on fewer cases than this, of either class where there are two."""

FloatArray = NDArray[np.floating]
BoolArray = NDArray[np.bool_]
Interval = list[float]

ROC_BINS, CALIBRATION_BINS = 20, 10

_RESAMPLES = 1000
_MOST_GROUPS = 16
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .,&()/<>=+-]{0,31}")


def withhold_counts(counts: dict[str, int]) -> dict[str, int | None]:
    """Counts by class; all of them withheld where one is small, since the total would give it away."""
    small = any(withhold(count) is None for count in counts.values())
    return {name: None if small else count for name, count in counts.items()}


def withhold(count: int) -> int | None:
    """The count, or None where it is above zero and below ``MIN_CELL``."""
    return None if 0 < count < MIN_CELL else int(count)


def enough(positive: BoolArray) -> bool:
    """Whether both classes have at least ``MIN_CELL`` cases."""
    return bool(min(positive.sum(), (~positive).sum()) >= MIN_CELL)


def auroc(scores: FloatArray, positive: BoolArray) -> float:
    """Area under the ROC curve (MONAI's)."""
    return float(compute_roc_auc(torch.from_numpy(scores), torch.from_numpy(positive.astype(np.float32))))


def resample_weights(groups: Sequence[Hashable], seed: int | Sequence[int]) -> FloatArray:
    """Bootstrap weights (resamples, cases): groups (patients) are drawn with replacement, with all their cases."""
    _, member = np.unique(np.asarray([str(group) for group in groups]), return_inverse=True)
    count = int(member.max()) + 1
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    return draws[:, member].astype(np.float32)


def resampled_auroc(scores: FloatArray, positive: BoolArray, weights: FloatArray) -> FloatArray:
    """AUROC of each resample (resamples,) as the weighted Mann-Whitney statistic; NaN where a class is absent."""
    pos, neg = scores[positive], scores[~positive]
    wins = (pos[:, None] > neg[None]).astype(np.float32) + 0.5 * (pos[:, None] == neg[None])
    w_pos, w_neg = weights[:, positive], weights[:, ~positive]
    with np.errstate(invalid="ignore"):
        return ((w_pos @ wins) * w_neg).sum(1) / (w_pos.sum(1) * w_neg.sum(1))


def resampled_mean(values: FloatArray | BoolArray, weights: FloatArray) -> FloatArray:
    """A mean's or a proportion's value in each resample (resamples,); NaN where no case was drawn."""
    with np.errstate(invalid="ignore"):
        return (weights * values).sum(1) / weights.sum(1)


def interval(values: FloatArray) -> Interval | None:
    """The 95 % percentile interval of resampled values, without the undefined ones."""
    finite = values[np.isfinite(values)]
    return None if finite.size == 0 else [round(float(q), 4) for q in np.quantile(finite, [0.025, 0.975])]


def quantiles(values: FloatArray, probabilities: Sequence[float]) -> list[float]:
    """Quantiles by Harrell and Davis (1982): each weighs all values, and is none of them, as a sample quantile is."""
    return [round(float(q), 4) for q in hdquantiles(values, prob=list(probabilities))]


Groups = Mapping[str, Sequence[str]]


def groups(cases: Sequence[Case]) -> Groups:
    """The values of each covariate of the cases; one of many values, or of other than short, simple ones, is withheld.

    Such a covariate is no group but free text: of a DICOM element, or of a column that holds names.
    """
    found: dict[str, list[str]] = {}
    for covariate in COVARIATES:
        values = {value for case in cases if (value := getattr(case, covariate)) is not None}
        if 0 < len(values) <= _MOST_GROUPS and all(map(_GROUP.fullmatch, values)):
            found[covariate] = sorted(values)
    return found


def subgroups(
    cases: Sequence[Case], figures: Callable[[BoolArray, Sequence[Case]], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Figures by covariate and its value; ``figures`` is given which cases (cases,) and these cases."""
    told: dict[str, dict[str, Any]] = {}
    for covariate, names in groups(cases).items():
        values = [getattr(case, covariate) for case in cases]
        # One small group withholds the covariate whole: the total less the others would give it away.
        if min(Counter(values).values()) < MIN_CELL:
            continue
        told[covariate] = {}
        for value in names:
            chosen = np.array([v == value for v in values])
            members = [case for case, inside in zip(cases, chosen, strict=True) if inside]
            told[covariate][value] = {"cases": len(members), **figures(chosen, members)}
    return told


def roc_curve(scores: FloatArray, positive: BoolArray, bins: int = ROC_BINS) -> dict[str, list[float]]:
    """The true positive rate at ``bins`` + 1 equal steps of the false positive rate; no score of a case in it."""
    rates = np.linspace(0, 1, bins + 1)
    thresholds = np.quantile(scores[~positive], 1 - rates, method="higher")
    tpr = (scores[positive][None] > thresholds[:, None]).mean(1)
    tpr[-1] = 1.0
    return {"fpr": rates.round(4).tolist(), "tpr": np.maximum.accumulate(tpr).round(4).tolist()}


def youden_threshold(scores: FloatArray, positive: BoolArray) -> float:
    """The threshold with the largest sensitivity + specificity (Youden 1950), between two neighbouring scores."""
    values = np.unique(scores)
    candidates = np.concatenate([[values[0] - 1e-6], (values[1:] + values[:-1]) / 2, [values[-1] + 1e-6]])
    above = scores[None] > candidates[:, None]
    return float(candidates[np.argmax(above[:, positive].mean(1) - above[:, ~positive].mean(1))])


def calibration(confidence: FloatArray, correct: BoolArray, bins: int = CALIBRATION_BINS) -> dict[str, object]:
    """Reliability diagram and expected calibration error (Guo et al. 2017).

    Bins of fewer than ``MIN_CELL`` cases are withheld. No bin's count is told: those of the others would give it away.
    """
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    rows: list[dict[str, float | None]] = []
    error = 0.0
    for b in range(bins):
        inside = index == b
        cases = int(inside.sum())
        shown = cases >= MIN_CELL
        mean, share = (float(confidence[inside].mean()), float(correct[inside].mean())) if cases else (0.0, 0.0)
        error += cases / len(confidence) * abs(mean - share)
        rows.append({"confidence": round(mean, 4) if shown else None, "accuracy": round(share, 4) if shown else None})
    return {"ece": round(error, 4), "bins": rows}


def auroc_with_interval(
    scores: FloatArray, positive: BoolArray, groups: Sequence[Hashable], seed: int
) -> tuple[float | None, Interval | None]:
    """AUROC and its 95 % interval, bootstrapped by group; (None, None) where a class has too few cases."""
    if not enough(positive):
        return None, None
    values = resampled_auroc(scores, positive, resample_weights(groups, seed))
    return round(auroc(scores, positive), 4), interval(values)
