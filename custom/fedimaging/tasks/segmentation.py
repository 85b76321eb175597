"""Segmentation of volumes: the structures of an MRI or CT, voxel by voxel, from patches."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import compute_dice, compute_hausdorff_distance
from monai.networks.utils import one_hot
from monai.transforms import (
    ClassesToIndices,
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandCropByLabelClassesd,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    Spacing,
)
from monai.utils import convert_to_tensor
from pydantic import Field, model_validator
from scipy import ndimage
from torch import Tensor, nn

from fedimaging.datasets.manifest import Case, Manifest
from fedimaging.datasets.volumes import Volume, read_label, read_volume
from fedimaging.errors import FedImagingError, Reason
from fedimaging.networks.base import Output
from fedimaging.settings import ClassName, Settings
from fedimaging.tasks import statistics as stats
from fedimaging.tasks.base import Item, Task, TaskSettings, require_splits
from fedimaging.tasks.declared import (
    ClassKey,
    Count,
    Distance,
    DistanceInterval,
    DistanceQuartiles,
    Evaluation,
    Loss,
    Outgoing,
    Share,
    ShareInterval,
    ShareQuartiles,
    Subgroups,
)

AXES = ("left_right", "posterior_anterior", "inferior_superior")
"""The axes of a volume in RAS+ order, and what a flip along each swaps."""

_CENTRES = 1000
"""voxels of each class that are kept as centres of patches"""
_LARGEST = 2**29
"""voxels of a resampled volume; 2 GiB as float32"""
_LARGEST_PATCH = 2**24
_WINDOWS = 4
"""patches of a volume that the network sees at once in evaluation"""
_ISOTROPIC = 1.5
"""sides of a voxel that differ by more are not rotated into one another"""
_QUARTILES = (0.25, 0.5, 0.75)

Half = Annotated[float, Field(ge=0, le=0.5)]
Side = Annotated[int, Field(ge=8, le=1024)]
Millimetres = Annotated[float, Field(ge=0.1, le=20)]
Percent = Annotated[float, Field(ge=0, le=100)]


class IntensitySettings(Settings):
    """How the intensities of a volume become comparable."""

    percentiles: Annotated[list[Percent], Field(min_length=2, max_length=2)] = Field(default=[0.5, 99.5])
    """each volume is clipped to these of its own and then normalised to mean 0 and standard deviation 1"""
    window: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """lowest and highest value, the same for all volumes, mapped to -1 and 1, in place of the percentiles: for
    intensities with a meaning, such as Hounsfield units"""
    nonzero: bool = False
    """take percentiles, mean and deviation over the voxels that are not 0, and leave those that are: for images
    whose background was removed"""

    @model_validator(mode="after")
    def _ascending(self) -> "IntensitySettings":
        for low, high in (self.percentiles, self.window or (0, 1)):
            if low >= high:
                raise ValueError("the first number must be below the second")
        return self


class AugmentationSettings(Settings):
    """Random changes of a training patch; every one off at 0."""

    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 10.0
    shift: Half = 0.05
    """largest shift, as a share of the patch's side"""
    scale: Half = 0.1
    flip: list[Literal["left_right", "posterior_anterior", "inferior_superior"]] = Field(default=[])
    """axes along which half of the patches are flipped; not left_right where a class is left or right"""
    noise: Annotated[float, Field(ge=0, le=2)] = 0.1
    """standard deviation, in units of the normalised intensity"""
    brightness: Half = 0.1
    """largest change of the intensity by a factor, and by an offset"""
    contrast: Annotated[float, Field(ge=0, le=0.9)] = 0.2
    """gamma is drawn from 1 - contrast to 1 + contrast"""


class SegmentationSettings(TaskSettings):
    name: Literal["segmentation"] = "segmentation"
    classes: Annotated[list[ClassName], Field(min_length=1, max_length=100)]
    """the structures of the mask's values 1, 2 and so on; 0 is the background"""
    channels: Annotated[int, Field(ge=1, le=8)] = 1
    """images of one case, stacked"""
    spacing: Annotated[list[Millimetres], Field(min_length=3, max_length=3)]
    """sides of a voxel that every volume is resampled to, in mm, to the right, to the front and up"""
    patch_size: Annotated[list[Side], Field(min_length=3, max_length=3)]
    """sides of what the network sees at once, in voxels; a smaller volume is padded"""
    intensity: IntensitySettings = IntensitySettings()
    """how values are brought to one range"""
    augmentation: AugmentationSettings = AugmentationSettings()
    """random changes of training volumes"""
    background_in_dice: bool = False
    """whether the background's Dice is part of the loss; the cross-entropy always has it"""
    overlap: Annotated[float, Field(ge=0, le=0.9)] = 0.5
    """of neighbouring windows in evaluation, as a share of a side"""
    largest_component: bool = False
    """keep the largest connected component of each predicted structure only"""
    allow_empty: bool = False
    """whether a case may have no structure at all, as a brain without a lesion; otherwise it counts as unreadable"""

    @model_validator(mode="after")
    def _sensible(self) -> "SegmentationSettings":
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must differ from one another")
        if math.prod(self.patch_size) > _LARGEST_PATCH:
            raise ValueError(f"patch_size: at most {_LARGEST_PATCH} voxels")
        return self


