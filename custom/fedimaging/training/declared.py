"""What a job declares that its results hold: tensors by name and shape, and figures by type and size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from fedimaging.networks import build_network
from fedimaging.tasks.declared import Context, Evaluation, Outgoing, RoundFigures
from fedimaging.tasks.statistics import Groups
from fedimaging.training.settings import JobSettings
from fedimaging.training.strategies import exchanged

DTYPE: Final = "<f4"
"""NumPy's name of what every tensor travels in: float32"""

_FIGURES_BYTES: Final = 20 * 2**10
_CLASS_BYTES: Final = 2 * 2**10
_EPOCH_BYTES: Final = 32

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class DeclaredResult:
    """All that the results of one job may hold; the gate stops a result with anything else, or without any of it.

    Args:
        update: the tensors of a round's result, as the job's strategy sends them.
        weights: the tensors of a whole model.
        metrics: of the model that arrived, on validation.
        evaluation: of a model on the test split.
        classes: of the task.
        epochs: of a round.
        figures: of a round of training.
    """

    update: Shapes
    weights: Shapes
    metrics: type[Outgoing]
    evaluation: type[Evaluation]
    classes: tuple[str, ...]
    epochs: int
    figures: type[Outgoing] = RoundFigures

    @property
    def figures_bytes(self) -> int:
        """The most that the figures of a result take as JSON: curves of each class, groups, losses."""
        return _FIGURES_BYTES + _CLASS_BYTES * len(self.classes) + _EPOCH_BYTES * self.epochs

    def context(self, minimum: int, groups: Groups) -> Context:
        """What the figures are judged by: the smallest count that may leave, and the site's own subgroups."""
        return Context(minimum=minimum, classes=self.classes, epochs=self.epochs, groups=groups)


def declare(settings: JobSettings) -> DeclaredResult:
    """What the results of a job may hold, from its settings alone: nothing of the data or of training is asked.

    A strategy declares its tensors in ``StrategySettings.sent``, a task its figures in ``declared_metrics`` and
    ``declared_evaluation``.
    """
    task = settings.task
    with torch.device("meta"):
        network = build_network(
            settings.network,
            spatial_dims=task.spatial_dims,
            in_channels=task.in_channels,
            out_channels=task.out_channels,
            seed=settings.seed,
        )
    return DeclaredResult(
        update={name: tuple(shape) for name, shape in settings.training.strategy.sent(network).items()},
        weights={name: tuple(value.shape) for name, value in exchanged(network.state_dict()).items()},
        metrics=task.declared_metrics,
        evaluation=task.declared_evaluation,
        classes=tuple(task.settings.classes),
        epochs=settings.training.epochs,
    )
