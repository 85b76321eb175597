"""The comparison as one HTML page, in the style of a job's report."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from fedimaging.compare.runs import ALONE, LEFT_OUT
from fedimaging.report import figures as charts
from fedimaging.report.html import EXPLANATIONS, marker_shapes, page_environment

_OWN = {ALONE: "each hospital’s own model"}


def render(figures: dict[str, Any]) -> str:
    """The page of a comparison's figures."""
    return (
        page_environment("fedimaging.compare")
        .get_template("compare.html")
        .render(
            figures=figures,
            names=_names(figures, _OWN | {LEFT_OUT: "each hospital by a model trained without it"}),
            index={row: i for i, row in enumerate(figures["rows"])},
            markers=marker_shapes(),
            explanation=EXPLANATIONS.get(figures["metric"]["name"]),
            learning=_learning(figures),
            bar=_bars(figures),
        )
    )


def render_results(figures: dict[str, Any]) -> str:
    """The page of the figures of finished jobs."""
    return (
        page_environment("fedimaging.compare")
        .get_template("results.html")
        .render(figures=figures, names=_names(figures, _OWN), explanation=EXPLANATIONS.get(figures["metric"]["name"]))
    )


def _names(figures: dict[str, Any], named: dict[str, str]) -> dict[str, str]:
    """What a reader calls the rows: jobs by their name, and others as they are named."""
    return {row: named.get(row, row) for row in figures["rows"]}


def _learning(figures: dict[str, Any]) -> Markup | None:
    index = {row: i for i, row in enumerate(figures["rows"])}
    curves = {index[row]: curve for row, curve in figures["curves"].items() if any(y is not None for _, y in curve)}
    if not curves:
        return None
    label = figures["metric"]["label"]
    return charts.learning_chart(curves, f"validation {label}", f"Validation {label} by rounds trained, a line a model")


def _bars(figures: dict[str, Any]) -> dict[str, Any]:
    """Where a value lies between the lowest bound shown and 1, in percent."""
    shown = [cell for row in figures["rows"].values() for cell in (*row["sites"].values(), row["macro"]) if cell]
    lowest = min((min(cell["ci"] or [cell["value"]]) for cell in shown), default=0.0)
    low = max(0.0, int(lowest * 10) / 10)

    def place(value: float) -> float:
        return round(100 * (value - low) / (1 - low or 1), 2)

    return {"place": place, "ticks": [(place(t), f"{t:.2g}") for t in (low, (1 + low) / 2, 1.0)]}
