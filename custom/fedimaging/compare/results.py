"""The comparison of jobs that ran where nobody holds all data, from what their sites reported of each model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedimaging.compare.runs import ALONE, BUDGET
from fedimaging.errors import FedImagingError
from fedimaging.report.collect import collect
from fedimaging.report.evaluation import macro_mean, to_figure, to_mapping
from fedimaging.settings import parse
from fedimaging.training.settings import TrainingSettings

_BEST = "best"
_ABSENT = {"withheld": "too few cases", "not_given": "not given"}


@dataclass(frozen=True)
class JobResult:
    """A finished job as the submitter downloaded it, or a simulation's workspace.

    Attributes:
        report: as :func:`fedimaging.report.collect.collect` gives it.
    """

    path: Path
    report: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> JobResult:
        """Raises FedImagingError if the folder holds no run of ours, or one without figures on test cases."""
        result = cls(path, collect(path))
        if not result.best:
            raise FedImagingError(
                f"{path}: no site reported on the best model; only a job that got there can be compared"
            )
        return result

    @property
    def name(self) -> str:
        return str(self.report["job"]["name"])

    @property
    def left_out(self) -> str:
        return self.report["job"]["leave_out"] or ""

    @property
    def alone(self) -> bool:
        """Whether each site trained by itself, and is judged by its own model."""
        return bool(self.report["job"]["strategy"].get("name") == "alone")

    @property
    def row(self) -> str:
        """The row of the table that the job's figures are of."""
        return ALONE if self.alone else self.name

    @property
    def title(self) -> str:
        return f"{self.name} without {self.left_out}" if self.left_out else self.name

    @property
    def best(self) -> dict[str, dict[str, Any]]:
        """What each site reported of the best model, on its test cases."""
        best: dict[str, dict[str, Any]] = self.report["cross_site"].get(_BEST, {})
        return best

    @property
    def judged(self) -> dict[str, dict[str, Any]]:
        """The part of it that the row is of: with a site left out, that site's alone."""
        return {site: e for site, e in self.best.items() if site == self.left_out or not self.left_out}

    @property
    def own_models(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What each site reported of each site's own model, by owner."""
        return {name: found for name, found in self.report["cross_site"].items() if name in self.report["sites"]}

    @property
    def settings(self) -> dict[str, Any]:
        """What the rows of a fair comparison have in common, besides the task; what a job leaves out is its default."""
        job, client = self.report["job"], to_mapping(self.report["settings"].get("client"))
        executors = client.get("executors") or [{}]
        arguments = to_mapping(to_mapping(to_mapping(executors[0]).get("executor")).get("args"))
        training = parse(TrainingSettings, to_mapping(arguments.get("training")), f"{self.path}: training")
        return {
            "network": job["network"],
            "rounds": job["rounds"],
            "seed": job["seed"],
            "start_from": job["start_from"],
            **{f"training.{key}": getattr(training, key) for key in BUDGET},
        }


def analyse_results(paths: Sequence[Path]) -> dict[str, Any]:
    """Everything that the table and the page of finished jobs show, in plain values.

    A row is a job, judged by its best model. Training alone is one row: each site's own model at that site. Jobs of one
    name that leave out a site each are one row too: each site's figure is of the model that was trained without it.

    Raises:
        FedImagingError: a folder is no finished job, two are of one row and site, or their figures are not of one kind.
    """
    results = [JobResult.read(path) for path in paths]
    _check(results)
    key = results[0].report["key_metric"]
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for result in sorted(results, key=lambda result: (not result.alone, bool(result.left_out))):
        rows.setdefault(result.row, {}).update(result.judged)
    sites = sorted({site for result in results for site in result.best})
    values = {row: {s: _figure(found.get(s), key["name"]) for s in sites} for row, found in rows.items()}
    left_out = {result.row for result in results if result.left_out}
    whole = [row for row in rows if row not in left_out] or list(rows)
    shared = [site for site in sites if all(_has(values[row][site]) for row in whole)]
    return {
        "metric": key,
        "sites": sites,
        "judged": shared,
        "rows": {
            row: {
                "kind": "alone" if row == ALONE else "left_out" if row in left_out else "federated",
                "personal": any(evaluation["personal"] for evaluation in found.values()),
                "sites": values[row],
                "macro": _macro(found, shared, key["name"]),
            }
            for row, found in rows.items()
        },
        "others": {
            owner: {site: _figure(found.get(site), key["name"]) for site in sites}
            for result in results
            for owner, found in result.own_models.items()
        },
        "cautions": [*_problems(results), *_differences(results), *_other_cases(results, sites)],
        "sources": [{"folder": str(result.path), "job": result.title} for result in results],
    }


def _check(results: Sequence[JobResult]) -> None:
    if taken := next((result for result in results if result.name == ALONE and not result.alone), None):
        raise FedImagingError(
            f"{taken.path}: {ALONE} is the row of the hospitals' own models; give the job another name in meta.json"
        )
    first = results[0]
    for result in results[1:]:
        for what in ("key_metric", "task"):
            one, other = ((r.report if what == "key_metric" else r.report["job"])[what] for r in (first, result))
            if one != other:
                raise FedImagingError(
                    f"{result.path}: another {what.replace('_', ' ')} than in {first.path}; figures of the two cannot "
                    "stand in one table"
                )
    for (row, site), count in Counter((result.row, result.left_out) for result in results).items():
        if count > 1:
            named = "jobs of training alone" if row == ALONE else f"jobs {row}"
            raise FedImagingError(
                f"compare --results: {count} {named}{f' without {site}' if site else ''}; give one of each"
            )
    for row in {result.row for result in results if result.left_out}:
        if any(result.row == row and not result.left_out for result in results):
            raise FedImagingError(
                f"compare --results: jobs {row} with and without a site left out; give the job that leaves one out a "
                "name of its own in meta.json"
            )


def _figure(evaluation: dict[str, Any] | None, key: str) -> dict[str, Any] | None:
    """A site's figure with the interval that the site made; None where it was not asked or did not answer.

    Returns:
        {"value", "ci", "status", "absent": in words, why there is no value, or None; "cases"}
    """
    if evaluation is None:
        return None
    figure = evaluation["metrics"].get(key, to_figure({}, key))
    return {**figure, "absent": _ABSENT.get(figure["status"]), "cases": evaluation["cases"]}


def _has(figure: dict[str, Any] | None) -> bool:
    return figure is not None and figure["value"] is not None


def _macro(found: dict[str, dict[str, Any]], shared: Sequence[str], key: str) -> dict[str, Any] | None:
    """The mean over the sites that all rows share; None where this row lacks one of them."""
    if not shared or not all(_has(_figure(found.get(site), key)) for site in shared):
        return None
    return macro_mean({site: found[site] for site in shared}, key)


def _problems(results: Iterable[JobResult]) -> list[str]:
    return [f"{result.title}: {problem}" for result in results for problem in result.report["problems"]]


def _differences(results: Sequence[JobResult]) -> list[str]:
    """Where the jobs differ in more than their strategy."""
    first, cautions = results[0], []
    for result in results[1:]:
        unequal = [name for name, value in result.settings.items() if first.settings[name] != value]
        if unequal:
            cautions.append(
                f"{result.title} and {first.title} differ in {', '.join(unequal)}: the table compares that too."
            )
    return cautions


def _other_cases(results: Sequence[JobResult], sites: Sequence[str]) -> list[str]:
    """Where a site judged the jobs on other test cases, as far as their number tells."""
    cautions = []
    for site in sites:
        counts = {result.title: result.best[site]["cases"] for result in results if site in result.best}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{name} on {'too few' if n is None else n}" for name, n in counts.items())
            cautions.append(f"The test cases of {site} changed between the jobs: it judged {said}.")
    return cautions
