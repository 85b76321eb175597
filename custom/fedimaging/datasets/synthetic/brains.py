"""Synthetic brain MRI: who has which study with how many lesions, and the NIfTI files of volume and mask.

Hospitals differ in field strength, sequence, coil, noise, resolution, obliquity, storage order and lesion load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform
from numpy.typing import NDArray

from fedimaging.datasets.manifest import Case, Manifest
from fedimaging.datasets.synthetic.brain_phantom import (
    EXTENT,
    MOST_LESIONS,
    Floats,
    Grid,
    Scanner,
    Subject,
    flair,
    rotation,
)
from fedimaging.datasets.synthetic.hospitals import (
    MOST_SITES,
    Plan,
    Request,
    age_group,
    make_manifest,
    patient_id,
    studies_per_patient,
)
from fedimaging.errors import FedImagingError

PHANTOM = 1
"""Version of the pictures: one more whenever the same seed gives other voxels."""

CLASSES = ["lesion"]


@dataclass(frozen=True)
class BrainHospital:
    """What is typical of one hospital.

    Args:
        name: the site, a folder below the data root.
        voxel: the sides from right to left, back to front and feet to head, in units of the smallest.
        axes: where the stored axes run to, as nibabel has it: "RAS", "LPS", ...
        oblique: by how many degrees the slices are tilted towards the line from forehead to neck.
        lesions: usual number of those who have any.
        lesion_free: share of patients without a lesion.
    """

    name: str
    vendor: str
    voxel: tuple[float, float, float] = (1.0, 1.0, 1.0)
    axes: str = "RAS"
    oblique: float = 0.0
    lesions: float = 4.0
    lesion_free: float = 0.12
    scanner: Scanner = field(default_factory=Scanner)

    def sides(self, longer: int) -> tuple[float, float, float]:
        """The voxel's sides in mm with `longer` of the smallest on the field of view's longest side."""
        x, y, z = (max(EXTENT) / longer * side / min(self.voxel) for side in self.voxel)
        return x, y, z

    def matrix(self, longer: int) -> tuple[int, int, int]:
        """Voxels from right to left, back to front and feet to head."""
        x, y, z = (max(8, round(side / step)) for side, step in zip(EXTENT, self.sides(longer), strict=True))
        return x, y, z


_PRESETS = (
    BrainHospital(name="hospital-a", vendor="Vendor A"),
    BrainHospital(
        name="hospital-b",
        vendor="Vendor B",
        voxel=(1.0, 1.0, 2.0),
        axes="LPS",
        oblique=12.0,
        lesions=6.0,
        lesion_free=0.06,
        scanner=Scanner(field=1.5, repetition=8000, echo=130, inversion=2200, bias=0.18, noise=0.09, scale=150),
    ),
    BrainHospital(
        name="hospital-c",
        vendor="Vendor C",
        voxel=(1.5, 1.0, 1.0),
        axes="PSR",
        oblique=-4.0,
        lesions=2.5,
        lesion_free=0.22,
        scanner=Scanner(repetition=7500, echo=90, inversion=2400, bias=0.28, noise=0.06, blur=0.5, scale=900),
    ),
)


def typical_brain_hospitals(count: int) -> list[BrainHospital]:
    """hospital-a, hospital-b, ...: three kinds of department, and from the fourth on variants of them."""
    if not 1 <= count <= MOST_SITES:
        raise FedImagingError(f"sites {count}: give a number from 1 to {MOST_SITES}")
    return [_variant(index) for index in range(count)]


def _variant(index: int) -> BrainHospital:
    preset = _PRESETS[index % len(_PRESETS)]
    if index < len(_PRESETS):
        return preset
    rng, letter = np.random.default_rng((index, 78)), chr(ord("a") + index)
    scanner = replace(
        preset.scanner,
        field=3.0 if preset.scanner.field < 2 else 1.5,
        echo=float(preset.scanner.echo * rng.uniform(0.9, 1.1)),
        bias=float(preset.scanner.bias * rng.uniform(0.7, 1.3)),
        noise=float(preset.scanner.noise * rng.uniform(0.8, 1.2)),
        scale=float(preset.scanner.scale * rng.uniform(0.5, 2)),
    )
    return replace(
        preset,
        name=f"hospital-{letter}",
        vendor=f"Vendor {letter.upper()}",
        oblique=float(preset.oblique + rng.uniform(-5, 5)),
        lesions=float(preset.lesions * rng.uniform(0.7, 1.4)),
        scanner=scanner,
    )


@dataclass(frozen=True)
class BrainStudy:
    """One study with one FLAIR volume and the mask of its lesions.

    Args:
        image: of the volume's file, relative to the manifest, as `mask`.
        site: the hospital's number, 0 for the first.
        number: of the patient's study, 1 for the first.
    """

    image: str
    mask: str
    hospital: BrainHospital
    site: int
    patient: int
    number: int
    sex: str
    age: int
    lesions: int
    request: Request

    @property
    def key(self) -> tuple[int, ...]:
        """What seeds this study's random streams."""
        return (self.request.seed, self.site + 1, self.patient, self.number)

    def grid(self) -> Grid:
        """The voxels: tilted as the hospital does, and a little differently in each study."""
        rng = np.random.default_rng((*self.key, 41))
        sides, shape = self.hospital.sides(self.request.longer), self.hospital.matrix(self.request.longer)
        tilt = rotation((self.hospital.oblique + float(rng.normal(0, 1.5)) * bool(self.hospital.oblique), 0, 0))
        affine = np.eye(4)
        affine[:3, :3] = tilt * sides
        affine[:3, 3] = rng.uniform(-3, 3, 3) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
        return Grid(shape, sides, affine)

    def volume(self) -> tuple[Floats, NDArray[np.bool_], NDArray[np.float64]]:
        """Intensities and lesions (X, Y, Z), and the affine to RAS+ mm."""
        grid = self.grid()
        values, lesions = flair(grid, Subject(self.key[:3], self.key, self.age, self.lesions), self.hospital.scanner)
        return values, lesions, grid.affine

    def write(self, folder: Path) -> None:
        """Write both NIfTI files below `folder`."""
        values, lesions, affine = self.volume()
        stored = np.clip(np.rint(values), 0, np.iinfo(np.int16).max).astype(np.int16)
        for name, array in ((self.image, stored), (self.mask, lesions.astype(np.uint8))):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _stored(array, affine, self.hospital.axes).to_filename(path)


