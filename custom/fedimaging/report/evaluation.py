"""What a site sent about a model on its test cases, reduced to the figures that the report knows.

Every figure becomes ``{"value": float | None, "ci": [low, high] | None, "status": "ok" | "withheld" | "not_given"}``:
withheld for too few cases, not given where it is undefined.
"""

import math
from typing import Any

SPLITS = ("training", "validation", "test")
LARGEST = 1e18


def macro_mean(evaluations: dict[str, Any], key: str) -> dict[str, Any]:
    """The unweighted mean of a metric over hospitals, with an approximate 95 % interval.

    The interval combines the hospitals' own ones as independent estimates, distance by distance on each side
    (MOVER: Zou and Donner, Statistics in Medicine 2008; 27: 1693-1702), which keeps their asymmetry near 1. It is not
    given for a single hospital, nor when a hospital has no interval or one of zero width.

    Returns:
        {"value", "ci", "status", "sites": the hospitals averaged, "left_out": the ones without a figure}
    """
    figures = {site: evaluation["metrics"].get(key, to_figure({}, key)) for site, evaluation in evaluations.items()}
    used = {site: figure for site, figure in figures.items() if figure["value"] is not None}
    mean: dict[str, Any] = {
        "value": None,
        "ci": None,
        "status": "not_given",
        "sites": sorted(used),
        "left_out": sorted(set(figures) - set(used)),
    }
    if not used:
        return mean
    mean |= {"value": sum(figure["value"] for figure in used.values()) / len(used), "status": "ok"}
    if len(used) > 1 and all(_sound(figure) for figure in used.values()):
        below = math.hypot(*(figure["value"] - figure["ci"][0] for figure in used.values())) / len(used)
        above = math.hypot(*(figure["ci"][1] - figure["value"] for figure in used.values())) / len(used)
        mean["ci"] = [mean["value"] - below, mean["value"] + above]
    return mean


def _sound(figure: dict[str, Any]) -> bool:
    """Whether the interval has a width and holds its figure."""
    return (
        figure["ci"] is not None
        and figure["ci"][0] < figure["ci"][1]
        and figure["ci"][0] <= figure["value"] <= figure["ci"][1]
    )


def to_figure(source: dict[str, Any], name: str, few: bool = False) -> dict[str, Any]:
    """One figure with its interval; without a value, `few` says that it was withheld for too few cases."""
    value, ci = to_number(source.get(name)), source.get(f"{name}_ci")
    bounds = [to_number(bound) for bound in ci] if isinstance(ci, list) and len(ci) == 2 else [None]
    return {
        "value": value,
        "ci": bounds if value is not None and None not in bounds else None,
        "status": "ok" if value is not None else "withheld" if few else "not_given",
    }


_PARTS = (
    "cases",
    "patients",
    "min_cell",
    "seconds",
    "skipped",
    "classes",
    "per_class",
    "calibration",
    "subgroups",
    "roc",
)


def _figures(source: dict[str, Any], few: bool) -> dict[str, Any]:
    """Each figure of a mapping by name: numbers and nulls, with their intervals."""
    names = [
        n
        for n, v in source.items()
        if n not in _PARTS and not n.endswith(("_ci", "_quantiles")) and (v is None or to_number(v) is not None)
    ]
    return {name: to_figure(source, name, few) for name in names}


def _counts(source: Any) -> dict[str, Any]:
    source = to_mapping(source)
    return {"cases": to_number(source.get("cases")), "classes": to_numbers(source.get("classes"))}


def read_evaluation(raw: dict[str, Any]) -> dict[str, Any]:
    """One model on one site's split, reduced to the aggregates that the report knows: numbers, by name."""
    counts, validation = _counts(raw), _counts(raw.get("validation"))
    min_cell = to_number(raw.get("min_cell"))
    few = counts["cases"] is None or counts["cases"] < (min_cell or 0) or None in counts["classes"].values()
    return {
        "split": raw["split"] if raw.get("split") in SPLITS else "test",
        "task": str(raw.get("task", "")),
        "min_cell": min_cell,
        "personal": raw.get("judged") == "personal",
        **counts,
        "patients": to_number(raw.get("patients")),
        "skipped": to_number(raw.get("skipped")),
        "seconds": to_number(raw.get("seconds")),
        "training": _counts(raw.get("training")),
        "validation": validation,
        "metrics": _figures(raw, few),
        "per_class": {
            str(name): {
                "metrics": _figures(to_mapping(c), few or None in validation["classes"].values()),
                "roc": _roc(to_mapping(c).get("roc")),
                "cases": to_number(to_mapping(c).get("cases")),
                "quartiles": _quartiles(to_mapping(c)),
            }
            for name, c in to_mapping(raw.get("per_class")).items()
        },
        "calibration": _calibration(to_mapping(raw.get("calibration"))),
        "subgroups": {
            str(covariate): {str(group): _subgroup(to_mapping(g), min_cell) for group, g in to_mapping(groups).items()}
            for covariate, groups in to_mapping(raw.get("subgroups")).items()
        },
    }


def _quartiles(source: dict[str, Any]) -> dict[str, list[float]]:
    """By metric: the quartiles over the cases, lower, middle and upper, where all three are given."""
    quartiles = {}
    for name, values in source.items():
        known = [value for value in map(to_number, to_list(values)) if value is not None]
        if name.endswith("_quantiles") and len(known) == 3:
            quartiles[name.removesuffix("_quantiles")] = known
    return quartiles


def _subgroup(source: dict[str, Any], min_cell: float | None) -> dict[str, Any]:
    cases = to_number(source.get("cases"))
    few = cases is None or cases < (min_cell or 0)
    return {"cases": cases, "metrics": _figures(source, few)}


def _roc(source: Any) -> dict[str, list[float]] | None:
    curve = to_mapping(source)
    points = zip(to_list(curve.get("fpr")), to_list(curve.get("tpr")), strict=False)
    known = [(x, y) for x, y in points if to_number(x) is not None and to_number(y) is not None]
    return {"fpr": [x for x, _ in known], "tpr": [y for _, y in known]} if len(known) > 1 else None


def _calibration(source: dict[str, Any]) -> dict[str, Any] | None:
    if not source:
        return None
    bins = [
        {name: to_number(to_mapping(b).get(name)) for name in ("confidence", "accuracy")}
        for b in to_list(source.get("bins"))
    ]
    return {"ece": to_number(source.get("ece")), "brier": to_number(source.get("brier")), "bins": bins}


def to_number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > LARGEST or math.isnan(value):
        return None
    return value


def to_text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def to_mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def to_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def to_names(value: Any) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list | dict) else []


def to_numbers(value: Any) -> dict[str, float | None]:
    return {str(name): to_number(item) for name, item in to_mapping(value).items()}
