"""Classification of images: one class of several, or any number of findings (multi-label)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from monai.metrics import compute_confusion_matrix_metric, get_confusion_matrix
from monai.transforms import Compose, NormalizeIntensity, RandAdjustContrast, RandAffine, RandFlip, Resize, SpatialPad
from monai.utils import convert_to_tensor
from pydantic import Field, model_validator
from torch import Tensor, nn

from fedimaging.datasets.images import read_image
from fedimaging.datasets.manifest import Case, Manifest
from fedimaging.errors import FedImagingError, Reason
from fedimaging.settings import ClassName, Settings
from fedimaging.tasks import statistics as stats
from fedimaging.tasks.base import Item, Task, TaskSettings, require_splits
from fedimaging.tasks.declared import (
    Calibration,
    ClassKey,
    Count,
    Evaluation,
    Loss,
    Outgoing,
    RocCurve,
    Share,
    ShareInterval,
    Subgroups,
)


class AugmentationSettings(Settings):
    """Random changes of a training image; every one off at 0."""

    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 7.0
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """largest shift, as a share of the image's side"""
    scale: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """probability of a left-right flip"""
    contrast: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """gamma is drawn from 1 - contrast to 1 + contrast"""


class ClassificationSettings(TaskSettings):
    name: Literal["classification"] = "classification"
    classes: Annotated[list[ClassName], Field(min_length=2, max_length=1000)]
    """names of the classes, in the order of the network's outputs"""
    multi_label: bool = False
    """whether a case may be of several classes, or of none"""
    image_size: Annotated[int, Field(ge=32, le=1024)] = 64
    """side of the square that every image is fitted into, in pixels; the aspect ratio is kept"""
    channels: Literal[1, 3] = 1
    """1 for grey images, 3 for colour"""
    key_metric: Literal["auroc", "accuracy"] = "auroc"
    """what picks the best model; accuracy suits sites that lack classes, where AUROC is undefined"""
    class_weighting: Literal["none", "balanced"] = "balanced"
    """whether rare classes weigh more in the loss, by the site's own counts"""
    augmentation: AugmentationSettings = AugmentationSettings()
    """random changes of training images; angles in degrees, the rest as shares; flip is a probability"""

    @model_validator(mode="after")
    def _distinct(self) -> "ClassificationSettings":
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must differ from one another")
        return self


class ClassificationMetrics(Outgoing):
    auroc: Share | None = None
    loss: Annotated[Loss, Field(ge=0)] | None = None
    accuracy: Share | None = None
    balanced_accuracy: Share | None = None
    sensitivity: Share | None = None
    specificity: Share | None = None
    cases: Count | None = None


class ClassFigures(Outgoing):
    auroc: Share | None
    auroc_ci: ShareInterval | None
    threshold: Share | None
    roc: RocCurve | None
    sensitivity: Share | None
    sensitivity_ci: ShareInterval | None
    specificity: Share | None
    specificity_ci: ShareInterval | None


class SubgroupFigures(Outgoing):
    cases: Count
    auroc: Share | None
    auroc_ci: ShareInterval | None


class ClassificationEvaluation(Evaluation):
    auroc: Share | None
    auroc_ci: ShareInterval | None
    accuracy: Share | None
    accuracy_ci: ShareInterval | None
    balanced_accuracy: Share | None
    per_class: dict[ClassKey, ClassFigures]
    calibration: Calibration | None
    subgroups: Subgroups[SubgroupFigures]


