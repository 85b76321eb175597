"""Example images for the report: of synthetic hospitals only, and only on the machine that simulated them."""

import base64
import json
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedimaging.datasets.images import read_image
from fedimaging.datasets.manifest import Manifest
from fedimaging.datasets.site import resolve
from fedimaging.errors import FedImagingError

PIXELS = 224
CONTOURS = {"mask": "#00c48c", "predicted": "#ff8c1a"}


def example_images(workspace: Path, settings: dict[str, Any], sites: Iterable[str]) -> dict[str, dict[str, str]]:
    """A few images per hospital, when and only when the hospital's manifest says that it is synthetic.

    Of a classification one training image of each class; of a segmentation slices of one test volume, with the contours
    of its mask and of what the best global model predicts.

    Args:
        workspace: a simulator workspace; anything else, such as a downloaded job, gives nothing.
        settings: the job's client and server configuration, which names the dataset.
        sites: the hospitals.

    Returns:
        {site: {class or plane: PNG as a data URL}} without the hospitals that have none; a multi-label case without a
        finding is called "no finding".
    """
    names = sorted(_dataset_names(settings))
    found: dict[str, dict[str, str]] = {}
    for site in sites:
        for name in names:
            if images := _site_examples(workspace, settings, name, site):
                found[site] = images
                break
    return found


def _dataset_names(settings: Any) -> set[str]:
    """Each value of a "dataset" setting, at any depth."""
    if isinstance(settings, list):
        return set().union(*map(_dataset_names, settings))
    if not isinstance(settings, dict):
        return set()
    named = {value for key, value in settings.items() if key == "dataset" and isinstance(value, str)}
    return named.union(*map(_dataset_names, settings.values()))


def _site_examples(workspace: Path, settings: dict[str, Any], name: str, site: str) -> dict[str, str]:
    """The examples of one hospital; none where its dataset is absent, faulty or real: no report fails over pictures."""
    try:
        located = _locate(workspace, name, site)
        if located is None:
            return {}
        manifest, root = located
        if not manifest.synthetic:
            return {}
        if manifest.task == "segmentation":
            return _slices(workspace, settings, manifest, root)
        return {label: _data_url(_grey(read_image(root / image))) for label, image in _choose(manifest)}
    except (FedImagingError, OSError, LookupError, TypeError):
        return {}


def _locate(workspace: Path, name: str, site: str) -> tuple[Manifest, Path] | None:
    simulate = workspace / "simulate.json"
    data = json.loads(simulate.read_text(encoding="utf-8")).get("data") if simulate.is_file() else None
    if isinstance(data, str) and Path(site).name == site and Path(name).name == name:
        path = Path(data) / site / name / "manifest.json"
        if path.is_file():
            manifest = Manifest.read(path)
            manifest.check_files(path.parent)
            return manifest, path.parent
    if (workspace / "local" / "datasets.yml").is_file():
        dataset = resolve(name, site, local=workspace / "local")
        return dataset.manifest, dataset.root
    return None


def _choose(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """The first training case that has a class and no other."""
    for label in manifest.classes:
        case = next((case for case in manifest.training if case.class_names == (label,)), None)
        if case:
            yield label, case.image
    case = next((case for case in manifest.training if not case.class_names), None)
    if case:
        yield "no finding", case.image


def _slices(workspace: Path, settings: dict[str, Any], manifest: Manifest, root: Path) -> dict[str, str]:
    models = sorted(workspace.glob("server/*/app_server/best_FL_global_model.pt"))
    executors = (settings.get("client") or {}).get("executors") or []
    if not models or not executors:
        return {}
    from fedimaging.report.slices import slice_images

    arguments = executors[0]["executor"]["args"]
    return {plane: _data_url(picture) for plane, picture in slice_images(arguments, models[0], manifest, root).items()}


def _grey(image: np.ndarray) -> Image.Image:
    """A (1, H, W) image in [0, 1] as a small 8-bit picture."""
    picture = Image.fromarray(np.round(np.clip(image[0], 0, 1) * 255).astype(np.uint8))
    picture.thumbnail((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    return picture


def _data_url(picture: Image.Image) -> str:
    buffer = BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
