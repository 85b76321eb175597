"""The runs of a comparison: each is a file of results, named by the hash of everything that it depends on."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedimaging.datasets.manifest import SPLITS, Manifest
from fedimaging.datasets.site import MANIFEST_FILE, Dataset
from fedimaging.errors import FedImagingError, Reason
from fedimaging.federation.job import JobFolder
from fedimaging.federation.protocol import ROUNDS_FILE, SIMULATED_JOB_ID, SITE_REPORT_FILE
from fedimaging.federation.selection import ModelSelection
from fedimaging.simulator import find_sites, simulate
from fedimaging.training.loop import Site, case_results, plan_batches
from fedimaging.training.rounds import run_rounds
from fedimaging.training.settings import JobSettings
from fedimaging.training.strategies import DEFAULT_STRATEGY, State
from fedimaging.version import package_hash

ALONE = "alone"
"""row of the sites' own models, each judged on its own test cases"""
POOLED = "pooled"
LEFT_OUT = "leave_one_out"
"""row of the models that were trained without one site each, judged on that site's test cases"""
BUDGET = ("epochs", "batch_size", "max_batches", "schedule")
"""settings of training that all rows must share"""


@dataclass(frozen=True)
class Run:
    """One model, or one federation's model, of one seed.

    Attributes:
        kind: "local" (one site's cases), "pooled" (all sites' cases in one place) or "federated".
        row: the site, "pooled", the job's name, or "without_<site>" for the first job without a site.
        steps: optimizer steps a round, of all sites together.
    """

    kind: str
    row: str
    seed: int
    rounds: int
    steps: int
    settings: dict[str, Any]
    data: dict[str, str]
    """digest of each site's manifest"""
    leave_out: str = ""
    """the site that does not train"""

    @property
    def key(self) -> str:
        """Hash of all that the run depends on, the sources of this package among it."""
        text = json.dumps({"fedimaging": package_hash(), **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        return f"{self.row}{' alone' if self.kind == 'local' else ''}, seed {self.seed}"


@dataclass
class Result:
    """What a run gave.

    Attributes:
        curve: the key metric on validation after 0, 1, ... rounds.
        picked: the rounds after which it was best, and that value.
        bytes: what crossed the network: models, or for the pooled run the images.
        cases: by site, one row for each test case as the task gives it.
    """

    run: Run
    curve: list[float | None]
    picked: int | None
    validation: float | None
    seconds: float
    bytes: int
    cases: dict[str, list[dict[str, Any]]] = field(repr=False)

    def write(self, folder: Path) -> None:
        part = folder / f"{self.run.key}.part"
        part.write_text(json.dumps(asdict(self)))
        part.replace(folder / f"{self.run.key}.json")

    @classmethod
    def read(cls, folder: Path, run: Run) -> Result | None:
        """The stored result of a run; None if there is none, or not a whole one."""
        try:
            stored = json.loads((folder / f"{run.key}.json").read_text())
            return cls(**stored | {"run": run})
        except (OSError, ValueError, TypeError):
            return None


def without(site: str) -> str:
    """The row of the runs that leave out a site."""
    return f"without_{site}"


def _title(strategy: Mapping[str, Any]) -> str:
    """A strategy's name with its settings, as in ``fedprox,mu=0.1``."""
    return ",".join([str(strategy.get("name")), *(f"{key}={strategy[key]}" for key in strategy if key != "name")])


class Comparison:
    """The runs that a comparison needs, planned from job folders and a data root; nothing is trained yet.

    Args:
        jobs: job folders that differ in their strategy; the first one's settings are the baselines' too.
        data: data root.
        seeds: of initial weights, order and augmentation.
        changes: settings changed for all runs, as ``simulate --set`` does.
        pooled: whether the sites' cases may be put together.
        leave_one_out: whether the first job runs once more for each site, without it.
        strategies: settings of strategies with each of which the first job runs once more.

    Raises:
        FedImagingError: the jobs differ in what must be equal, or a site's dataset cannot serve them.
    """

    def __init__(
        self,
        jobs: Sequence[Path],
        data: Path,
        seeds: Sequence[int],
        changes: Mapping[str, Any],
        *,
        pooled: bool = True,
        leave_one_out: bool = False,
        strategies: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.data, self.changes, self.pooled, self.leave_one_out = data, dict(changes), pooled, leave_one_out
        self.jobs = {job.name: job for job in map(JobFolder, jobs)}
        self.changes_of = dict.fromkeys(self.jobs, self.changes)
        for strategy in strategies:
            job = JobFolder(jobs[0])
            name = f"{job.name}+{_title(strategy)}"
            self.jobs[name], self.changes_of[name] = job, {**changes, "training.strategy": dict(strategy)}
        if len(self.jobs) < len(jobs) + len(strategies):
            raise FedImagingError(
                "compare: two job folders have the same name, or a strategy is given twice; give each once"
            )
        settings: dict[str, JobSettings] = {}
        for name, job in self.jobs.items():
            job.override(self.changes_of[name])
            settings[name] = job.settings()
            if job.leave_out:
                raise FedImagingError(
                    f"compare: {name} leaves out {job.leave_out}; --leave-one-out does so for each site"
                )
        first = next(iter(settings))
        self.settings = settings[first]
        self.rounds = self.jobs[first].rounds
        for name in settings:
            self._check_equal(first, name, settings)
        self.datasets = self._find(self.settings)
        rows = {ALONE, POOLED, LEFT_OUT, *self.datasets, *map(without, self.datasets)}
        if taken := sorted(rows & set(self.jobs)):
            raise FedImagingError(f"compare: {taken[0]} is a row of its own; give the job another name in meta.json")
        if leave_one_out:
            self._check_leave_one_out(self.jobs[first])
        self.steps = sum(self._steps(dataset) for dataset in self.datasets.values())
        self.runs = [run for seed in seeds for run in self._plan(seed, settings)]

    @property
    def sites(self) -> list[str]:
        return list(self.datasets)

    def _check_equal(self, first: str, name: str, settings: Mapping[str, JobSettings]) -> None:
        one, other = settings[first], settings[name]
        pairs = {
            "rounds": (self.rounds, self.jobs[name].rounds),
            "dataset": (one.dataset, other.dataset),
            "task": (one.task.settings, other.task.settings),
            "network": (one.network, other.network),
            **{f"training.{key}": (getattr(one.training, key), getattr(other.training, key)) for key in BUDGET},
        }
        for what, (a, b) in pairs.items():
            if a != b:
                raise FedImagingError(
                    f"compare: {first} and {name} differ in {what}, so that a comparison would not be one of "
                    f"strategies; make it equal with --set {what}=..."
                )

    def _check_leave_one_out(self, job: JobFolder) -> None:
        there = len(self.datasets) - 1
        if there < job.min_clients:
            raise FedImagingError(
                f"--leave-one-out: sites left to train at: {there}, and {job.name} needs {job.min_clients}; add "
                f"sites or --set min_clients={there}"
            )
        if job.workflow.strategy.personal:
            raise FedImagingError(
                f"--leave-one-out: {job.name}, the first job, judges sites by models of their own, and one left out "
                "has none; name another first"
            )

    def _find(self, settings: JobSettings) -> dict[str, Dataset]:
        found = {}
        for site in find_sites(self.data, settings.dataset):
            path = self.data / site / settings.dataset / MANIFEST_FILE
            manifest = Manifest.read(path)
            manifest.check_files(path.parent, path)
            settings.task.check(manifest, str(path))
            found[site] = Dataset(settings.dataset, site, path.parent, path, manifest, "--data")
        if len(found) < 2:
            raise FedImagingError(f"{self.data}: one site only, {next(iter(found))}; a comparison needs two or more")
        return found

    def _steps(self, dataset: Dataset) -> int:
        training = self.settings.training
        return len(plan_batches(len(dataset.manifest.training), training)) * training.epochs

    def _plan(self, seed: int, settings: Mapping[str, JobSettings]) -> list[Run]:
        data = {site: dataset.manifest.digest() for site, dataset in self.datasets.items()}
        base = self.settings.to_dict()
        base["training"]["strategy"] = dict(DEFAULT_STRATEGY)

        def run(kind: str, row: str, raw: dict[str, Any], leave_out: str = "") -> Run:
            steps = self.steps - (self._steps(self.datasets[leave_out]) if leave_out else 0)
            return Run(kind, row, seed, self.rounds, steps, copy.deepcopy(raw) | {"seed": seed}, data, leave_out)

        local = [run("local", site, base) for site in self.datasets]
        federated = [run("federated", name, job.to_dict()) for name, job in settings.items()]
        first = next(iter(settings.values())).to_dict()
        left_out = (
            [run("federated", without(site), first, site) for site in self.datasets] if self.leave_one_out else []
        )
        return [*local, *([run("pooled", POOLED, base)] if self.pooled else []), *federated, *left_out]


class Runner:
    """Runs what is not yet in a folder.

    Args:
        folder: where results are kept.
        report: told of progress of a run in this process, as a site tells it.
    """

    def __init__(
        self, comparison: Comparison, folder: Path, report: Callable[[dict[str, Any]], None] = lambda event: None
    ) -> None:
        self._comparison, self._folder, self._report = comparison, folder, report

    def is_done(self, run: Run) -> bool:
        return Result.read(self._folder, run) is not None

    def result(self, run: Run) -> Result:
        """The result of a run: read if it is there, else made and stored.

        Raises:
            FedImagingError: the run failed; the message says why.
        """
        done = Result.read(self._folder, run)
        if done is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                done = self._federated(run) if run.kind == "federated" else self._centralised(run)
            except FedImagingError as error:
                raise FedImagingError(f"{run.title}: {error}", error.reason) from None
            done.write(self._folder)
        return done

    def _centralised(self, run: Run) -> Result:
        start = time.monotonic()
        datasets = self._comparison.datasets
        dataset = datasets[run.row] if run.kind == "local" else pool(datasets, self._comparison.data)
        site = Site(JobSettings(run.settings), dataset, report=self._report)
        selection = ModelSelection(site.task.key_metric)
        curve: list[float | None] = []
        best: State = {}

        def judge(weights: State) -> None:
            nonlocal best
            value, better = selection.judge(len(curve), {dataset.site: site.validate(weights)})
            curve.append(value)
            if better:
                best = {name: tensor.clone() for name, tensor in weights.items()}

        weights: State = {}
        for record in run_rounds([site], run.rounds, steps=run.steps):
            judge(record.arrived)
            weights = record.weights
        judge(weights)
        seconds = time.monotonic() - start
        cases = {}
        for name, there in datasets.items():
            site_there = Site(self._comparison.settings, there, report=self._report)
            cases[name] = case_results(site_there, site_there.outcomes(best, "test"), "test")
        moved = 0 if run.kind == "local" else _image_bytes(site, dataset)
        return Result(run, curve, selection.best_index, selection.best_value, round(seconds, 1), moved, cases)

    def _federated(self, run: Run) -> Result:
        comparison = self._comparison
        workspace = self._folder / f"{run.row}-seed{run.seed}"
        name = next(iter(comparison.jobs)) if run.leave_out else run.row
        changes = comparison.changes_of[name] | {"seed": run.seed}
        if run.leave_out:
            changes["leave_out"] = run.leave_out
        path = comparison.jobs[name].path
        outcome = simulate(path, comparison.data, workspace, changes=changes, sites=comparison.sites)
        if outcome.errors:
            raise FedImagingError("; ".join(outcome.errors), Reason.INTERNAL)
        cases = {}
        for site in comparison.sites:
            own = json.loads((workspace / site / SIMULATED_JOB_ID / SITE_REPORT_FILE).read_text())
            cases[site] = own["models"]["SRV_best"]["cases"]
        lines = (workspace / "server" / SIMULATED_JOB_ID / ROUNDS_FILE).read_text().splitlines()
        events = [json.loads(line) for line in lines]
        rounds = [event for event in events if event["event"] == "round"]
        curve = [event["key_metric"] for event in events if event["event"] in ("round", "final")]
        end = outcome.end or {}
        moved = sum(event["bytes_in"] + event["bytes_out"] for event in rounds)
        shutil.rmtree(workspace)
        return Result(run, curve, end["best_round"], end["best_key_metric"], outcome.seconds, moved, cases)


def pool(datasets: Mapping[str, Dataset], root: Path) -> Dataset:
    """All sites' cases as one dataset whose paths are relative to the data root."""
    first = next(iter(datasets.values()))

    def moved(site: str, dataset: Dataset, split: str) -> list[dict[str, Any]]:
        below = dataset.root.relative_to(root)
        segmentation = dataset.manifest.task == "segmentation"
        return [
            case.model_dump(exclude_none=True)
            | {"image": str(below / case.image), "patient": f"{site}/{case.patient}"}
            | ({"label": str(below / str(case.label))} if segmentation else {})
            for case in dataset.manifest.split(split)
        ]

    header = first.manifest.model_dump(include={"name", "modality", "task", "classes", "multi_label"})
    header["classes"] = list(dict.fromkeys(name for dataset in datasets.values() for name in dataset.manifest.classes))
    splits = {s: [case for site, d in datasets.items() for case in moved(site, d, s)] for s in SPLITS}
    manifest = Manifest.parse(header | splits, root)
    return Dataset(first.name, POOLED, root, root, manifest, "--data")


def _image_bytes(site: Site, dataset: Dataset) -> int:
    """Size of the files that training and picking a model read: what pooling would move."""
    files = [
        dataset.root / name
        for split in ("training", "validation")
        for case in dataset.manifest.split(split)
        for name in site.task.files(case)
    ]
    return sum(f.stat().st_size for path in files for f in (path.iterdir() if path.is_dir() else [path]))
