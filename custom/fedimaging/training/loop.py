"""Local training and evaluation of one site: plain PyTorch over cached cases."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import set_track_meta
from torch import Tensor, nn

from fedimaging.datasets.manifest import Case
from fedimaging.datasets.site import Dataset
from fedimaging.errors import FedImagingError, Reason
from fedimaging.networks import build_network
from fedimaging.tasks.statistics import MIN_CELL, withhold_counts
from fedimaging.training.cache import CaseCache, DiskCache
from fedimaging.training.precision import Precision
from fedimaging.training.settings import JobSettings, TrainingSettings

State = dict[str, Tensor]

_LOAD_WORKERS = 2
_COUNTERS = "num_batches_tracked"


class AbortedError(Exception):
    """The federation told this site to stop."""


@dataclass(frozen=True)
class RoundResult:
    """What one round of local training gave: the state, and figures that may leave the site."""

    state: State
    cases: int
    """cases really used, each counted once however many epochs"""
    steps: int
    epoch_losses: list[float]
    seconds: float


def exchanged(state: Mapping[str, Tensor]) -> State:
    """The part of a state_dict that is averaged: everything but BatchNorm's batch counters."""
    return {key: value for key, value in state.items() if not key.endswith(_COUNTERS)}


class Site:
    """One site's data and network: trains from a global state and evaluates one.

    Args:
        settings: the job's.
        dataset: the site's resolved dataset; its manifest is checked against the task here.
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

    def train(self, state: Mapping[str, Tensor], round_number: int, rounds: int) -> RoundResult:
        """Trains from ``state`` for one of ``rounds`` rounds (counted from 0).

        Raises:
            AbortedError: told to stop.
            FedImagingError: NOT_FINITE if the loss is not a finite number.
        """
        start = time.monotonic()
        data, training = self.split("training"), self.settings.training
        self._load_state(state)
        seed = self._seed("training", round_number)
        torch.manual_seed(seed)
        augment = self.task.augmentation(seed)
        loss_function = self.task.loss(data.cases).to(self.precision.device)
        optimizer = make_optimizer(self.network, training)
        order = np.random.default_rng(seed)
        per_epoch = len(plan_batches(len(data), training))
        self.network.train()
        steps, seen = 0, 0
        losses: list[float] = []
        for epoch in range(training.epochs):
            total, seen = 0.0, 0
            for batch in shuffled_batches(len(data), training, order):
                self._stop_if_told()
                progress = (round_number + steps / (per_epoch * training.epochs)) / rounds
                set_learning_rate(optimizer, training, progress)
                items = [augment(data[int(i)]) for i in batch]
                total += self._step(optimizer, loss_function, items) * len(items)
                seen, steps = seen + len(items), steps + 1
            losses.append(total / seen)
            self._report({"stage": "training", "round": round_number, "epoch": epoch, "loss": losses[-1]})
        if seen < MIN_CELL:
            raise FedImagingError(
                f"{self.dataset.name}: a round on {seen} cases tells of single patients; give at least {MIN_CELL}",
                Reason.TOO_FEW_CASES,
            )
        trained = {key: value.detach().cpu().clone() for key, value in self.network.state_dict().items()}
        if not all(torch.isfinite(value).all() for value in trained.values()):
            raise FedImagingError(
                f"{self.dataset.name}: the trained weights are not finite; lower training.learning_rate",
                Reason.NOT_FINITE,
            )
        return RoundResult(
            state=trained,
            cases=seen,
            steps=steps,
            epoch_losses=losses,
            seconds=time.monotonic() - start,
        )

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
            "cases": len(cases),
            "patients": len({case.patient for case in cases}),
            "min_cell": MIN_CELL,
            "classes": withhold_counts(manifest.class_counts("test")),
            **{
                split: {
                    "cases": len(manifest.split(split)),
                    "classes": withhold_counts(manifest.class_counts(split)),
                }
                for split in ("training", "validation")
            },
            **figures,
            "skipped": self.skipped(),
            "seconds": round(time.monotonic() - start, 3),
        }

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

    def _step(self, optimizer: torch.optim.Optimizer, loss_function: nn.Module, items: Sequence[Any]) -> float:
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
        clip = self.settings.training.gradient_clip
        if clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), clip)
        optimizer.step()
        return value

    def _batch(self, items: Sequence[Any]) -> Any:
        return {key: self.precision.place(value) for key, value in self.task.collate(items).items()}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        """Loads what is exchanged; counters are the site's own."""
        own = exchanged(self.network.state_dict())
        if set(state) != set(own) or any(state[key].shape != own[key].shape for key in own):
            raise FedImagingError(
                "the model that arrived is not the job's network; server and site disagree on its settings or version",
                Reason.BAD_MODEL,
            )
        self.network.load_state_dict(dict(state), strict=False)

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
