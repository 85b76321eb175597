"""Everything that a job may set, typed: the job's own words for dataset, task, network and local training."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from fedimaging.errors import FedImagingError
from fedimaging.networks import NETWORKS, NetworkSettings, network_settings
from fedimaging.settings import ANY_VERSION, Name, Settings, Specifier, parse
from fedimaging.tasks import Task, make_task
from fedimaging.training.strategies import FedAvg, Strategy
from fedimaging.version import require


class TrainingSettings(Settings):
    """Local training of one round."""

    strategy: Strategy = FedAvg()
    """what the federation does besides plain averaging; its server half must be the workflow's"""
    epochs: Annotated[int, Field(ge=1, le=1000)] = 1
    """passes over the site's training cases in a round"""
    max_batches: Annotated[int, Field(ge=1, le=10**6)] | None = None
    """stop an epoch after so many batches; null for all"""
    batch_size: Annotated[int, Field(ge=2, le=4096)] = 16
    """cases in a step"""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """starts anew in each round"""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-3
    """the schedule's peak"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """of sgd"""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-4
    """of the optimizer"""
    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    """of the learning rate, over all rounds"""
    gradient_clip: Annotated[float, Field(gt=0, le=1e6)] | None = 1.0
    """largest norm of the gradient; null for none"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is bfloat16 where the processor is good at it, float32 elsewhere"""
    max_unreadable: Annotated[float, Field(ge=0, le=0.5)] = 0.01
    """share of unreadable cases above which the site refuses"""
    cache_memory_mb: Annotated[int, Field(ge=0, le=1_000_000)] = 2048
    """memory for decoded cases; what does not fit goes to the site's disk cache"""
    cache_disk_mb: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """disk for decoded cases; what does not fit is read anew each epoch"""


class SeedSettings(Settings):
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """fixes initial weights, order and augmentation"""


class _JobShape(SeedSettings):
    dataset: Name
    task: dict[str, Any]
    network: dict[str, Any]
    training: TrainingSettings = TrainingSettings()
    fedimaging: Specifier = ANY_VERSION


class JobSettings:
    """A job's settings, validated: ``dataset`` (a logical name), ``task``, ``network``, ``training`` and ``seed``.

    The version that the job needs (``fedimaging``) is looked at first: other versions know other settings.

    Raises:
        FedImagingError: BAD_SETTING, naming the setting that is wrong or unknown, never its value; WRONG_VERSION.
    """

    def __init__(self, raw: Any) -> None:
        if isinstance(raw, Mapping):
            require(raw.get("fedimaging", ANY_VERSION))
        shape = parse(_JobShape, raw, "job")
        self.dataset: str = shape.dataset
        self.task: Task = make_task(shape.task)
        self.network: NetworkSettings = network_settings(shape.network)
        self.training: TrainingSettings = shape.training
        self.seed: int = shape.seed
        self._check_fit()

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, defaults filled in."""
        return {
            "dataset": self.dataset,
            "task": self.task.settings.model_dump(),
            "network": self.network.model_dump(),
            "training": self.training.model_dump(),
            "seed": self.seed,
        }

    def deepest(self) -> list[int]:
        """Sides of the network's smallest features, for the task's inputs."""
        return [side // self.network.divisor for side in self.task.input_shape]

    def _check_fit(self) -> None:
        """The network gives what the task learns, and takes inputs of the task's size."""
        self._check_strategy()
        name, wanted = self.network.name, self.task.output
        if self.network.output != wanted:
            fitting = ", ".join(sorted(n for n, settings in NETWORKS.items() if settings.output == wanted))
            raise FedImagingError(f"network.name: {name} gives no output for each {wanted}; choose one of {fitting}")
        if any(side % self.network.divisor for side in self.task.input_shape):
            raise FedImagingError(
                f"task: {name} takes sides that are multiples of {self.network.divisor}; change the size of its inputs"
            )

    def _check_strategy(self) -> None:
        """SCAFFOLD's control variates are defined for plain SGD, and FedBN for a network with BatchNorm."""
        strategy, training = self.training.strategy.name, self.training
        if strategy == "scaffold" and (training.optimizer != "sgd" or training.momentum):
            raise FedImagingError(
                "training.strategy: scaffold needs plain SGD; set training.optimizer to sgd and training.momentum to 0"
            )
        if strategy == "fedbn" and self.network.norm != "batch":
            raise FedImagingError("training.strategy: fedbn needs a network with BatchNorm; set network.norm to batch")
