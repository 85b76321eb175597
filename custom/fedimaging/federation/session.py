"""A site's part in one job: what the executor and the Client API loop share in memory, in one process."""

import json
import logging
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fedimaging import __version__
from fedimaging.datasets.site import resolve
from fedimaging.errors import FedImagingError, Reason
from fedimaging.federation.protocol import PROGRESS_FILE, SERVER_MODEL, SITE_REPORT_FILE, STRATEGY_FILE
from fedimaging.tasks.statistics import Groups, withhold
from fedimaging.training.loop import AbortedError, RoundResult, Site, case_results, exchanged
from fedimaging.training.settings import JobSettings
from fedimaging.version import package_hash

log = logging.getLogger(__name__)

_REPORT_INTERVAL = 0.5
_NAMES_CASES = (Reason.BAD_MANIFEST, Reason.UNREADABLE_IMAGES)


class Session:
    """Holds the site's data and network from its first task on, and answers tasks without knowing FLARE's messages.

    Args:
        settings: the job's, not yet validated.
        site: the site's name.
        local: the site's folder with ``datasets.yml``.
        run_dir: where the site keeps its own records of this job.
    """

    current: "Session | None" = None

    def __init__(self, settings: Mapping[str, Any], site: str, local: Path, run_dir: Path) -> None:
        self._raw, self._site_name, self._local, self._run_dir = settings, site, local, run_dir
        self._site: Site | None = None
        self._settings: JobSettings | None = None
        self._manifest_hash: str | None = None
        self._last_state: dict[str, torch.Tensor] | None = None
        self._reported = 0.0
        self.aborted: Callable[[], bool] = lambda: False
        """polled at every batch; whether FLARE says stop. Raises FedImagingError where the site itself does."""
        self.refusal: Reason | None = None
        self.model_owner = ""
        """name of the model that is to be evaluated"""

    @property
    def settings(self) -> JobSettings:
        """The job's settings, validated. Raises FedImagingError by name."""
        if self._settings is None:
            self._settings = JobSettings(self._raw)
        return self._settings

    @property
    def manifest_hash(self) -> str | None:
        """SHA-256 of the manifest's canonical JSON, once the dataset was opened."""
        if self._manifest_hash is None and self._site is not None:
            self._manifest_hash = self._site.dataset.manifest.digest()
        return self._manifest_hash

    def groups(self) -> Groups:
        """The subgroups of the site's own test cases; none before an evaluation loaded them."""
        return {} if self._site is None else self._site.groups()

    @property
    def site(self) -> Site:
        """The site's data and network. Raises FedImagingError if it cannot take part."""
        if self._site is None:
            settings = self.settings
            dataset = resolve(settings.dataset, self._site_name, self._local)
            log.info("dataset %s: %s (found by %s)", dataset.name, dataset.manifest_path, dataset.source)
            self._site = Site(
                settings,
                dataset,
                keep=self._run_dir / STRATEGY_FILE,
                aborted=lambda: self.aborted(),  # noqa: PLW0108 (changes with each task)
                report=self.report,
            )
        return self._site

    def train(
        self, message: dict[str, torch.Tensor], round_number: int, rounds: int, counted: Any = None
    ) -> tuple[RoundResult, dict[str, Any]]:
        """One round from the message that arrived: the result, and the metrics of its weights on validation before.

        Args:
            counted: as the server says, ``{site: the last round whose mean its result is in}``.
        """
        self._last_state = None
        own = counted.get(self._site_name) if isinstance(counted, dict) else None
        state = self.site.receive(message, own)
        metrics = self.validation_metrics(state)
        self.report({"stage": "validated", "round": round_number, "metrics": metrics}, always=True)
        result = self.site.train(state, round_number, rounds)
        self._last_state = exchanged(result.state)
        return result, metrics

    def validation_metrics(self, state: dict[str, torch.Tensor]) -> dict[str, float]:
        return self.site.validate(state)

    def evaluation(self, state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What leaves of a model's evaluation; the per-case results stay in the site's own report.

        Where models are personal, a site is judged by its own in place of the server's; ``judged`` says so.
        """
        personal = self.site.strategy.personal and self.model_owner.startswith(SERVER_MODEL)
        if personal:
            state = self.site.judged(state, best=self.model_owner == f"{SERVER_MODEL}best")
        figures = self.site.evaluation(state) | {"judged": "personal" if personal else "global"}
        self._keep_case_results(self.model_owner, figures, state)
        self.report({"stage": "evaluated", "model": self.model_owner}, always=True)
        return figures

    def last_state(self) -> dict[str, torch.Tensor]:
        """This site's model for others to evaluate: after its last round, or its best where it trains alone.

        Raises:
            FedImagingError: it has not trained, or the strategy keeps models, or parts of them, at the site.
        """
        strategy = self.site.strategy
        if not strategy.submits:
            raise FedImagingError(
                f"with the strategy {strategy.name} no model of this site leaves it", Reason.BAD_MODEL
            )
        if self._last_state is None:
            raise FedImagingError("this site has not trained in this job; it has no model to submit", Reason.BAD_MODEL)
        if strategy.personal:
            return self.site.judged(self._last_state, best=True)
        return self._last_state

    def figures(self, result: RoundResult) -> dict[str, Any]:
        """A round's figures beside the metrics: counts, losses, seconds, memory, and which package made them."""
        return {
            "cases": result.cases,
            "seconds": round(result.seconds, 3),
            "loss": result.epoch_losses[-1],
            "epoch_losses": result.epoch_losses,
            "skipped": withhold(self.site.skipped()),
            "peak_memory": peak_memory(),
            "fedimaging": {"version": __version__, "sha256": package_hash()},
        }

    def refuse(self, error: Exception) -> None:
        """Notes why this site does not answer: in full in the job's folder, in its own log, as a code for the server.

        What is wrong with an image or a list of them names a file or a case, and files can bear patients' names: that
        is said in the job's folder only.
        """
        self.refusal = _reason(error)
        told = f"see the end of {PROGRESS_FILE} in the job's folder" if self.refusal in _NAMES_CASES else error
        log.error("refused (%s): %s", self.refusal.value, told, exc_info=self.refusal is Reason.INTERNAL)
        self.report({"stage": "refused", "reason": self.refusal.value, "message": str(error)}, always=True)

    def report(self, event: dict[str, Any], always: bool = False) -> None:
        """Appends to the site's own progress file, at most every half second unless ``always``."""
        now = time.monotonic()
        if always or event["stage"] != "loading" or now - self._reported > _REPORT_INTERVAL:
            self._reported = now
            with (self._run_dir / PROGRESS_FILE).open("a") as file:
                file.write(json.dumps(event) + "\n")

    def _keep_case_results(self, model: str, figures: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
        path = self._run_dir / SITE_REPORT_FILE
        report: dict[str, Any] = (
            json.loads(path.read_text())
            if path.exists()
            else {"site": self._site_name, "dataset": self.site.dataset.name, "models": {}}
        )
        rows = case_results(self.site, self.site.outcomes(state, "test"), "test")
        report["models"][model] = {"eval": figures, "cases": rows}
        path.touch(mode=0o600)
        path.write_text(json.dumps(report))


def peak_memory() -> int:
    """This process's largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reason(error: Exception) -> Reason:
    if isinstance(error, FedImagingError):
        return error.reason
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return Reason.OUT_OF_MEMORY
    return Reason.INTERNAL


__all__ = ["AbortedError", "Session", "peak_memory"]
