"""What a task is. ``training`` and ``federation`` know this interface and no task by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedimaging.datasets.manifest import SPLITS, Case, Manifest
from fedimaging.errors import FedImagingError, Reason
from fedimaging.networks.base import Output
from fedimaging.settings import Settings
from fedimaging.tasks.declared import Evaluation, Outgoing

Item = dict[str, Tensor]


class TaskSettings(Settings):
    name: str


class Task(ABC):
    """One kind of learning problem.

    An *item* is a loaded case: ``image`` (channels, *spatial) float32 and ``label``. *Outcomes* are what evaluation
    keeps of each case, one row a case: (cases, columns) float32, columns as the task likes.
    """

    settings_type: ClassVar[type[TaskSettings]]
    key_metric: str
    """The metric, larger is better, by which the best global model is picked."""
    output: ClassVar[Output] = "case"
    declared_metrics: ClassVar[type[Outgoing]]
    """What :meth:`metrics` may hold; the site lets nothing else leave."""
    declared_evaluation: ClassVar[type[Evaluation]]
    """What :meth:`evaluation` may hold beside the figures of every task."""

    spatial_dims: int
    in_channels: int
    out_channels: int
    input_shape: tuple[int, ...]
    """sides of what the network is trained on, in pixels or voxels"""
    evaluation_batch: int | None = None
    """cases that :meth:`outcomes` takes at once, 1 where their shapes differ; None for as many as in training"""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @abstractmethod
    def check(self, manifest: Manifest, where: str) -> None:
        """Raises FedImagingError if the manifest cannot serve this task; ``where`` is the file that a message names."""

    @abstractmethod
    def load(self, root: Path, case: Case) -> Item:
        """Reads and deterministically transforms one case. Raises FedImagingError if it is unreadable."""

    @abstractmethod
    def load_key(self) -> str:
        """Names the settings that ``load`` depends on; part of the key of a cached item."""

    def files(self, case: Case) -> tuple[str, ...]:
        """The files and folders that ``load`` reads, relative to its root."""
        return (case.image,)

    @abstractmethod
    def augmentation(self, seed: int) -> Callable[[Item], Item]:
        """Random augmentation of a loaded item, seeded."""

    @abstractmethod
    def loss(self, cases: Sequence[Case]) -> nn.Module:
        """The training loss of (outputs, labels); ``cases`` are the site's training cases, for class weights."""

    @abstractmethod
    def outcomes(self, network: Callable[[Tensor], Tensor], batch: Item) -> Tensor:
        """Runs the network on a batch and keeps (cases, columns) of it."""

    @abstractmethod
    def metrics(self, outcomes: Tensor, cases: Sequence[Case]) -> dict[str, float]:
        """Aggregate metrics with the key metric among them; empty where too few cases allow one."""

    @abstractmethod
    def evaluation(
        self, outcomes: Tensor, cases: Sequence[Case], validation: Tensor, validation_cases: Sequence[Case], seed: int
    ) -> dict[str, Any]:
        """What the report says of a model on this site's test split: figures, intervals, curves, none of one case."""

    @abstractmethod
    def case_result(self, case: Case, outcome: Tensor) -> dict[str, Any]:
        """One case's outcome (columns,) in plain values, for the site's own report."""

    def collate(self, items: Sequence[Item]) -> Item:
        """A batch of items."""
        return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def require_splits(manifest: Manifest, where: str) -> None:
    """Raises FedImagingError if a split of the manifest is empty; ``where`` is the file that the message names."""
    for split in SPLITS:
        if not manifest.split(split):
            raise FedImagingError(f"{where}: the {split} split is empty; index more cases", Reason.TOO_FEW_CASES)