class SegmentationMetrics(Outgoing):
    mean_dice: Share | None = None
    mean_hd95: Distance | None = None
    loss: Loss | None = None
    cases: Count | None = None


class StructureFigures(Outgoing):
    cases: Count | None
    dice: Share | None
    dice_ci: ShareInterval | None
    dice_quantiles: ShareQuartiles | None
    hd95: Distance | None
    hd95_ci: DistanceInterval | None
    hd95_quantiles: DistanceQuartiles | None
    false_positives: Share | None = None


class SubgroupFigures(Outgoing):
    cases: Count
    mean_dice: Share | None
    mean_dice_ci: ShareInterval | None


class SegmentationEvaluation(Evaluation):
    mean_dice: Share | None
    mean_dice_ci: ShareInterval | None
    mean_hd95: Distance | None
    mean_hd95_ci: DistanceInterval | None
    per_class: dict[ClassKey, StructureFigures]
    subgroups: Subgroups[SubgroupFigures]


class Segmentation(Task):
    """Each voxel is of one structure or the background.

    An item is a volume at the job's spacing: ``image`` (channels, X, Y, Z) float32, ``label`` (1, X, Y, Z) uint8,
    ``centres`` (classes + 1, n) int64, flat indices of voxels of each class, filled up with -1, and ``spacing`` (3,) of
    the file's voxels in mm. If that is not the job's spacing, ``truth`` (1, X', Y', Z') uint8 is the mask as it was
    drawn, on which predictions are judged.

    Outcomes have one column for each structure's Dice, for its HD95 in mm, for its predicted and for its true volume in
    ml, and the loss. Dice and HD95 are NaN where a case has no such structure. A structure that is missed as a whole
    has the diagonal of the volume as its HD95.
    """

    settings_type = SegmentationSettings
    key_metric = "mean_dice"
    declared_metrics = SegmentationMetrics
    declared_evaluation = SegmentationEvaluation
    output: ClassVar[Output] = "voxel"
    settings: SegmentationSettings
    spatial_dims = 3
    evaluation_batch = 1

    def __init__(self, settings: SegmentationSettings) -> None:
        super().__init__(settings)
        self.in_channels = settings.channels
        self.out_channels = len(settings.classes) + 1
        self.input_shape = tuple(settings.patch_size)

    def check(self, manifest: Manifest, where: str) -> None:
        if manifest.task != "segmentation":
            raise FedImagingError(
                f"{where}: the job learns a segmentation, the manifest is of another kind; index volumes with masks",
                Reason.BAD_MANIFEST,
            )
        if list(manifest.classes) != self.settings.classes:
            raise FedImagingError(
                f"{where}: the classes are {', '.join(manifest.classes)}, "
                f"the job's {', '.join(self.settings.classes)}; they must be equal, in the order of the mask's values; "
                "see `data index --classes`",
                Reason.BAD_MANIFEST,
            )
        require_splits(manifest, where)

    def load(self, root: Path, case: Case) -> Item:
        volume = read_volume(root / case.image)
        channels = volume.array.shape[0]
        if channels != self.settings.channels:
            raise FedImagingError(
                f"{root / case.image}: has {channels} channels, the job takes {self.settings.channels}",
                Reason.UNREADABLE_IMAGES,
            )
        self._check_size(volume, root / case.image)
        mask = read_label(
            root / str(case.label), volume, len(self.settings.classes), allow_empty=self.settings.allow_empty
        )
        truth = torch.from_numpy(mask)
        image = self._to_job_spacing(torch.from_numpy(self._normalise(volume.array)), volume.spacing)
        item = {"image": image, "label": truth, "spacing": torch.tensor(volume.spacing)}
        if self._is_resampled(volume.spacing):
            classes = self._to_job_spacing(one_hot(truth.float(), self.out_channels, dim=0), volume.spacing)
            item |= {"label": classes.argmax(0, keepdim=True).to(torch.uint8), "truth": truth}
        return item | {"centres": self._centres(item["label"])}

    def load_key(self) -> str:
        s = self.settings
        return f"segmentation-1/{len(s.classes)}/{s.channels}/{s.spacing}/{s.intensity}/{s.allow_empty}"

    def files(self, case: Case) -> tuple[str, ...]:
        return (case.image, str(case.label))

    def augmentation(self, seed: int) -> Callable[[Item], Item]:
        a, patch = self.settings.augmentation, self.settings.patch_size
        angles, shifts = self._angles(), [a.shift * side for side in patch]
        both = ["image", "label"]
        transform = Compose(
            [
                # Larger than the patch, so that turning it brings in what lies there and not padding.
                RandCropByLabelClassesd(
                    both,
                    label_key="label",
                    spatial_size=self._reach(angles, shifts),
                    num_classes=self.out_channels,
                    indices_key="centres",
                    allow_smaller=True,
                    warn=False,
                ),
                RandAffined(
                    both,
                    prob=1.0,
                    rotate_range=angles,
                    translate_range=shifts,
                    scale_range=[a.scale] * 3,
                    spatial_size=patch,
                    mode=["bilinear", "nearest"],
                    padding_mode=["border", "zeros"],
                    cache_grid=True,
                ),
                *(RandFlipd(both, prob=0.5, spatial_axis=AXES.index(axis)) for axis in sorted(set(a.flip))),
                *(
                    [RandAdjustContrastd("image", prob=0.3, gamma=(1 - a.contrast, 1 + a.contrast))]
                    if a.contrast
                    else []
                ),
                *([RandScaleIntensityd("image", prob=0.5, factors=a.brightness)] if a.brightness else []),
                *([RandShiftIntensityd("image", prob=0.5, offsets=a.brightness)] if a.brightness else []),
                *([RandGaussianNoised("image", prob=0.3, std=a.noise)] if a.noise else []),
            ]
        ).set_random_state(seed)

        def augment(item: Item) -> Item:
            centres = [row[row >= 0].numpy() for row in item["centres"]]
            patch = transform({"image": item["image"], "label": item["label"], "centres": centres})[0]
            return {"image": patch["image"].float(), "label": patch["label"].to(torch.uint8)}

        return augment

    def loss(self, cases: Sequence[Case]) -> nn.Module:
        """Dice (of the whole batch, so that a patch without a structure does not count as a miss) and cross-entropy."""
        return DiceCELoss(
            include_background=self.settings.background_in_dice, to_onehot_y=True, softmax=True, batch=True
        )

    def outcomes(self, network: Callable[[Tensor], Tensor], batch: Item) -> Tensor:
        logits = self.logits(network, batch["image"])
        loss = float(self.loss([])(logits, batch["label"]))
        spacing = tuple(batch["spacing"][0].tolist())
        truth = batch.get("truth", batch["label"])[0]
        predicted = one_hot(self.segment(logits, truth.shape[1:], spacing), self.out_channels, dim=0).bool().cpu()
        true = one_hot(truth, self.out_channels, dim=0).bool().cpu()
        dice = compute_dice(predicted[None], true[None], include_background=False)[0]
        distances = [_hd95(p, t, spacing) for p, t in zip(predicted[1:], true[1:], strict=True)]
        millilitres = math.prod(spacing) / 1000
        volumes = [mask[1:].sum((1, 2, 3)) * millilitres for mask in (predicted, true)]
        return torch.cat([dice, torch.tensor(distances), *volumes, torch.tensor([loss])]).float()[None]

    def logits(self, network: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        """Logits (1, classes + 1, X, Y, Z) of a whole volume (1, channels, X, Y, Z), window by window."""
        logits: Tensor = sliding_window_inference(
            image,
            self.settings.patch_size,
            _WINDOWS,
            network,
            overlap=self.settings.overlap,
            mode="gaussian",
            padding_mode="replicate",
        )
        return logits

    def segment(self, logits: Tensor, shape: Sequence[int], spacing: Sequence[float]) -> Tensor:
        """The predicted mask (1, *shape) uint8 in the voxels of the file, of ``spacing`` mm."""
        probabilities = logits[0].softmax(0)
        if self._is_resampled(spacing):
            probabilities = _resample(probabilities, self.settings.spacing, spacing, shape)
        mask = probabilities.argmax(0, keepdim=True).to(torch.uint8)
        return keep_largest_components(mask, self.out_channels) if self.settings.largest_component else mask

    def metrics(self, outcomes: Tensor, cases: Sequence[Case]) -> dict[str, float]:
        """Means over the cases that have a structure, and then over the structures."""
        dice, hd95, *_, loss = self._columns(outcomes)
        if not self._enough(dice).all():
            return {}
        return {
            "mean_dice": float(np.nanmean(dice, 0).mean()),
            "mean_hd95": float(np.nanmean(hd95, 0).mean()),
            "loss": float(loss.mean()),
            "cases": len(cases),
        }

    def evaluation(
        self, outcomes: Tensor, cases: Sequence[Case], validation: Tensor, validation_cases: Sequence[Case], seed: int
    ) -> dict[str, Any]:
        dice, hd95, predicted, _, _ = self._columns(outcomes)
        weights = stats.resample_weights([case.patient for case in cases], seed)

        def subgroup(chosen: stats.BoolArray, members: Sequence[Case]) -> dict[str, Any]:
            return _mean_figures("mean_dice", dice[chosen], stats.resample_weights([c.patient for c in members], seed))

        return {
            **_mean_figures("mean_dice", dice, weights),
            **_mean_figures("mean_hd95", hd95, weights),
            "per_class": {
                name: self._structure(dice[:, i], hd95[:, i], predicted[:, i], weights)
                for i, name in enumerate(self.settings.classes)
            },
            "subgroups": stats.subgroups(cases, subgroup),
        }

    def case_result(self, case: Case, outcome: Tensor) -> dict[str, Any]:
        dice, hd95, predicted, true, _ = (row[0] for row in self._columns(outcome[None]))
        figures: dict[str, float] = {
            "mean_dice": float(np.mean(dice[np.isfinite(dice)])) if np.isfinite(dice).any() else math.nan
        }
        for i, name in enumerate(self.settings.classes):
            figures |= {
                f"dice {name}": float(dice[i]),
                f"hd95 {name}": float(hd95[i]),
                f"predicted ml {name}": float(predicted[i]),
                f"true ml {name}": float(true[i]),
            }
        return {name: round(value, 4) if math.isfinite(value) else None for name, value in figures.items()}

    def _check_size(self, volume: Volume, path: Path) -> None:
        sides = zip(volume.array.shape[1:], volume.spacing, self.settings.spacing, strict=True)
        voxels = math.prod(side * own / job for side, own, job in sides) * self.out_channels
        if self._is_resampled(volume.spacing) and voxels > _LARGEST:
            raise FedImagingError(
                f"{path}: would have {voxels / self.out_channels / 1e6:.0f} million voxels at the job's spacing; set a "
                "coarser task.spacing",
                Reason.UNREADABLE_IMAGES,
            )

    def _is_resampled(self, spacing: Sequence[float]) -> bool:
        """Whether voxels of this size are not the job's; 1 % is nothing."""
        return not np.allclose(spacing, self.settings.spacing, rtol=0.01)

    def _to_job_spacing(self, values: Tensor, spacing: Sequence[float]) -> Tensor:
        return _resample(values, spacing, self.settings.spacing) if self._is_resampled(spacing) else values

    def _normalise(self, array: stats.FloatArray) -> stats.FloatArray:
        """Intensities (C, X, Y, Z) clipped and scaled, each channel by itself."""
        settings = self.settings.intensity
        if settings.window is not None:
            low, high = settings.window
            return ((array.clip(low, high) - low) * (2 / (high - low)) - 1).astype(np.float32)
        result = np.zeros_like(array, dtype=np.float32)
        for channel, normalised in zip(array, result, strict=True):
            inside = channel != 0 if settings.nonzero and channel.any() else np.ones_like(channel, dtype=bool)
            values = channel[inside].astype(np.float64)
            values = values.clip(*np.percentile(values, settings.percentiles))
            normalised[inside] = (values - values.mean()) / (values.std() or 1)
        return result

    def _centres(self, label: Tensor) -> Tensor:
        rows = ClassesToIndices(num_classes=self.out_channels, max_samples_per_class=_CENTRES)(label)
        centres = torch.full((self.out_channels, _CENTRES), -1, dtype=torch.int64)
        for row, indices in zip(centres, rows, strict=True):
            row[: len(indices)] = torch.as_tensor(np.asarray(indices))
        return centres

    def _angles(self) -> list[float]:
        """The largest rotation about each axis, in radians; none where it would mix long and short sides of voxels."""
        largest, angles = math.radians(self.settings.augmentation.rotate_degrees), []
        for axis in range(3):
            sides = [side for i, side in enumerate(self.settings.spacing) if i != axis]
            angles.append(largest if max(sides) <= _ISOTROPIC * min(sides) else 0.0)
        return angles

    def _reach(self, angles: Sequence[float], shifts: Sequence[float]) -> list[int]:
        """Sides of the region around a patch that augmentation can bring into it, in voxels."""
        patch, scale = self.settings.patch_size, self.settings.augmentation.scale
        reach = []
        for i, side in enumerate(patch):
            # A rotation about one of the other two axes brings in voxels from along the third.
            turned = sum(math.sin(min(angles[3 - i - j], math.pi / 2)) * patch[j] for j in range(3) if j != i)
            reach.append(math.ceil((side + turned) * (1 + scale) + 2 * shifts[i]))
        return reach

    def _columns(self, outcomes: Tensor) -> tuple[stats.FloatArray, ...]:
        """Dice, HD95, predicted and true volume, each (cases, structures), and the loss (cases, 1)."""
        count = len(self.settings.classes)
        return tuple(part.double().numpy() for part in outcomes.split([count] * 4 + [1], dim=1))

    def _enough(self, dice: stats.FloatArray) -> stats.BoolArray:
        """Of which structures there are enough cases, (structures,)."""
        enough: stats.BoolArray = np.isfinite(dice).sum(0) >= stats.MIN_CELL
        return enough

    def _structure(
        self, dice: stats.FloatArray, hd95: stats.FloatArray, predicted: stats.FloatArray, weights: stats.FloatArray
    ) -> dict[str, Any]:
        """One structure's figures over the cases that have it, and how often it is seen where it is not."""
        present = np.isfinite(dice)
        counts = stats.withhold_counts({"present": int(present.sum()), "absent": int((~present).sum())})
        figures: dict[str, Any] = {"cases": counts["present"]}
        for name, values in (("dice", dice), ("hd95", hd95)):
            enough = bool(present.sum() >= stats.MIN_CELL)
            figures |= _mean_figures(name, values[:, None], weights)
            figures[f"{name}_quantiles"] = stats.quantiles(values[present], _QUARTILES) if enough else None
        if (~present).sum() >= stats.MIN_CELL:
            figures["false_positives"] = round(float((predicted[~present] > 0).mean()), 4)
        return figures


def keep_largest_components(mask: Tensor, classes: int) -> Tensor:
    """A mask (1, X, Y, Z) of 0 to ``classes`` - 1 with the largest connected component of each structure only."""
    kept = torch.zeros_like(mask)
    for value in range(1, classes):
        components, count = ndimage.label((mask[0] == value).cpu().numpy(), structure=np.ones((3, 3, 3)))
        if count:
            largest = np.bincount(components.ravel())[1:].argmax() + 1
            kept[0][torch.from_numpy(components == largest).to(mask.device)] = value
    return kept


def _resample(
    values: Tensor, spacing: Sequence[float], target: Sequence[float], shape: Sequence[int] | None = None
) -> Tensor:
    """Values (C, X, Y, Z) in voxels of ``spacing`` mm, resampled to ``target`` mm; the first voxel stays in place."""
    image = MetaTensor(values, affine=torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64)))
    moved = Spacing(target, mode="bilinear", padding_mode="border", align_corners=True)(
        image, output_spatial_shape=shape
    )
    return convert_to_tensor(moved, dtype=torch.float32, track_meta=False)


