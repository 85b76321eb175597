"""Renders a collected report as one HTML page, and writes it.

Every string of a workspace is untrusted: the template escapes all of them, charts hold none, and the page forbids
scripts and the network.
"""

import json
import os
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from fedimaging.errors import FedImagingError
from fedimaging.report import figures
from fedimaging.report.collect import LABELS, metric_label
from fedimaging.report.evaluation import SPLITS
from fedimaging.report.examples import CONTOURS, example_images

EXPLANATIONS = {
    "auroc": "AUROC is the chance that a case with the finding gets a higher score than one without it: "
    "0.5 is guessing, 1 is perfect.",
    "mean_dice": "Dice measures how far the predicted and the drawn region overlap: 0 is not at all, 1 is exactly.",
}
_ORDER = (
    "auroc",
    "dice",
    "mean_dice",
    "hd95",
    "mean_hd95",
    "sensitivity",
    "specificity",
    "threshold",
    "balanced_accuracy",
    "accuracy",
)


def page_environment(*packages: str) -> Environment:
    """Templates of these packages, then of this one, with the filters that all pages use; everything is escaped."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ".") for package in (*packages, "fedimaging.report")]),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "size": size,
        "duration": duration,
        "metric": metric_label,
        "pretty": _pretty,
        "flat": _flat,
    }
    return environment


def render(report: dict[str, Any], workspace: Path) -> str:
    """The page of a collected report; `workspace` is where the example images of synthetic hospitals are looked for."""
    index = {site: i for i, site in enumerate(report["sites"])}
    headline = report["headline"]
    evaluations = report["cross_site"].get(headline["model"], {})
    columns, intervals = _columns(evaluations)
    return (
        page_environment()
        .get_template("template.html")
        .render(
            report=report,
            index=index,
            splits=SPLITS,
            markers=marker_shapes(),
            explanation=EXPLANATIONS.get(report["key_metric"]["name"]),
            evaluations=evaluations,
            forest=_forest(report, evaluations),
            spans=_spans(report["participation"]),
            charts=_charts(report, index),
            roc=_roc_charts(evaluations, index),
            reliability=_reliability_charts(evaluations, index),
            columns=columns,
            class_names=_class_names(evaluations),
            roc_sites=[s for s, e in evaluations.items() if any(cell["roc"] for cell in e["per_class"].values())],
            intervals=intervals,
            heat=_heat,
            examples=example_images(workspace, report["settings"], report["sites"]),
            contours=CONTOURS,
            quartiles=_unique(
                name for e in evaluations.values() for c in e["per_class"].values() for name in c["quartiles"]
            ),
            timing=_timing(report),
        )
    )


def write_files(out: Path, page: str, report: dict[str, Any], private: bool) -> tuple[Path, Path]:
    """Writes the page and, beside it, its figures as JSON; each file appears whole or not at all.

    Args:
        private: readable by the owner only, from the first byte on.

    Raises:
        FedImagingError: the place cannot be written to.
    """
    data = out.with_suffix(".json")
    if data == out:
        raise FedImagingError(f"{out} is where the figures go as JSON: give the page's file a name that ends in .html")
    for path, text in ((out, page), (data, json.dumps(report, indent=1, allow_nan=False) + "\n")):
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise FedImagingError(
                f"{path} cannot be written ({error.strerror}): name another place with --out"
            ) from error
    return out, data


def number(value: float | None, digits: int = 3) -> str:
    """A figure with a fixed number of decimals, fewer from 10 on; a dash for none."""
    if value is None:
        return "–"
    return f"{value:.{digits if abs(value) < 10 else 1}f}"


def size(value: float | None) -> str:
    """Bytes in the decimal units that networks and disks are sold in."""
    if value is None:
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.{2 if value < 10 * scale else 1}f}\u00a0{unit}"
    return f"{value:.0f}\u00a0B"


def duration(seconds: float | None) -> str:
    """Seconds below two minutes, else minutes and seconds, or hours and minutes."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}\u00a0min {rest}\u00a0s" if minutes < 120 else f"{minutes // 60}\u00a0h {minutes % 60}\u00a0min"


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value) pairs."""
    if isinstance(value, dict) and value:
        return [
            pair for name, item in value.items() for pair in _flat(item, f"{prefix}.{name}" if prefix else str(name))
        ]
    return [(prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]


def marker_shapes() -> list[str]:
    """The charts' markers as paths in a box of 10 by 10, for the legends."""
    return [
        "M5 1a4 4 0 1 0 0 8a4 4 0 1 0 0-8z",
        "M1.5 1.5h7v7h-7z",
        "M5 1l4.3 7.8h-8.6z",
        "M5 .4l4.6 4.6l-4.6 4.6l-4.6-4.6z",
        "M5 9l4.3-7.8h-8.6z",
        "M3.5 1h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z",
        "M1 3l2-2l2 2l2-2l2 2l-2 2l2 2l-2 2l-2-2l-2 2l-2-2l2-2z",
    ]


