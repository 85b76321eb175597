"""Synthetic hospitals: what is typical of each, and what a plan for one holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from fedimaging import __version__
from fedimaging.datasets.manifest import SPLITS, Case, Manifest, assign_splits
from fedimaging.datasets.synthetic.phantom import Imaging
from fedimaging.errors import FedImagingError

MOST_SITES = 26


@dataclass(frozen=True)
class Hospital:
    """What is typical of one hospital.

    Args:
        name: the site, a folder below the data root.
        shape: rows and columns at a longer side of 256; scaled to the size asked for.
        height: of the field of view, in cm.
        bits: stored per pixel, 8 to 16.
        voi: how stored values become grey: "window", "sigmoid" or "lut".
        bedside: share of AP views, taken at the bed.
        prevalence: shares of consolidation, effusion and, in multi-label data, both; the rest is normal.
        exposure: typical tube current times time, in mAs.
    """

    name: str
    vendor: str
    model: str
    detector: str = "DIRECT"
    shape: tuple[int, int] = (256, 216)
    height: float = 42.0
    bits: int = 12
    photometric: str = "MONOCHROME2"
    voi: str = "window"
    transfer_syntax: str = ExplicitVRLittleEndian
    bedside: float = 0.1
    prevalence: tuple[float, float, float] = (0.26, 0.24, 0.08)
    kvp: int = 120
    exposure: float = 2.0
    imaging: Imaging = field(default_factory=Imaging)

    def matrix(self, longer: int) -> tuple[int, int]:
        """Rows and columns with `longer` pixels on the longer side."""
        rows, cols = (max(16, round(side * longer / max(self.shape))) for side in self.shape)
        return rows, cols


_PRESETS = (
    Hospital(name="hospital-a", vendor="Vendor A", model="A-DR 1"),
    Hospital(
        name="hospital-b",
        vendor="Vendor B",
        model="B-CR 2",
        detector="STORAGE",
        shape=(256, 256),
        height=40.0,
        bits=10,
        photometric="MONOCHROME1",
        voi="lut",
        transfer_syntax=JPEG2000Lossless,
        bedside=0.3,
        prevalence=(0.32, 0.28, 0.1),
        kvp=110,
        exposure=3.2,
        imaging=Imaging(
            exposure=0.45, scatter=0.28, blur=0.13, local_contrast=0.15, gamma=1.12, collimated=0.6, devices=0.25
        ),
    ),
    Hospital(
        name="hospital-c",
        vendor="Vendor C",
        model="C-Mobile 3",
        detector="SCINTILLATOR",
        shape=(208, 256),
        height=35.0,
        bits=14,
        voi="sigmoid",
        transfer_syntax=RLELossless,
        bedside=0.75,
        prevalence=(0.22, 0.26, 0.1),
        kvp=95,
        exposure=2.4,
        imaging=Imaging(
            exposure=0.25, scatter=0.35, blur=0.1, local_contrast=0.45, gamma=0.9, collimated=0.3, devices=0.45
        ),
    ),
)


def typical_hospitals(count: int) -> list[Hospital]:
    """hospital-a, hospital-b, ...: three kinds of department, and from the fourth on variants of them."""
    if not 1 <= count <= MOST_SITES:
        raise FedImagingError(f"sites {count}: give a number from 1 to {MOST_SITES}")
    return [_variant(index) for index in range(count)]


def _variant(index: int) -> Hospital:
    preset = _PRESETS[index % len(_PRESETS)]
    if index < len(_PRESETS):
        return preset
    rng, letter = np.random.default_rng((index, 77)), chr(ord("a") + index)
    imaging = replace(
        preset.imaging,
        exposure=float(preset.imaging.exposure * rng.uniform(0.6, 1.5)),
        gamma=float(preset.imaging.gamma * rng.uniform(0.92, 1.08)),
    )
    consolidation, effusion, both = (float(share * rng.uniform(0.8, 1.2)) for share in preset.prevalence)
    return replace(
        preset,
        name=f"hospital-{letter}",
        vendor=f"Vendor {letter.upper()}",
        model=f"{letter.upper()}{preset.model[1:]}",
        bedside=float(np.clip(preset.bedside * rng.uniform(0.6, 1.4), 0.05, 0.95)),
        prevalence=(consolidation, effusion, both),
        imaging=imaging,
    )


@dataclass(frozen=True)
class Request:
    """What `data synth` was asked for, the same for all hospitals; `longer` is the longer side in pixels or voxels."""

    dataset: str
    longer: int
    multi_label: bool
    seed: int
    concentration: float | None = None
    """of the Dirichlet distribution that a hospital's share of each class is drawn from; None for the typical shares"""


def patient_id(site: int, patient: int) -> str:
    """The ID of a site's patient, both counted from 0 and 1."""
    return f"SYN-{chr(ord('A') + site)}-{patient:05d}"


def age_group(age: int) -> str:
    """A coarse group of an age in years."""
    low = 18 if age < 40 else 40 if age < 60 else 60 if age < 80 else 80
    return f"{low}+" if low == 80 else f"{low}-{'39' if low == 18 else low + 19}"


def studies_per_patient(cases: int, rng: np.random.Generator) -> list[int]:
    """One to three studies for each patient, `cases` in all."""
    counts: list[int] = []
    while (left := cases - sum(counts)) > 0:
        counts.append(min(left, int(rng.choice((1, 2, 3), p=(0.78, 0.16, 0.06)))))
    return counts


def make_manifest(
    hospital: Named,
    request: Request,
    cases: Iterable[Case],
    strata: Mapping[str, str],
    *,
    phantom: int,
    matrix: Sequence[int],
    made: Mapping[str, Any] | None = None,
    **header: Any,
) -> Manifest:
    """A hospital's cases, split by patient.

    Args:
        strata: each patient's; they are spread over the splits alike.
        phantom: version of the pictures.
        matrix: of a picture, in pixels or voxels.
        made: what else is said of how it was made.
        header: of the manifest: modality, task and classes.
    """
    split_of = assign_splits(strata, seed=request.seed, strata=strata)
    splits: dict[str, list[Case]] = {split: [] for split in SPLITS}
    for case in cases:
        splits[split_of[case.patient]].append(case)
    return Manifest(
        name=request.dataset,
        made={
            "by": f"fedimaging {__version__}",
            "source": "synthetic",
            "synthetic": True,
            "seed": request.seed,
            "phantom": phantom,
            "hospital": hospital.name,
            "matrix": list(matrix),
            **(made or {}),
            "settings": hashlib.sha256(repr((hospital, request)).encode()).hexdigest()[:16],
        },
        training=splits["training"],
        validation=splits["validation"],
        test=splits["test"],
        **header,
    )


class Named(Protocol):
    """A hospital of any task."""

    @property
    def name(self) -> str: ...


class Item(Protocol):
    """Something that writes one case's files below the manifest's folder; picklable."""

    def write(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Plan:
    """All that will be made for one hospital; cheap, and the same for the same arguments."""

    hospital: Named
    manifest: Manifest
    items: Sequence[Item]
