"""Which global model is the best: the sites vote with their validation cases."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def vote(metrics: Mapping[str, Any], key_metric: str) -> tuple[float, int] | None:
    """A site's (metric, number of validation cases), or None if its metric is undefined."""
    value, cases = metrics.get(key_metric), metrics.get("cases")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    if isinstance(cases, bool) or not isinstance(cases, int | float) or not 0 < cases < 2**31:
        return None
    return float(value), int(cases)


@dataclass
class ModelSelection:
    """The best of the models judged so far.

    The index of a model is the round that it arrived in; the last aggregate has the number of rounds as its index.
    """

    key_metric: str
    best_index: int | None = None
    best_value: float | None = None

    def judge(self, index: int, metrics: Mapping[str, Mapping[str, Any]]) -> tuple[float | None, bool]:
        """The mean over the sites that vote, weighted by their votes, and whether it is the best so far.

        Without a single vote the value is None, and the newest model counts as the best only if none was voted on.
        """
        votes = [v for v in (vote(site, self.key_metric) for site in metrics.values()) if v is not None]
        if not votes:
            if self.best_value is None:
                self.best_index = index
                return None, True
            return None, False
        value = sum(metric * cases for metric, cases in votes) / sum(cases for _, cases in votes)
        better = self.best_value is None or value > self.best_value
        if better:
            self.best_index, self.best_value = index, value
        return value, better