class Classification(Task):
    settings_type = ClassificationSettings
    declared_metrics = ClassificationMetrics
    declared_evaluation = ClassificationEvaluation
    settings: ClassificationSettings
    spatial_dims = 2

    def __init__(self, settings: ClassificationSettings) -> None:
        super().__init__(settings)
        self.key_metric = settings.key_metric
        self.in_channels = settings.channels
        self.out_channels = len(settings.classes)
        side = settings.image_size
        self.input_shape = (side, side)
        # Normalised before it is padded, so that the border holds the mean and not another intensity.
        self._fit = Compose(
            [
                Resize(side, size_mode="longest", mode="area"),
                NormalizeIntensity(channel_wise=True),
                SpatialPad((side, side)),
            ]
        )

    def check(self, manifest: Manifest, where: str) -> None:
        settings = self.settings
        if manifest.task != "classification" or manifest.multi_label != settings.multi_label:
            kind = "multi-label" if settings.multi_label else "single-label"
            raise FedImagingError(
                f"{where}: the job learns a {kind} classification, the manifest is of another kind; index it as one",
                Reason.BAD_MANIFEST,
            )
        # An extra class would be an unlearnable label; one that a site lacks is no fault (label skew).
        unknown = sorted({name for split in (manifest.training, manifest.validation, manifest.test)
                          for case in split for name in case.class_names} - set(settings.classes))  # fmt: skip
        if unknown:
            raise FedImagingError(
                f"{where}: class {unknown[0]!r} is not one of the job's ({', '.join(settings.classes)}); "
                "rename it with `data index --rename` or run a job that knows it",
                Reason.BAD_MANIFEST,
            )
        require_splits(manifest, where)
        if not settings.multi_label and len({case.label for case in manifest.training}) < 2:
            raise FedImagingError(
                f"{where}: all training cases are of one class; at least two are needed", Reason.ONE_CLASS
            )

    def load(self, root: Path, case: Case) -> Item:
        image = torch.tensor(read_image(root / case.image, channels=self.settings.channels))
        height, width = image.shape[-2:]
        if max(height, width) > min(height, width) * self.settings.image_size:
            raise FedImagingError(
                f"{root / case.image}: {height} x {width} pixels is too narrow", Reason.UNREADABLE_IMAGES
            )
        if not torch.isfinite(image).all():
            raise FedImagingError(f"{root / case.image}: pixels that are not finite numbers", Reason.UNREADABLE_IMAGES)
        fitted = convert_to_tensor(self._fit(image), dtype=torch.float32, track_meta=False)
        return {"image": fitted, "label": self.target(case)}

    def load_key(self) -> str:
        settings = self.settings
        return f"classification-1/{settings.image_size}/{settings.channels}/{settings.classes}/{settings.multi_label}"

    def target(self, case: Case) -> Tensor:
        """The class index (), int64; for multi-label (classes,) float32 of zeros and ones."""
        indices = [self.settings.classes.index(name) for name in case.class_names]
        if not self.settings.multi_label:
            return torch.tensor(indices[0])
        return torch.zeros(self.out_channels).index_fill_(0, torch.tensor(indices, dtype=torch.int64), 1.0)

    def augmentation(self, seed: int) -> Callable[[Item], Item]:
        a, side = self.settings.augmentation, self.settings.image_size
        transform = Compose(
            [
                RandAffine(
                    prob=1.0,
                    rotate_range=np.deg2rad(a.rotate_degrees),
                    translate_range=[a.shift * side] * 2,
                    scale_range=[a.scale] * 2,
                    padding_mode="border",
                    spatial_size=(side, side),
                    cache_grid=True,
                ),
                RandFlip(prob=a.flip, spatial_axis=1),
                *([RandAdjustContrast(prob=0.5, gamma=(1 - a.contrast, 1 + a.contrast))] if a.contrast else []),
            ]
        ).set_random_state(seed)
        return lambda item: {**item, "image": transform(item["image"])}

    def loss(self, cases: Sequence[Case]) -> nn.Module:
        counts = torch.tensor(
            [sum(name in case.class_names for case in cases) for name in self.settings.classes], dtype=torch.float32
        )
        balanced = self.settings.class_weighting == "balanced"
        if self.settings.multi_label:
            ratio = (len(cases) - counts) / counts.clamp(min=1)
            return nn.BCEWithLogitsLoss(pos_weight=ratio.clamp(1 / 20, 20) if balanced else None)
        weights = counts.sum() / (counts.clamp(min=1) * (counts > 0).sum())
        return nn.CrossEntropyLoss(weight=weights if balanced else None)

    def outcomes(self, network: Callable[[Tensor], Tensor], batch: Item) -> Tensor:
        """Logits (cases, classes)."""
        return network(batch["image"]).float()

    def metrics(self, outcomes: Tensor, cases: Sequence[Case]) -> dict[str, float]:
        """Macro averages over the classes, one against the rest; of two classes the second is the positive one.

        Where a class has too few cases they are empty, but for loss and accuracy over all cases if that is the key
        metric.
        """
        truth, probabilities = self._truth(cases), self._probabilities(outcomes)
        columns = self._columns()
        decided = self._decisions(probabilities)
        labels = torch.stack([self.target(case) for case in cases]) if cases else torch.empty(0)
        unweighted = nn.BCEWithLogitsLoss() if self.settings.multi_label else nn.CrossEntropyLoss()
        if not all(stats.enough(truth[:, c]) for c in columns):
            if self.key_metric != "accuracy" or len(cases) < stats.MIN_CELL:
                return {}
            return {
                "loss": float(unweighted(outcomes, labels)),
                "accuracy": float((decided == truth).all(1).mean()),
                "cases": len(cases),
            }
        confusion = get_confusion_matrix(torch.from_numpy(decided).float(), torch.from_numpy(truth).float())
        confusion = confusion.sum(0)[columns]
        rate = {
            name: float(compute_confusion_matrix_metric(name, confusion).mean())
            for name in ("sensitivity", "specificity")
        }
        recalls = [float(decided[truth[:, c], c].mean()) for c in range(self.out_channels) if truth[:, c].any()]
        return {
            "auroc": float(np.mean([stats.auroc(probabilities[:, c], truth[:, c]) for c in columns])),
            "loss": float(unweighted(outcomes, labels)),
            "accuracy": float((decided == truth).all(1).mean()),
            "balanced_accuracy": float(np.mean(recalls)),
            **rate,
            "cases": len(cases),
        }

    def evaluation(
        self, outcomes: Tensor, cases: Sequence[Case], validation: Tensor, validation_cases: Sequence[Case], seed: int
    ) -> dict[str, Any]:
        truth, probabilities = self._truth(cases), self._probabilities(outcomes)
        per_class = {
            self.settings.classes[c]: self._class_figures(
                probabilities[:, c],
                truth[:, c],
                [case.patient for case in cases],
                self._threshold(validation, validation_cases, c),
                seed,
            )
            for c in self._columns()
        }
        summary = self.metrics(outcomes, cases)
        values, bounds = self._macro_auroc(probabilities, truth, cases, seed)

        def subgroup(chosen: stats.BoolArray, members: Sequence[Case]) -> dict[str, Any]:
            figure, bounds = self._macro_auroc(probabilities[chosen], truth[chosen], members, seed)
            return {"auroc": figure, "auroc_ci": bounds}

        multi = self.settings.multi_label
        confidence = probabilities.max(1) if not multi else probabilities.ravel()
        hits = np.asarray((self._decisions(probabilities) & truth).any(1))
        correct = truth.ravel() if multi else hits
        return {
            "auroc": values,
            "auroc_ci": bounds,
            **{key: round(summary[key], 4) if key in summary else None for key in ("accuracy", "balanced_accuracy")},
            "accuracy_ci": self._accuracy_interval(probabilities, truth, cases, seed) if summary else None,
            "per_class": per_class,
            "calibration": {
                **stats.calibration(confidence, correct),
                "brier": round(float(((probabilities - truth) ** 2).sum(1).mean()), 4),
            }
            if summary
            else None,
            "subgroups": stats.subgroups(cases, subgroup),
        }

    def _accuracy_interval(
        self, probabilities: stats.FloatArray, truth: stats.BoolArray, cases: Sequence[Case], seed: int
    ) -> stats.Interval | None:
        weights = stats.resample_weights([case.patient for case in cases], seed)
        return stats.interval(stats.resampled_mean((self._decisions(probabilities) == truth).all(1), weights))

    def case_result(self, case: Case, outcome: Tensor) -> dict[str, Any]:
        probabilities = self._probabilities(outcome[None])[0]
        return {
            "label": case.label if isinstance(case.label, str) else list(case.label),
            "scores": {name: round(float(p), 6) for name, p in zip(self.settings.classes, probabilities, strict=True)},
        }

    def _columns(self) -> list[int]:
        """The classes that are told from the rest; of a single-label pair the first is the second's complement."""
        return [1] if self.out_channels == 2 and not self.settings.multi_label else list(range(self.out_channels))

    def _truth(self, cases: Sequence[Case]) -> stats.BoolArray:
        return np.array([[name in case.class_names for name in self.settings.classes] for case in cases], dtype=bool)

    def _probabilities(self, outcomes: Tensor) -> stats.FloatArray:
        return (outcomes.sigmoid() if self.settings.multi_label else outcomes.softmax(1)).double().numpy()

    def _decisions(self, probabilities: stats.FloatArray) -> stats.BoolArray:
        if self.settings.multi_label:
            return probabilities > 0.5
        decided: stats.BoolArray = probabilities == probabilities.max(1, keepdims=True)
        return decided

    def _threshold(self, validation: Tensor, cases: Sequence[Case], column: int) -> float | None:
        positive = self._truth(cases)[:, column]
        if not stats.enough(positive):
            return None
        return stats.youden_threshold(self._probabilities(validation)[:, column], positive)

    @staticmethod
    def _class_figures(
        scores: stats.FloatArray, positive: stats.BoolArray, groups: list[str], threshold: float | None, seed: int
    ) -> dict[str, Any]:
        value, bounds = stats.auroc_with_interval(scores, positive, groups, seed)
        figures: dict[str, Any] = {"auroc": value, "auroc_ci": bounds, "threshold": None, "roc": None}
        if value is not None:
            figures["roc"] = stats.roc_curve(scores, positive)
        for name, cases, hit in (("sensitivity", positive, scores > (threshold or 0)),
                                 ("specificity", ~positive, scores <= (threshold or 0))):  # fmt: skip
            shown = threshold is not None and value is not None
            weights = stats.resample_weights(groups, seed)[:, cases] if shown else None
            figures[name] = round(float(hit[cases].mean()), 4) if shown else None
            figures[f"{name}_ci"] = (
                None if weights is None else stats.interval(stats.resampled_mean(hit[cases], weights))
            )
        if threshold is not None:
            figures["threshold"] = round(threshold, 3)
        return figures

    def _macro_auroc(
        self, probabilities: stats.FloatArray, truth: stats.BoolArray, cases: Sequence[Case], seed: int
    ) -> tuple[float | None, stats.Interval | None]:
        columns = self._columns()
        if len(cases) == 0 or not all(stats.enough(truth[:, c]) for c in columns):
            return None, None
        weights = stats.resample_weights([case.patient for case in cases], seed)
        resampled = np.mean([stats.resampled_auroc(probabilities[:, c], truth[:, c], weights) for c in columns], axis=0)
        value = float(np.mean([stats.auroc(probabilities[:, c], truth[:, c]) for c in columns]))
        return round(value, 4), stats.interval(resampled)
