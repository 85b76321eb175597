"""From the results of all runs to the figures of the table and the page."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from fedimaging.compare import paired
from fedimaging.compare.paired import Estimate
from fedimaging.compare.runs import ALONE, LEFT_OUT, POOLED, Comparison, Result, without
from fedimaging.datasets.manifest import COVARIATES, SPLITS, Case
from fedimaging.errors import FedImagingError
from fedimaging.report.collect import metric_label
from fedimaging.tasks.statistics import MIN_CELL

_SEED = 0

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Measure:
    """The key metric as a measure of case rows: AUROC, or the mean of a value of each case."""

    name: str
    classes: list[str]
    multi_label: bool

    def of(self, cases: Sequence[Case], rows: Rows, seed: Sequence[int]) -> Estimate | None:
        """The measure of a model's rows on cases in the same order; None for too few. ``seed`` is of the resamples."""
        if not cases:
            return None
        patients = [case.patient for case in cases]
        if self.name == "auroc":
            names = self.classes[1:] if len(self.classes) == 2 and not self.multi_label else self.classes
            scores = np.array([[row["scores"][name] for name in names] for row in rows], dtype=float)
            positive = np.array([[name in case.class_names for name in names] for case in cases], dtype=bool)
            return paired.macro_auroc(scores, positive, patients, seed)
        values = np.array([self._value(case, row) for case, row in zip(cases, rows, strict=True)], dtype=float)
        defined = np.isfinite(values)
        kept = [patient for patient, known in zip(patients, defined, strict=True) if known]
        return paired.mean(values[defined], kept, seed)

    def _value(self, case: Case, row: dict[str, Any]) -> float:
        if self.name == "accuracy":
            scores = row["scores"]
            if self.multi_label:
                return float({name for name, score in scores.items() if score > 0.5} == set(case.class_names))
            return float(max(scores, key=lambda name: scores[name]) == case.label)
        value = row[self.name]
        return float("nan") if value is None else float(value)


def analyse(comparison: Comparison, results: Sequence[Result]) -> dict[str, Any]:
    """Everything that the table and the page show, in plain values."""
    return _Analysis(comparison, results).figures()


