"""Slices of a synthetic volume with the contours of its mask and of what the picked model predicts."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fedimaging.datasets.manifest import Manifest
from fedimaging.networks import build_network
from fedimaging.report.examples import CONTOURS
from fedimaging.tasks.segmentation import Segmentation
from fedimaging.training.settings import JobSettings

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}
"""The planes and the axis of a volume (X, Y, Z) in RAS+ order that each is at right angles to."""

_LONGER = 336
_LINE = 2


def slice_images(settings: dict[str, Any], model: Path, manifest: Manifest, root: Path) -> dict[str, Image.Image]:
    """Slices of the first test case that has a structure, each where the mask is largest.

    Args:
        settings: the job's.
        model: file of the global model, from this machine.
        manifest: of a synthetic dataset, in the folder `root`.

    Returns:
        {plane: picture}, none without a segmentation job or such a case.

    Raises:
        FedImagingError: the settings, the model or the case cannot be used.
    """
    from fedimaging.federation.persistor import load_weights

    job = JobSettings(settings)
    task = job.task
    if not isinstance(task, Segmentation):
        return {}
    item = next((item for case in manifest.test if (item := task.load(root, case))["label"].any()), None)
    if item is None:
        return {}
    network = build_network(
        job.network,
        spatial_dims=task.spatial_dims,
        in_channels=task.in_channels,
        out_channels=task.out_channels,
        seed=job.seed,
    ).eval()
    load_weights(network, model)
    with torch.inference_mode():
        logits = task.logits(lambda windows: network(windows).float(), item["image"][None])
    spacing = task.settings.spacing
    predicted = task.segment(logits, item["label"].shape[1:], spacing)
    masks = {"mask": item["label"][0].numpy(), "predicted": predicted[0].numpy()}
    return {plane: _picture(item["image"][0].numpy(), masks, axis, spacing) for plane, axis in PLANES.items()}


def _picture(
    volume: NDArray[np.float32], masks: dict[str, NDArray[np.uint8]], axis: int, spacing: list[float]
) -> Image.Image:
    """One slice as radiologists look at it: the patient's right on the left side, the front or the head on top."""
    others = tuple(i for i in range(3) if i != axis)
    index = int((masks["mask"] > 0).sum(axis=others).argmax())
    sides = [volume.shape[i] * spacing[i] for i in others]
    width, height = (max(1, round(side * _LONGER / max(sides))) for side in sides)
    low, high = np.percentile(volume, [1, 99.5])
    grey = ((volume.take(index, axis) - low) / max(high - low, 1e-6)).clip(0, 1) * 255
    flat = Image.fromarray(_turned(grey.astype(np.uint8), axis)).resize((width, height), Image.Resampling.BICUBIC)
    picture = np.stack([np.asarray(flat)] * 3, axis=-1)
    for name, colour in CONTOURS.items():
        mask = Image.fromarray(_turned(np.take(masks[name], index, axis=axis), axis)).resize(
            (width, height), Image.Resampling.NEAREST
        )
        picture[_contour(np.asarray(mask))] = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return Image.fromarray(picture)


def _turned(values: NDArray[Any], axis: int) -> NDArray[Any]:
    """A slice (first axis, second axis) as rows from top to bottom and columns from left to right."""
    rows = values.T[::-1]
    return np.ascontiguousarray(rows if axis == 0 else rows[:, ::-1])


def _contour(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The outermost pixels of each structure, `_LINE` wide: the page shows pictures at about half their size."""
    inner = np.ones(mask.shape, dtype=bool)
    for shift, axis in itertools.product((_LINE, -_LINE), (0, 1)):
        inner &= np.roll(mask, shift, axis) == mask
    contour: NDArray[np.bool_] = (mask > 0) & ~inner
    return contour
