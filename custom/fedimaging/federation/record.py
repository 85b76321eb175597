"""The record of a job at the server: who took part, what it cost, which model was best."""

import json
import math
import re
from pathlib import Path
from typing import Any

from nvflare.app_common.abstract.fl_model import FLModel

from fedimaging.federation.protocol import REPORT, ROUNDS_FILE
from fedimaging.federation.selection import vote


class RunRecord:
    """What is written of a job into the server's folder of it: ``rounds.jsonl``, and scalars for TensorBoard.

    A line of ``rounds.jsonl`` is an event: ``start``, ``round``, ``refused`` and ``late`` (a site's answer), ``final``
    (the last model's validation), ``end``, or ``failed``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, event: str, **figures: Any) -> None:
        """Appends an event."""
        with (self.folder / ROUNDS_FILE).open("a") as file:
            file.write(json.dumps({"event": event, **figures}, allow_nan=False) + "\n")

    def add_scalars(self, key_metric: str, figures: dict[str, Any]) -> None:
        """Has TensorBoard show a round's key metric, and each site's loss and metrics."""
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.folder / "tb_events")) as writer:
            if figures["key_metric"] is not None:
                writer.add_scalar(f"global/{key_metric}", figures["key_metric"], figures["round"])
            for site, contributed in figures["sites"].items():
                writer.add_scalar(f"{site}/train_loss", contributed["loss"], figures["round"])
                for name, value in contributed["metrics"].items():
                    writer.add_scalar(f"{site}/val_{name}", value, figures["round"])


def contribution(result: FLModel, key_metric: str) -> dict[str, Any]:
    """A site's contribution to a round as it is recorded; what is no finite number is left out."""
    report = result.meta.get(REPORT) or {}
    metrics = finite_numbers(result.metrics)
    figures = finite_numbers(report)
    ballot = vote(metrics, key_metric)
    return {
        "cases": int(figures.get("cases", 0)),
        "seconds": figures.get("seconds"),
        "loss": figures.get("loss", 0.0),
        "epoch_losses": [float(v) for v in report.get("epoch_losses", []) if _is_finite(v)],
        "metrics": metrics,
        "votes": ballot[1] if ballot else 0,
        "skipped": int(figures.get("skipped", 0)),
        "peak_memory": int(figures.get("peak_memory", 0)),
        "fedimaging": _package(report.get("fedimaging")),
    }


def finite_numbers(values: Any) -> dict[str, Any]:
    """The finite numbers of a mapping that came from a site, by name."""
    items = values.items() if isinstance(values, dict) else ()
    return {str(name): value for name, value in items if _is_finite(value)}


def _package(said: Any) -> dict[str, str] | None:
    """The version and hash of the package that a site says it runs; None where it says nothing of that form."""
    patterns = {"version": r"[0-9A-Za-z.+-]{1,64}", "sha256": r"[0-9a-f]{64}"}
    known = isinstance(said, dict) and all(re.fullmatch(p, str(said.get(name))) for name, p in patterns.items())
    return {name: str(said[name]) for name in patterns} if known else None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