def _stored(array: NDArray[np.int16] | NDArray[np.uint8], affine: NDArray[np.float64], axes: str) -> nib.Nifti1Image:
    """A NIfTI image with the axes in the order of the hospital, and sform and qform that agree."""
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes))
    image = nib.Nifti1Image(array, affine).as_reoriented(turn)
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"Synthetic phantom, of no patient"
    return image


def plan_brains(hospital: BrainHospital, site: int, cases: int, request: Request) -> Plan:
    """Brain volumes for segmentation: who has which study with how many lesions, and in which split."""
    if request.multi_label:
        raise FedImagingError("--multi-label: is for classification; leave it out")
    rng = np.random.default_rng((request.seed, site + 1, 40))
    counts = studies_per_patient(cases, rng)
    healthy = set(rng.permutation(len(counts))[: max(1, round(hospital.lesion_free * len(counts)))].tolist())
    items: list[BrainStudy] = []
    for patient, studies in enumerate(counts, start=1):
        first = 0 if patient - 1 in healthy else 1 + int(rng.poisson(max(0.0, hospital.lesions - 1)))
        lesions = [first] + [int(rng.poisson(0.7)) * bool(first) for _ in range(studies - 1)]
        items.extend(_studies(hospital, site, patient, np.cumsum(lesions).tolist(), request))
    return Plan(hospital, _manifest(items, hospital, request), items)


def _studies(
    hospital: BrainHospital, site: int, patient: int, lesions: Sequence[int], request: Request
) -> Iterator[BrainStudy]:
    """One study for each number of lesions."""
    rng = np.random.default_rng((request.seed, site + 1, patient, 42))
    sex = "F" if rng.random() < 0.6 else "M"
    age = int(np.clip(rng.normal(48, 15), 19, 92))
    name = patient_id(site, patient)
    for number, count in enumerate(lesions, start=1):
        yield BrainStudy(
            image=f"images/{name}/{number}.nii.gz",
            mask=f"masks/{name}/{number}.nii.gz",
            hospital=hospital,
            site=site,
            patient=patient,
            number=number,
            sex=sex,
            age=age,
            lesions=min(count, MOST_LESIONS),
            request=request,
        )
        age += int(rng.integers(0, 3))


def _manifest(items: Sequence[BrainStudy], hospital: BrainHospital, request: Request) -> Manifest:
    cases = [
        Case(
            image=item.image,
            label=item.mask,
            patient=patient_id(item.site, item.patient),
            age_group=age_group(item.age),
            sex=item.sex,
            vendor=hospital.vendor,
        )
        for item in items
    ]
    with_lesions = sum(bool(item.lesions) for item in items)
    return make_manifest(
        hospital,
        request,
        cases,
        {patient_id(item.site, item.patient): "lesion" if item.lesions else "" for item in items},
        phantom=PHANTOM,
        matrix=hospital.matrix(request.longer),
        made={"cases_with": {"lesion": with_lesions}, "empty_masks": len(items) - with_lesions},
        modality="MR",
        task="segmentation",
        classes=CLASSES,
    )
