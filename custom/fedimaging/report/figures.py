"""The report's charts as inline SVG.

No text of the workspace is drawn into a chart: names stand in the HTML around it, escaped. Colours are the page's CSS
variables, so that a chart follows light, dark and print; the hospitals differ in marker too, for readers who do not
tell the colours apart.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette without its yellow; in the page, --s0 ... --s6 hold these or their lighter kin.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, MUTED, RULE, PAPER = "#1d2731", "#5a6773", "#d9dee3", "#fefefe"
_VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper"} | {
    c: f"--s{i}" for i, c in enumerate(SERIES)
}

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedimaging",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.2,
}

Curve = Sequence[tuple[float, float | None]]


def loss_chart(curves: Mapping[int, Curve], label: str) -> Markup:
    """Training loss per round, one line per hospital (by its index in the colours)."""
    with rc_context(_STYLE):
        figure, axes = _axes(5.0, 2.9)
        for index, curve in curves.items():
            _line(axes, index, curve)
        axes.set_xlabel("round")
        axes.set_ylabel("training loss")
        axes.set_ylim(bottom=0)
        _whole_rounds(axes, curves.values(), first=1)
        return _svg(figure, "loss", label)


def validation_chart(curves: Mapping[int, Curve], mean: Curve, picked: float | None, metric: str, label: str) -> Markup:
    """The key metric on validation after 0, 1, ... rounds: a line per hospital, the weighted mean, the picked model."""
    with rc_context(_STYLE):
        figure, axes = _axes(5.0, 2.9)
        for index, curve in curves.items():
            _line(axes, index, curve, width=1.1)
        known = [(x, y) for x, y in mean if y is not None]
        axes.plot([x for x, _ in known], [y for _, y in known], color=INK, linewidth=2.4, zorder=4)
        if picked is not None:
            axes.axvline(picked, color=INK, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
            axes.plot(
                [x for x, _ in known if x == picked],
                [y for x, y in known if x == picked],
                "o",
                ms=8,
                mfc=PAPER,
                mec=INK,
                mew=2,
                zorder=5,
            )
            side = -4 if picked > max((x for x, _ in mean), default=0) / 2 else 4
            axes.annotate(
                "picked",
                (picked, 0.03),
                xycoords=("data", "axes fraction"),
                xytext=(side, 0),
                textcoords="offset points",
                ha="right" if side < 0 else "left",
                color=INK,
            )
        axes.set_xlabel("rounds trained")
        axes.set_ylabel(metric)
        _unit_limits(axes, [y for curve in (*curves.values(), mean) for _, y in curve if y is not None])
        _whole_rounds(axes, [*curves.values(), mean], first=0)
        return _svg(figure, "validation", label)


def learning_chart(curves: Mapping[int, Curve], metric: str, label: str) -> Markup:
    """The key metric on validation by rounds trained, one line for each model."""
    with rc_context(_STYLE):
        figure, axes = _axes(6.4, 3.2)
        for index, curve in curves.items():
            _line(axes, index, curve)
        axes.set_xlabel("rounds trained")
        axes.set_ylabel(metric)
        _unit_limits(axes, [y for curve in curves.values() for _, y in curve if y is not None])
        _whole_rounds(axes, curves.values(), first=0)
        return _svg(figure, "learning", label)


def roc_chart(curves: dict[int, dict[str, Any]], name: str, label: str) -> Markup:
    """Binned ROC curves of one class, a line per hospital; a marker at the operating point `point`, (fpr, tpr)."""
    with rc_context(_STYLE):
        figure, axes = _axes(2.9, 2.9)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        for index, curve in curves.items():
            axes.plot(curve["fpr"], curve["tpr"], color=_colour(index))
            if curve.get("point"):
                axes.plot(
                    *curve["point"],
                    MARKERS[index % len(MARKERS)],
                    ms=6.5,
                    color=_colour(index),
                    mec=PAPER,
                    mew=1,
                    zorder=4,
                )
        axes.set_xlabel("1 − specificity")
        axes.set_ylabel("sensitivity")
        _square(axes)
        return _svg(figure, name, label)


def reliability_chart(index: int, bins: Iterable[dict[str, Any]], name: str, label: str) -> Markup:
    """Reliability diagram of one hospital: how often the model was right, by its confidence."""
    known = [b for b in bins if None not in (b["confidence"], b["accuracy"])]
    with rc_context(_STYLE):
        figure, axes = _axes(2.9, 2.9)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        x, y = [b["confidence"] for b in known], [b["accuracy"] for b in known]
        axes.plot(x, y, color=_colour(index), linewidth=1)
        axes.scatter(
            x,
            y,
            s=40,
            marker=MARKERS[index % len(MARKERS)],
            color=_colour(index),
            edgecolor=PAPER,
            linewidth=1,
            zorder=3,
        )
        axes.set_xlabel("confidence")
        axes.set_ylabel("share correct")
        _square(axes)
        return _svg(figure, name, label)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.tick_params(length=2.5)
    return figure, axes


def _colour(index: int) -> str:
    return SERIES[index % len(SERIES)]


def _line(axes: Axes, index: int, curve: Curve, width: float = 1.5) -> None:
    """A hospital's series; a round without a figure leaves a gap."""
    y = [float("nan") if value is None else value for _, value in curve]
    marker = MARKERS[index % len(MARKERS)] if len(curve) <= 30 else None
    axes.plot([x for x, _ in curve], y, color=_colour(index), marker=marker, mec=PAPER, mew=0.6, linewidth=width)


def _whole_rounds(axes: Axes, curves: Iterable[Curve], first: int) -> None:
    last = max((x for curve in curves for x, _ in curve), default=first)
    axes.set_xlim(first - 0.3, max(last, first + 1) + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True, min_n_ticks=2))


def _unit_limits(axes: Axes, values: Sequence[float]) -> None:
    """The axis of a metric between 0 and 1 ends at 1 and starts at the tenth below its lowest value."""
    if values and min(values) >= 0 and max(values) <= 1:
        axes.set_ylim(max(0.0, int((min(values) - 0.02) * 10) / 10), 1.005)


def _square(axes: Axes) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """Renders a figure as an inline SVG element with the page's colours and fonts, its ids made unique by `name`."""
    buffer = StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', text)
    opening = Markup(
        '<svg class="plot" role="img" aria-label="{}" viewBox="{}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    text = str(opening.format(label, box.group(1) if box else "")) + text[text.index(">") + 1 :]
    text = re.sub(r'(?<=<g) id="[^"]*"', "", text)
    text = (
        text.replace(' id="', f' id="{name}-')
        .replace("url(#", f"url(#{name}-")
        .replace('xlink:href="#', f'xlink:href="#{name}-')
    )
    text = re.sub(r'font-family: [^;"]*', "font-family: var(--sans)", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return Markup(re.sub(r"\s*\n\s*", "\n", text))  # noqa: S704  drawn from numbers only; the label is escaped