def _hd95(predicted: Tensor, true: Tensor, spacing: Sequence[float]) -> float:
    """The 95th percentile of the Hausdorff distance of two masks (X, Y, Z) in mm."""
    if not true.any():
        return math.nan
    if not predicted.any():
        return math.hypot(*(side * step for side, step in zip(true.shape, spacing, strict=True)))
    distance = compute_hausdorff_distance(
        predicted[None, None], true[None, None], include_background=True, percentile=95, spacing=list(spacing)
    )
    return float(distance)


def _mean_figures(name: str, values: stats.FloatArray, weights: stats.FloatArray) -> dict[str, Any]:
    """Mean over the structures of the mean over the cases that have it, of ``values`` (cases, structures), and its
    bootstrap interval by ``weights`` (resamples, cases); both None where a structure has too few cases.
    """
    present = np.isfinite(values)
    if (present.sum(0) < stats.MIN_CELL).any():
        return {name: None, f"{name}_ci": None}
    pairs = list(zip(values.T, present.T, strict=True))
    resampled = np.mean([stats.resampled_mean(column[has], weights[:, has]) for column, has in pairs], axis=0)
    mean = float(np.mean([column[has].mean() for column, has in pairs]))
    return {name: round(mean, 4), f"{name}_ci": stats.interval(resampled)}