def _forest(report: dict[str, Any], evaluations: dict[str, Any]) -> dict[str, Any] | None:
    """The headline's figures as bars: positions in percent of an axis that ends at 1 for a metric between 0 and 1."""
    key = report["key_metric"]["name"]
    rows = [
        (site, e["metrics"][key], e["cases"], e["min_cell"]) for site, e in evaluations.items() if key in e["metrics"]
    ]
    shown = [figure for _, figure, _, _ in rows if figure["value"] is not None]
    if not shown:
        return None
    bounds = [bound for figure in shown for bound in (figure["ci"] or [figure["value"]])]
    unit = min(bounds) >= 0 and max(bounds) <= 1
    low, high = (min(0.5, int(min(bounds) * 10) / 10), 1.0) if unit else (min(0.0, *bounds), max(bounds))

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low or 1), 2)

    def bar(figure: dict[str, Any]) -> dict[str, Any]:
        ci = figure["ci"]
        return {
            "figure": figure,
            "at": None if figure["value"] is None else place(figure["value"]),
            "from": place(ci[0]) if ci else None,
            "width": round(place(ci[1]) - place(ci[0]), 2) if ci else None,
        }

    step = 0.1 if high - low < 0.65 else 0.25
    ticks = [high - step * i for i in range(int((high - low) / step + 1e-6) + 1)] if unit else [low, high]
    return {
        "rows": [bar(figure) | {"site": site, "cases": cases, "min_cell": cell} for site, figure, cases, cell in rows],
        "mean": bar(report["headline"]["macro_mean"]),
        "ticks": [(place(tick), f"{tick:.3g}") for tick in ticks],
    }


def _spans(participation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Consecutive rounds with the same participation as one row."""
    groups = [list(rows) for _, rows in groupby(participation, key=lambda row: row["sites"])]
    return [{"first": rows[0]["round"], "last": rows[-1]["round"], "sites": rows[0]["sites"]} for rows in groups]


def _charts(report: dict[str, Any], index: dict[str, int]) -> dict[str, Markup]:
    charts = {}
    losses = {
        i: [(row["round"], row["sites"].get(site, {}).get("loss")) for row in report["training"]]
        for site, i in index.items()
        if any(row["sites"].get(site, {}).get("loss") is not None for row in report["training"])
    }
    if losses:
        charts["loss"] = figures.loss_chart(losses, "Training loss per round and hospital")
    points = report["validation"]
    curves = {
        i: [(point["after_rounds"], point["key"].get(site)) for point in points]
        for site, i in index.items()
        if any(point["key"].get(site) is not None for point in points)
    }
    mean = [(point["after_rounds"], point["mean"]) for point in points]
    if curves or any(value is not None for _, value in mean):
        metric = LABELS.get(report["key_metric"]["name"], "key metric")
        label = f"Validation {metric} per hospital and its vote-weighted mean, by rounds trained"
        charts["validation"] = figures.validation_chart(curves, mean, report["picked"]["after_rounds"], metric, label)
    return charts


def _roc_charts(evaluations: dict[str, Any], index: dict[str, int]) -> list[tuple[str, Markup]]:
    charts = []
    for i, name in enumerate(_class_names(evaluations)):
        cells = {site: e["per_class"][name] for site, e in evaluations.items() if name in e["per_class"]}
        curves = {
            index[site]: cell["roc"] | {"point": _operating_point(cell)} for site, cell in cells.items() if cell["roc"]
        }
        if curves:
            charts.append((name, figures.roc_chart(curves, f"roc{i}", "ROC curves, one per hospital")))
    return charts


def _operating_point(cell: dict[str, Any]) -> tuple[float, float] | None:
    values = [cell["metrics"].get(name, {}).get("value") for name in ("specificity", "sensitivity")]
    return None if None in values else (1 - values[0], values[1])


def _reliability_charts(evaluations: dict[str, Any], index: dict[str, int]) -> list[dict[str, Any]]:
    charts = []
    for site, evaluation in evaluations.items():
        calibration = evaluation["calibration"]
        if calibration:
            svg = figures.reliability_chart(
                index[site], calibration["bins"], f"reliability{index[site]}", "Reliability diagram of one hospital"
            )
            charts.append(
                {
                    "site": site,
                    "svg": svg,
                    "ece": calibration["ece"],
                    "brier": calibration["brier"],
                }
            )
    return charts


def _columns(evaluations: dict[str, Any]) -> tuple[dict[str, list[str]], dict[str, set[str]]]:
    """The metrics that occur overall, per class and in subgroups, as they are read, and those with an interval."""
    sources = {
        "overall": [e["metrics"] for e in evaluations.values()],
        "per_class": [cell["metrics"] for e in evaluations.values() for cell in e["per_class"].values()],
        "subgroups": [
            g["metrics"] for e in evaluations.values() for groups in e["subgroups"].values() for g in groups.values()
        ],
    }
    rank = {name: i for i, name in enumerate(_ORDER)}
    columns = {
        part: sorted(_unique(name for metrics in found for name in metrics), key=lambda name: rank.get(name, len(rank)))
        for part, found in sources.items()
    }
    intervals = {
        part: {name for metrics in found for name, figure in metrics.items() if figure["ci"]}
        for part, found in sources.items()
    }
    return columns, intervals


def _class_names(evaluations: dict[str, Any]) -> list[str]:
    return _unique(name for evaluation in evaluations.values() for name in evaluation["per_class"])


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _heat(value: float | None) -> int:
    """How strongly a cell is coloured, 0 to 8: from 0.5 to 1 for a metric between 0 and 1, else not at all."""
    return 0 if value is None or not 0 <= value <= 1 else max(0, round((value - 0.5) * 16))


def _timing(report: dict[str, Any]) -> dict[str, Any]:
    """Medians over the rounds: wall time, the slowest hospital's share of it, and bytes."""

    def middle(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return median(known) if known else None

    rows = report["training"]
    slowest = [
        max((s["seconds"] for s in row["sites"].values() if s["seconds"] is not None), default=None) for row in rows
    ]
    return {
        "round": middle(row["seconds"] for row in rows),
        "slowest": middle(slowest),
        "bytes_out": middle(row["bytes_out"] for row in rows),
        "bytes_in": middle(row["bytes_in"] for row in rows),
    }
