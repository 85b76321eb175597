"""Local training and evaluation of one site: plain PyTorch over cached cases."""

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import set_track_meta
from torch import Tensor, nn

from fedimaging.datasets.manifest import Case
from fedimaging.datasets.site import Dataset
from fedimaging.errors import FedImagingError, Reason
from fedimaging.networks import build_network
from fedimaging.tasks.statistics import MIN_CELL, Groups, groups, withhold, withhold_counts
from fedimaging.training.cache import CaseCache, DiskCache
from fedimaging.training.precision import Precision
from fedimaging.training.settings import JobSettings, TrainingSettings
from fedimaging.training.strategies import Local, State, exchanged

_LOAD_WORKERS = 2


class AbortedError(Exception):
    """The federation told this site to stop."""


@dataclass(frozen=True)
class RoundResult:
    """What one round of local training gave: the state, what is sent of it, and figures that may leave the site."""

    state: State
    sent: State
    """the tensors that leave the site: those that the strategy's ``sent`` names"""
    cases: int
    """cases really used, each counted once however many epochs"""
    steps: int
    epoch_losses: list[float]
    seconds: float


class Site:
    """One site's data and network: trains from a global state and evaluates one.

    Args:
        settings: the job's.
        dataset: the site's resolved dataset; its manifest is checked against the task here.
        keep: the file in which the strategy's memory outlives this process; None for none.
        aborted: polled at every batch and every loaded case; once true, :class:`AbortedError` is raised.
        report: told of progress, for the site's own display.

    Raises:
        FedImagingError: if the dataset cannot serve the task or too many of its images are unreadable.
    """

    def __init__(
        self,
        settings: JobSettings,
        dataset: Dataset,
        *,
        keep: Path | None = None,
        aborted: Callable[[], bool] = lambda: False,
        report: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> None:
        set_track_meta(False)
        self.settings, self.task, self.dataset = settings, settings.task, dataset
        self.aborted, self._report = aborted, report
        self.task.check(dataset.manifest, str(dataset.manifest_path))
        self.precision = Precision.choose(settings.training.precision, settings.deepest())
        network = build_network(
            settings.network,
            spatial_dims=self.task.spatial_dims,
            in_channels=self.task.in_channels,
            out_channels=self.task.out_channels,
            seed=settings.seed,
        )
        self.network = self.precision.place_network(network, self.task.spatial_dims)
        self.strategy = settings.training.strategy
        self.local = self.strategy.local(self.network)
        self._personal: State = {}
        self._personal_metric: float | None = None
        self._trained: int | None = None
        self._keep = keep
        if keep is not None and keep.exists():
            self._recall(keep)
        self._splits: dict[str, CaseCache] = {}
        self._outcomes: dict[tuple[str, str], Tensor] = {}

    def split(self, name: str) -> CaseCache:
        """The readable cases of a split, loaded at first use."""
        if name not in self._splits:
            self._splits[name] = self._load_split(name)
        return self._splits[name]

    def skipped(self) -> int:
        """Unreadable cases of the splits loaded so far."""
        return sum(len(split.unreadable) for split in self._splits.values())

    def receive(self, message: Mapping[str, Tensor], counted: int | None = None) -> State:
        """The global weights of a message for training; the rest of it goes to the strategy.

        Args:
            counted: the last round whose mean this site's result is in, None for none or where no strategy asks.

        Raises:
            FedImagingError: BAD_MODEL if the message is not of the job's network and strategy.
        """
        self.local.settle(self._trained, counted)
        weights = self.local.incoming(message)
        self._check_state(weights)
        return weights

    def train(
        self, weights: Mapping[str, Tensor], round_number: int, rounds: int, steps: int | None = None
    ) -> RoundResult:
        """Trains from global weights for one of ``rounds`` rounds (counted from 0).

        Args:
            steps: optimizer steps, in as many epochs as that takes; None for ``training.epochs``.

        Raises:
            AbortedError: told to stop.
            FedImagingError: NOT_FINITE if the loss is not a finite number.
        """
        start = time.monotonic()

        def fit(state: State, local: Local) -> tuple[State, list[float], int, int]:
            return self._fit(state, local, round_number, rounds, steps)

        trained, losses, seen, taken = fit(self.local.start(dict(weights)), self.local)
        if seen < MIN_CELL:
            raise FedImagingError(
                f"{self.dataset.name}: a round on {seen} cases tells of single patients; give at least {MIN_CELL}",
                Reason.TOO_FEW_CASES,
            )
        sent = self.local.finish(self.network, exchanged(trained))
        self.local.personalise(dict(weights), lambda state, local: exchanged(fit(state, local)[0]))
        self._trained = round_number
        self._remember()
        return RoundResult(
            state=trained,
            sent=sent,
            cases=seen,
            steps=taken,
            epoch_losses=losses,
            seconds=time.monotonic() - start,
        )

    def _fit(
        self, state: State, local: Local, round_number: int, rounds: int, steps: int | None
    ) -> tuple[State, list[float], int, int]:
        """Trains from a state under a strategy's local half: the state_dict, losses by epoch, cases and steps."""
        data, training = self.split("training"), self.settings.training
        self._load_state(state)
        seed = self._seed("training", round_number)
        torch.manual_seed(seed)
        augment = self.task.augmentation(seed)
        loss_function = self.task.loss(data.cases).to(self.precision.device)
        optimizer = make_optimizer(self.network, training)
        local.begin(self.network)
        self.network.train()
        batches = list(round_batches(len(data), training, np.random.default_rng(seed), steps))
        losses: list[float] = []
        seen = 0
        for epoch, group in itertools.groupby(enumerate(batches), key=lambda step: step[1][0]):
            total, cases = 0.0, 0
            for step, (_, batch) in group:
                self._stop_if_told()
                set_learning_rate(optimizer, training, (round_number + step / len(batches)) / rounds)
                items = [augment(data[int(i)]) for i in batch]
                total += self._step(optimizer, loss_function, items, local) * len(items)
                cases += len(items)
            losses.append(total / cases)
            seen = max(seen, cases)
            self._report({"stage": "training", "round": round_number, "epoch": epoch, "loss": losses[-1]})
        trained = {key: value.detach().cpu().clone() for key, value in self.network.state_dict().items()}
        if not all(torch.isfinite(value).all() for value in trained.values()):
            raise FedImagingError(
                f"{self.dataset.name}: the trained weights are not finite; lower training.learning_rate",
                Reason.NOT_FINITE,
            )
        return trained, losses, seen, len(batches)

    def validate(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics on validation of the model that stands for these global weights here; the best personal one is kept.

        Empty where too few cases allow any.
        """
        state = self.local.judged(dict(weights))
        metrics = self.metrics(state)
        if self.strategy.personal:
            value, best = metrics.get(self.task.key_metric), self._personal_metric
            if best is None or (value is not None and value > best):
                self._personal, self._personal_metric = dict(state), value
        return metrics

    def judged(self, weights: Mapping[str, Tensor], best: bool = False) -> State:
        """The model by which this site is judged when these global weights are.

        Args:
            best: where models are personal, the one that did best on this site's validation cases instead.
        """
        return self._personal if best and self._personal else self.local.judged(dict(weights))

    def metrics(self, state: Mapping[str, Tensor], split: str = "validation") -> dict[str, float]:
        """Aggregate metrics of a state on a split; empty where too few cases allow any."""
        outcomes = self.outcomes(state, split)
        return self.task.metrics(outcomes, self.split(split).cases)

    def evaluation(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """What may be told of a state on this site's test split, aggregated here."""
        start = time.monotonic()
        manifest = self.dataset.manifest
        validation, test = self.outcomes(state, "validation"), self.outcomes(state, "test")
        cases = self.split("test").cases
        figures = self.task.evaluation(
            test, cases, validation, self.split("validation").cases, seed=self._seed("bootstrap", 0)
        )
        return {
            "split": "test",
            "task": self.task.settings.name,
            "cases": withhold(len(cases)),
            "patients": withhold(len({case.patient for case in cases})),
            "min_cell": MIN_CELL,
            "classes": self._class_counts("test"),
            **{
                split: {
                    "cases": withhold(len(manifest.split(split))),
                    "classes": self._class_counts(split),
                }
                for split in ("training", "validation")
            },
            **figures,
            "skipped": withhold(self.skipped()),
            "seconds": round(time.monotonic() - start, 3),
        }

    def groups(self) -> Groups:
        """The subgroups of this site's test cases, of which alone figures leave; none before these were loaded."""
        test = self._splits.get("test")
        return groups(test.cases) if test else {}

    def _class_counts(self, split: str) -> dict[str, int | None]:
        """Cases of the job's classes; a site's manifest may know more."""
        counts = self.dataset.manifest.class_counts(split)
        return withhold_counts({name: counts[name] for name in self.task.settings.classes if name in counts})

    def outcomes(self, state: Mapping[str, Tensor], split: str) -> Tensor:
        """The task's outcomes (cases, columns) of a state on a split; kept, so that no state is run twice."""
        key = (_digest(state), split)
        if key not in self._outcomes:
            data = self.split(split)
            self._load_state(state)
            self.network.eval()
            rows = []
            size = self.task.evaluation_batch or self.settings.training.batch_size
            with torch.inference_mode():
                for start in range(0, len(data), size):
                    self._stop_if_told()
                    batch = self._batch([data[i] for i in range(start, min(start + size, len(data)))])
                    rows.append(self.task.outcomes(self._predict, batch).cpu())
            if len(self._outcomes) > 8:
                self._outcomes.clear()
            self._outcomes[key] = torch.cat(rows)
        return self._outcomes[key]

    def _predict(self, images: Tensor) -> Tensor:
        """The network's outputs in float32."""
        with self.precision.autocast():
            outputs: Tensor = self.network(self.precision.place(images)).float()
        if not torch.isfinite(outputs).all():
            raise FedImagingError(
                f"{self.dataset.name}: the network's outputs are not finite; lower training.learning_rate",
                Reason.NOT_FINITE,
            )
        return outputs

    def _step(
        self, optimizer: torch.optim.Optimizer, loss_function: nn.Module, items: Sequence[Any], local: Local
    ) -> float:
        batch = self._batch(items)
        with self.precision.autocast():
            outputs = self.network(batch["image"])
        loss = loss_function(outputs.float(), batch["label"])
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FedImagingError(
                f"{self.dataset.name}: the training loss is not a finite number; lower training.learning_rate or set "
                "training.gradient_clip",
                Reason.NOT_FINITE,
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        local.regularise(self.network)
        clip = self.settings.training.gradient_clip
        if clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), clip)
        local.correct(self.network, optimizer.param_groups[0]["lr"])
        optimizer.step()
        return value

    def _batch(self, items: Sequence[Any]) -> Any:
        return {key: self.precision.place(value) for key, value in self.task.collate(items).items()}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        """Loads what is exchanged; counters are the site's own."""
        self._check_state(state)
        self.network.load_state_dict(dict(state), strict=False)

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        own = exchanged(self.network.state_dict())
        if set(state) != set(own) or any(state[key].shape != own[key].shape for key in own):
            raise FedImagingError(
                "the model that arrived is not the job's network; server and site disagree on its settings or version",
                Reason.BAD_MODEL,
            )

    def _remember(self) -> None:
        """Keeps the strategy's memory and the best personal model for a restart, readable by their owner alone."""
        if self._keep is None or not self.local.memory:
            return
        part = self._keep.with_suffix(".part")
        part.touch(mode=0o600)
        kept = {
            "strategy": self.strategy.model_dump(),
            "round": self._trained,
            "memory": self.local.memory,
            "best": self._personal,
            "best_metric": self._personal_metric,
        }
        torch.save(kept, part)
        part.replace(self._keep)

    def _recall(self, path: Path) -> None:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        if kept["strategy"] != self.strategy.model_dump():
            # The same run directory, deployed with another job: what one strategy keeps here another might send.
            return
        self._trained, self.local.memory = kept["round"], kept["memory"]
        self._personal, self._personal_metric = kept["best"], kept["best_metric"]

    def _load_split(self, name: str) -> CaseCache:
        training = self.settings.training
        cases = self.dataset.manifest.split(name)
        # Each split gets the share of the budget that it has of the cases.
        share = len(cases) / sum(len(self.dataset.manifest.split(s)) for s in ("training", "validation", "test"))
        data = CaseCache(
            self.task,
            self.dataset.root,
            cases,
            memory_budget=int(training.cache_memory_mb * 2**20 * share),
            disk=DiskCache(training.cache_disk_mb * 2**20) if training.cache_disk_mb else None,
            workers=_LOAD_WORKERS,
            aborted=self.aborted,
            progress=lambda done, total: self._report({"stage": "loading", "split": name, "done": done, "of": total}),
        )
        self._stop_if_told()
        if len(data.unreadable) > training.max_unreadable * len(cases):
            raise FedImagingError(
                f"{len(data.unreadable)} of {len(cases)} {name} images cannot be read, more than "
                f"training.max_unreadable allows; the first: {data.unreadable[0]}",
                Reason.UNREADABLE_IMAGES,
            )
        if not data.cases:
            raise FedImagingError(f"{self.dataset.manifest_path}: no case in {name}", Reason.TOO_FEW_CASES)
        return data

    def _stop_if_told(self) -> None:
        if self.aborted():
            raise AbortedError

    def _seed(self, purpose: str, number: int) -> int:
        text = f"{self.settings.seed}/{self.dataset.site}/{purpose}/{number}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def make_optimizer(network: nn.Module, training: TrainingSettings) -> torch.optim.Optimizer:
    """A new optimizer; norms and biases are not decayed."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.learning_rate, momentum=training.momentum)
    kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=training.learning_rate)


def set_learning_rate(optimizer: torch.optim.Optimizer, training: TrainingSettings, progress: float) -> None:
    """Sets the rate for ``progress`` in [0, 1] through the whole job."""
    for group in optimizer.param_groups:
        group["lr"] = training.learning_rate * schedule_factor(training.schedule, progress)


def schedule_factor(schedule: str, progress: float) -> float:
    """Share of the peak rate. One-cycle (Smith and Topin 2019): cosine up from 1/25 over 30 %, then down to 1e-4."""
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    warm_up, low, end = 0.3, 1 / 25, 1e-4
    if progress < warm_up:
        return low + (1 - low) * 0.5 * (1 - math.cos(math.pi * progress / warm_up))
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def plan_batches(cases: int, training: TrainingSettings) -> list[int]:
    """Sizes of an epoch's batches. A last batch of one is left out: BatchNorm cannot be trained on it."""
    full, rest = divmod(cases, training.batch_size)
    sizes = [training.batch_size] * full + ([rest] if rest > 1 or not full else [])
    return sizes[: training.max_batches]


def shuffled_batches(
    cases: int, training: TrainingSettings, generator: np.random.Generator
) -> Iterator[np.ndarray[Any, Any]]:
    """Index arrays of one epoch in random order."""
    order, start = generator.permutation(cases), 0
    for size in plan_batches(cases, training):
        yield order[start : start + size]
        start += size


def round_batches(
    cases: int, training: TrainingSettings, generator: np.random.Generator, steps: int | None = None
) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """(epoch, indices) of each step of a round: all of ``training.epochs``, or so many steps in as many epochs."""
    left = len(plan_batches(cases, training)) * training.epochs if steps is None else steps
    for epoch in itertools.count():
        for batch in itertools.islice(shuffled_batches(cases, training, generator), left):
            yield epoch, batch
            left -= 1
        if left <= 0:
            return


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def case_results(site: Site, outcomes: Tensor, split: str) -> list[dict[str, Any]]:
    """One row a case, for the site's own report; it never leaves the site."""
    cases: list[Case] = site.split(split).cases
    return [
        {
            "image": case.image,
            "patient": case.patient,
            **site.task.case_result(case, outcome),
        }
        for case, outcome in zip(cases, outcomes, strict=True)
    ]