class _Analysis:
    def __init__(self, comparison: Comparison, results: Sequence[Result]) -> None:
        self.comparison, self.results = comparison, results
        task = comparison.settings.task
        settings = task.settings
        self.measure = Measure(
            task.key_metric, list(getattr(settings, "classes", [])), bool(getattr(settings, "multi_label", False))
        )
        self.seeds = sorted({result.run.seed for result in results})
        self.cases = {site: self._shared_cases(site) for site in comparison.sites}
        self.by_row: dict[str, dict[int, Result]] = defaultdict(dict)
        for result in results:
            self.by_row[result.run.row][result.run.seed] = result
        self.rows = [
            ALONE,
            *([POOLED] if comparison.pooled else []),
            *comparison.jobs,
            *([LEFT_OUT] if comparison.leave_one_out else []),
        ]

    def _shared_cases(self, site: str) -> list[Case]:
        """The test cases that every model was judged on, in one order."""
        listed = {case.image: case for case in self.comparison.datasets[site].manifest.test}
        names = [{row["image"] for row in result.cases[site]} for result in self.results]
        shared = set(listed).intersection(*names)
        if not shared:
            raise FedImagingError(f"{site}: no test case that every model was judged on; delete the results, run again")
        return [listed[name] for name in sorted(shared)]

    def _members(self, row: str) -> dict[str, str]:
        """The row of the runs whose model a row of the table stands for, by site."""
        if row == LEFT_OUT:
            return {site: without(site) for site in self.comparison.sites}
        return {site: site if row == ALONE else row for site in self.comparison.sites}

    def _model(self, row: str, site: str, seed: int) -> Result:
        """The run whose model a row stands for at a site."""
        return self.by_row[self._members(row)[site]][seed]

    def _estimates(
        self, row: str, site: str, chosen: Callable[[Case], bool] = lambda case: True
    ) -> list[Estimate] | None:
        """One estimate a seed, of the row's models on a site's chosen cases; None where they are too few."""
        cases = [case for case in self.cases[site] if chosen(case)]
        found = []
        for seed in self.seeds:
            rows = {case["image"]: case for case in self._model(row, site, seed).cases[site]}
            estimate = self.measure.of(cases, [rows[case.image] for case in cases], self._draws(site))
            if estimate is None:
                return None
            found.append(estimate)
        return found

    def _draws(self, site: str) -> list[int]:
        """The seed of a hospital's resamples: one for all models, another for each hospital."""
        return [_SEED, 1 + self.comparison.sites.index(site)]

    def figures(self) -> dict[str, Any]:
        sites = self.comparison.sites
        table = {row: {site: self._estimates(row, site) for site in sites} for row in self.rows}
        judged = [site for site in sites if table[ALONE][site] is not None]
        macro = {row: self._macro([table[row][site] for site in judged]) for row in self.rows}
        means = {
            row: {site: paired.mean_over_seeds(found) for site, found in by_site.items() if found is not None}
            for row, by_site in table.items()
        }
        others = self._others()
        federated = list(self.comparison.jobs)
        single = [row for row in self.rows if row not in (ALONE, LEFT_OUT)]
        validation = {row: self._validation(row) for row in single}
        chosen = max(federated, key=lambda row: -1.0 if validation[row] is None else float(validation[row] or 0))
        return {
            "metric": {"name": self.measure.name, "label": metric_label(self.measure.name)},
            "sites": sites,
            "judged": judged,
            "cases": {site: self._counts(site) for site in sites},
            "seeds": self.seeds,
            "rounds": self.comparison.rounds,
            "steps": self.comparison.steps * self.comparison.rounds,
            "rows": {
                row: {
                    "kind": {ALONE: "alone", POOLED: "pooled", LEFT_OUT: "left_out"}.get(row, "federated"),
                    "strategy": self._strategy(row),
                    "sites": {site: _shown(table[row][site]) for site in sites},
                    "macro": _shown(macro[row]),
                    "all_cases": _shown(self._all_cases(row, judged)),
                    "validation": validation.get(row),
                    **self._cost(row),
                }
                for row in self.rows
            },
            "chosen": chosen,
            "others": others,
            "differences": [
                self._difference(row, base, means, macro, judged)
                for row in self.rows
                for base in self.rows
                if row not in (ALONE, POOLED) and base in (ALONE, POOLED)
            ],
            "verdicts": {row: self._verdict(row, means, macro, others, judged) for row in federated},
            "subgroups": self._subgroups([ALONE, *([POOLED] if self.comparison.pooled else []), chosen]),
            "curves": {row: self._curve(row) for row in single},
            "settings": self.comparison.settings.to_dict(),
            "changes": self.comparison.changes,
        }

    def _macro(self, by_site: Sequence[list[Estimate] | None]) -> list[Estimate] | None:
        known = [found for found in by_site if found is not None]
        if not known:
            return None
        return [paired.mean_over_sites([found[i] for found in known]) for i in range(len(self.seeds))]

    def _all_cases(self, row: str, judged: Sequence[str]) -> list[Estimate] | None:
        """The measure over the test cases of all hospitals put together."""
        found = []
        for seed in self.seeds:
            cases: list[Case] = []
            rows: Rows = []
            for site in judged:
                by_image = {case["image"]: case for case in self._model(row, site, seed).cases[site]}
                cases += [case.model_copy(update={"patient": f"{site}/{case.patient}"}) for case in self.cases[site]]
                rows += [by_image[case.image] for case in self.cases[site]]
            estimate = self.measure.of(cases, rows, [_SEED, 0])
            if estimate is None:
                return None
            found.append(estimate)
        return found or None

    def _others(self) -> dict[str, dict[str, Any]]:
        """Each hospital's own model on every hospital."""
        shown: dict[str, dict[str, Any]] = {}
        for owner in self.comparison.sites:
            shown[owner] = {}
            for site in self.comparison.sites:
                found = []
                for seed in self.seeds:
                    rows = {case["image"]: case for case in self.by_row[owner][seed].cases[site]}
                    ordered = [rows[case.image] for case in self.cases[site]]
                    found.append(self.measure.of(self.cases[site], ordered, self._draws(site)))
                known = [estimate for estimate in found if estimate is not None]
                shown[owner][site] = _shown(known if len(known) == len(found) else None)
        return shown

    def _difference(
        self,
        row: str,
        base: str,
        means: Mapping[str, Mapping[str, Estimate]],
        macro: Mapping[str, list[Estimate] | None],
        judged: Sequence[str],
    ) -> dict[str, Any]:
        """A row less another, by hospital and in the mean, with intervals and p-values."""
        sites = {site: _tested(means[row][site].minus(means[base][site])) for site in judged}
        one, other = macro[row], macro[base]
        whole = None
        if one is not None and other is not None:
            whole = _tested(paired.mean_over_seeds(one).minus(paired.mean_over_seeds(other)))
        return {"row": row, "base": base, "sites": sites, "macro": whole}

    def _verdict(
        self,
        row: str,
        means: Mapping[str, Mapping[str, Estimate]],
        macro: Mapping[str, list[Estimate] | None],
        others: Mapping[str, Mapping[str, Any]],
        judged: Sequence[str],
    ) -> dict[str, Any]:
        """Whether the federation pays: near the pooled model, no worse than any foreign one, nobody loses."""
        one, pooled = macro[row], macro.get(POOLED)
        share = None
        if one is not None and pooled is not None:
            share = paired.mean_over_seeds(one).value / paired.mean_over_seeds(pooled).value
        behind = [
            {"site": site, "owner": owner}
            for site in judged
            for owner in others
            if owner != site and others[owner][site] and others[owner][site]["value"] > means[row][site].value
        ]
        losers = []
        for site in judged:
            interval = means[row][site].minus(means[ALONE][site]).interval()
            if interval is not None and interval[1] < 0:
                losers.append(site)
        return {"share_of_pooled": None if share is None else round(share, 4), "behind": behind, "losers": losers}

    def _subgroups(self, rows: Sequence[str]) -> list[dict[str, Any]]:
        """The measure by covariate at each hospital; a covariate with a small group is left out whole."""
        found = []
        for site in self.comparison.sites:
            for covariate in COVARIATES:
                values = [getattr(case, covariate) for case in self.cases[site]]
                groups = sorted(set(values) - {None})
                if len(groups) < 2 or min(values.count(group) for group in groups) < MIN_CELL:
                    continue
                for group in groups:
                    figures = {
                        row: _shown(self._estimates(row, site, lambda c, v=covariate, g=group: getattr(c, v) == g))  # type: ignore[misc]
                        for row in rows
                    }
                    if any(figures.values()):
                        found.append(
                            {"site": site, "covariate": covariate, "group": group, "cases": values.count(group)}
                            | {"rows": figures}
                        )
        return found

    def _curve(self, row: str) -> list[tuple[int, float | None]]:
        """The key metric on validation after 0, 1, ... rounds, in the mean over seeds."""
        curves = [result.curve for result in self.by_row[row].values()]
        return [
            (after, None if any(value is None for value in values) else fmean(v for v in values if v is not None))
            for after, values in enumerate(zip(*curves, strict=True))
        ]

    def _validation(self, row: str) -> float | None:
        values = [result.validation for result in self.by_row[row].values()]
        known = [value for value in values if value is not None]
        return round(fmean(known), 4) if known and len(known) == len(values) else None

    def _strategy(self, row: str) -> dict[str, Any] | None:
        if row in (ALONE, POOLED):
            return None
        member = next(iter(self._members(row).values()))
        settings = next(iter(self.by_row[member].values())).run.settings["training"]
        return {**settings["strategy"], "optimizer": settings["optimizer"], "learning_rate": settings["learning_rate"]}

    def _cost(self, row: str) -> dict[str, Any]:
        """Seconds and bytes in the mean over seeds; of all models of the row together."""
        rows = set(self._members(row).values())
        per_seed = [[self.by_row[r][seed] for r in rows] for seed in self.seeds]
        return {
            "seconds": round(fmean(sum(result.seconds for result in group) for group in per_seed), 1),
            "bytes": round(fmean(sum(result.bytes for result in group) for group in per_seed)),
        }

    def _counts(self, site: str) -> dict[str, Any]:
        manifest = self.comparison.datasets[site].manifest
        return {split: len(manifest.split(split)) for split in SPLITS} | {"judged": len(self.cases[site])}


def _shown(estimates: Sequence[Estimate] | None) -> dict[str, Any] | None:
    """Mean over seeds with its interval, and the spread of the seeds."""
    if not estimates:
        return None
    mean = paired.mean_over_seeds(estimates)
    values = [estimate.value for estimate in estimates]
    return {
        "value": round(mean.value, 4),
        "ci": mean.interval(),
        "sd": round(statistics.stdev(values), 4) if len(values) > 1 else None,
        "seeds": [round(value, 4) for value in values],
    }


def _tested(difference: Estimate) -> dict[str, Any]:
    p = difference.p_value()
    return {
        "value": round(difference.value, 4),
        "ci": difference.interval(),
        "p": None if p is None else float(f"{p:.3g}"),
    }
