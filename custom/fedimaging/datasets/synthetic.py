"""Synthetic hospitals: DICOM DX files of chest phantoms with a manifest per hospital, `python -m fedimaging data synth`.

Hospitals differ in vendor, matrix, bit depth, photometric interpretation, VOI, transfer syntax, exposure, views and prevalence.
A case's finding shows in the lungs only: no tag, matrix size or grey-level statistic is drawn from it.
"""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import (
    PYDICOM_IMPLEMENTATION_UID,
    UID,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    generate_uid,
)
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from fedimaging import __version__
from fedimaging.datasets.manifest import SPLITS, Case, Manifest, assign_splits
from fedimaging.datasets.phantom import Imaging, Subject, radiograph
from fedimaging.errors import FedImagingError, Reason

PHANTOM = 1
"""Version of the pictures: one more whenever the same seed gives other pixels."""

SIZES = {"small": 256, "full": 1024}
CASES = (260, 200, 140)
FEWEST_CASES = 12
MOST_SITES = 26
CONTRAST = 1.0

_DATASET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NORMAL: frozenset[str] = frozenset()
_BOTH = frozenset({"consolidation", "effusion"})


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
    """What `data synth` was asked for, the same for all hospitals."""

    dataset: str
    longer: int
    multi_label: bool
    seed: int


class Item(Protocol):
    """Something that writes one case's files below the manifest's folder; picklable."""

    def write(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Plan:
    """All that will be made for one hospital; cheap, and the same for the same arguments."""

    hospital: Hospital
    manifest: Manifest
    items: Sequence[Item]


@dataclass(frozen=True)
class Radiograph:
    """One study with one DX image.

    Args:
        path: of the file, relative to the manifest.
        site: the hospital's number, 0 for the first.
        number: of the patient's study, 1 for the first.
    """

    path: str
    hospital: Hospital
    site: int
    patient: int
    number: int
    sex: str
    born: date
    taken: date
    view: str
    findings: frozenset[str]
    request: Request

    @property
    def age(self) -> int:
        """In whole years, on the day of the study."""
        return (
            self.taken.year - self.born.year - ((self.taken.month, self.taken.day) < (self.born.month, self.born.day))
        )

    @property
    def patient_id(self) -> str:
        return _patient_id(self.site, self.patient)

    @property
    def key(self) -> tuple[int, ...]:
        """What seeds this study's random streams."""
        return (self.request.seed, self.site + 1, self.patient, self.number)

    def image(self) -> NDArray[np.float32]:
        """What a viewer shows: float32 (rows, cols), 0 black and 1 white."""
        shape = self.hospital.matrix(self.request.longer)
        subject = Subject(self.key[:3], self.key, self.sex, self.age, self.view)
        imaging = replace(self.hospital.imaging, exposure=self.hospital.imaging.exposure * self._dose())
        size = (self.hospital.height, self.hospital.height * shape[1] / shape[0])
        return radiograph(shape, size, subject, self.findings, imaging, CONTRAST)

    def write(self, folder: Path) -> None:
        """Write the DICOM file below `folder`."""
        path = folder / self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        _dicom(self).save_as(path, enforce_file_format=True)

    def _dose(self) -> float:
        return float(np.random.default_rng((*self.key, 21)).lognormal(0, 0.25))

    def uid(self, *parts: object) -> UID:
        """The same UID for the same parts in the same request, and another one otherwise."""
        made_of = (self.request.dataset, self.request.seed, self.hospital.name, *parts)
        return generate_uid(entropy_srcs=["fedimaging", *map(str, made_of)])


def _patient_id(site: int, patient: int) -> str:
    return f"SYN-{chr(ord('A') + site)}-{patient:05d}"


def _allocate(cases: int, shares: Mapping[frozenset[str], float]) -> list[frozenset[str]]:
    """`cases` findings in these shares by largest remainder, each at least once."""
    wanted = {name: max(1.0, share * cases) for name, share in shares.items()}
    most = max(wanted, key=lambda name: wanted[name])
    wanted[most] -= sum(wanted.values()) - cases
    counts = {name: int(value) for name, value in wanted.items()}
    by_remainder = sorted(wanted, key=lambda name: counts[name] - wanted[name])
    for name in by_remainder[: cases - sum(counts.values())]:
        counts[name] += 1
    return [name for name, count in counts.items() for _ in range(count)]


def _studies_per_patient(cases: int, rng: np.random.Generator) -> list[int]:
    """One to three studies for each patient, `cases` in all."""
    counts: list[int] = []
    while (left := cases - sum(counts)) > 0:
        counts.append(min(left, int(rng.choice((1, 2, 3), p=(0.78, 0.16, 0.06)))))
    return counts


def _shares(hospital: Hospital, multi_label: bool) -> dict[frozenset[str], float]:
    consolidation, effusion, both = hospital.prevalence
    shares = {frozenset({"consolidation"}): consolidation, frozenset({"effusion"}): effusion}
    if multi_label:
        shares[_BOTH] = both
    return {_NORMAL: 1 - sum(shares.values()), **shares}


def _plan_chest(hospital: Hospital, site: int, cases: int, request: Request) -> Plan:
    """Chest radiographs for classification: who has which study with which finding, and in which split."""
    rng = np.random.default_rng((request.seed, site + 1))
    allocated = _allocate(cases, _shares(hospital, request.multi_label))
    findings = iter([allocated[at] for at in rng.permutation(cases)])
    items: list[Radiograph] = []
    for patient, studies in enumerate(_studies_per_patient(cases, rng), start=1):
        items.extend(_studies(hospital, site, patient, [next(findings) for _ in range(studies)], request))
    manifest = _chest_manifest(items, hospital, request)
    return Plan(hospital, manifest, items)


def _studies(
    hospital: Hospital, site: int, patient: int, findings: Sequence[frozenset[str]], request: Request
) -> Iterator[Radiograph]:
    rng = np.random.default_rng((request.seed, site + 1, patient, 20))
    sex = "F" if rng.random() < 0.48 else "M"
    taken = date(2021, 1, 1) + timedelta(days=int(rng.integers(0, 1200)))
    age = int(np.clip(rng.normal(58, 17), 18, 94))
    born = date(taken.year - age, int(rng.integers(1, 13)), int(rng.integers(1, 29)))
    for number, found in enumerate(findings, start=1):
        yield Radiograph(
            path=f"images/{_patient_id(site, patient)}/{number}.dcm",
            hospital=hospital,
            site=site,
            patient=patient,
            number=number,
            sex=sex,
            born=born,
            taken=taken,
            view="AP" if rng.random() < hospital.bedside else "PA",
            findings=found,
            request=request,
        )
        taken += timedelta(days=int(rng.integers(1, 200)))


def _age_group(age: int) -> str:
    low = 18 if age < 40 else 40 if age < 60 else 60 if age < 80 else 80
    return f"{low}+" if low == 80 else f"{low}-{'39' if low == 18 else low + 19}"


def _chest_manifest(items: Sequence[Radiograph], hospital: Hospital, request: Request) -> Manifest:
    findings = ["consolidation", "effusion"]
    strata = {item.patient_id: "+".join(sorted(item.findings)) for item in reversed(items)}
    split_of = assign_splits(strata, seed=request.seed, strata=strata)
    cases: dict[str, list[Case]] = {split: [] for split in SPLITS}
    for item in items:
        names = tuple(sorted(item.findings))
        case = Case(
            image=item.path,
            label=names if request.multi_label else (names or ("normal",))[0],
            patient=item.patient_id,
            age_group=_age_group(item.age),
            sex=item.sex,
            vendor=hospital.vendor,
            view=item.view,
        )
        cases[split_of[item.patient_id]].append(case)
    return Manifest(
        name=request.dataset,
        modality="DX",
        task="classification",
        classes=findings if request.multi_label else ["normal", *findings],
        multi_label=request.multi_label,
        made={
            "by": f"fedimaging {__version__}",
            "source": "synthetic",
            "synthetic": True,
            "seed": request.seed,
            "phantom": PHANTOM,
            "hospital": hospital.name,
            "matrix": list(hospital.matrix(request.longer)),
        },
        **cases,
    )


TASKS: dict[str, Callable[[Hospital, int, int, Request], Plan]] = {"classification": _plan_chest}
"""Task -> what plans it for one hospital, from the hospital, its number, its cases and the request."""


def _dicom(study: Radiograph) -> Dataset:
    """A Digital X-Ray Image - For Presentation (PS3.3 A.26) with its pixels."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    ds.file_meta.MediaStorageSOPInstanceUID = study.uid("instance", study.patient, study.number)
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    for add in (_patient_and_study, _series_and_equipment, _acquisition):
        add(ds, study)
    stored = _grey_scale(ds, study, study.image())
    ds.Rows, ds.Columns = stored.shape
    ds.PixelData = stored.astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    if study.hospital.transfer_syntax != ExplicitVRLittleEndian:
        syntax = UID(study.hospital.transfer_syntax)
        ds.compress(syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    return ds


def _patient_and_study(ds: Dataset, study: Radiograph) -> None:
    day, time = f"{study.taken:%Y%m%d}", f"{8 + study.patient % 10:02d}{study.patient * 7 % 60:02d}00"
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID = DigitalXRayImageStorageForPresentation
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID
    ds.PatientName = f"Synthetic^{study.patient_id}"
    ds.PatientID = study.patient_id
    ds.PatientBirthDate = f"{study.born:%Y%m%d}"
    ds.PatientSex = study.sex
    ds.PatientAge = f"{study.age:03d}Y"
    ds.StudyInstanceUID = study.uid("study", study.patient, study.number)
    ds.StudyID = str(study.number)
    ds.AccessionNumber = f"{chr(ord('A') + study.site)}{study.patient:05d}{study.number:02d}"
    ds.StudyDescription = "Chest radiograph"
    ds.ReferringPhysicianName = ""
    for of in ("Study", "Series", "Acquisition", "Content"):
        setattr(ds, f"{of}Date", day)
        setattr(ds, f"{of}Time", time)


def _series_and_equipment(ds: Dataset, study: Radiograph) -> None:
    hospital = study.hospital
    ds.Modality = "DX"
    ds.SeriesInstanceUID = study.uid("series", study.patient, study.number)
    ds.SeriesNumber = 1
    ds.SeriesDescription = f"Chest {study.view}"
    ds.BodyPartExamined = "CHEST"
    ds.PresentationIntentType = "FOR PRESENTATION"
    ds.Manufacturer = hospital.vendor
    ds.ManufacturerModelName = hospital.model
    ds.DeviceSerialNumber = f"SYN-{study.site + 1:04d}"
    ds.SoftwareVersions = f"fedimaging {__version__}"
    ds.InstitutionName = hospital.name
    ds.StationName = "ROOM-1"
    ds.InstanceNumber = 1
    ds.ImageType = ["ORIGINAL", "PRIMARY", ""]
    ds.PatientOrientation = ["L", "F"]
    ds.ImageComments = "Synthetic phantom, of no patient"


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", meaning
    return item


def _acquisition(ds: Dataset, study: Radiograph) -> None:
    """Anatomy, positioning, generator, grid and detector."""
    hospital, rng = study.hospital, np.random.default_rng((*study.key, 22))
    current = round(hospital.exposure * study._dose(), 2)
    ds.ImageLaterality = "U"
    ds.AnatomicRegionSequence = [_code("51185008", "Chest")]
    ds.ViewPosition = study.view
    ds.PositionerType = "MOBILE" if study.view == "AP" else "COLUMN"
    ds.KVP = int(hospital.kvp + rng.integers(-4, 5))
    ds.ExposureTime = max(1, round(current * 4))
    ds.XRayTubeCurrent = 250
    ds.Exposure = max(1, round(current))
    ds.ExposureInuAs = round(current * 1000)
    ds.DistanceSourceToDetector = 1100 if study.view == "AP" else 1800
    ds.Grid = "NONE" if study.view == "AP" else "FIXED"
    ds.DetectorType = hospital.detector
    ds.DetectorConfiguration = "AREA"
    ds.DetectorID = f"DET-{study.site + 1:04d}"
    spacing = round(10 * hospital.height / hospital.matrix(study.request.longer)[0], 5)
    ds.ImagerPixelSpacing = [spacing, spacing]
    ds.AcquisitionContextSequence = []


def _grey_scale(ds: Dataset, study: Radiograph, image: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Write the tags of the grey scale, and return the stored values (rows, cols) that they turn into `image` again."""
    hospital = study.hospital
    inverse = hospital.photometric == "MONOCHROME1"
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = hospital.photometric
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, hospital.bits, hospital.bits - 1, 0
    ds.PixelIntensityRelationship = "LOG"
    ds.PixelIntensityRelationshipSign = 1 if inverse else -1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, 1, "US"
    ds.PresentationLUTShape = "INVERSE" if inverse else "IDENTITY"
    ds.LossyImageCompression = "00"
    ds.BurnedInAnnotation = "NO"
    value = 1 - image if inverse else image
    rng = np.random.default_rng((*study.key, 23))
    stored = _VOI[hospital.voi](ds, value, 2**hospital.bits - 1, rng)
    return np.clip(np.rint(stored), 0, 2**hospital.bits - 1).astype(np.uint16)


def _window(ds: Dataset, value: NDArray[np.float32], top: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A linear window (PS3.3 C.11.2.1.2.1) over most of the stored range."""
    low, high = int(top * rng.uniform(0.02, 0.12)), int(top * rng.uniform(0.85, 0.98))
    ds.WindowWidth, ds.WindowCenter = high - low + 1, (low + high + 1) / 2
    return low + value * (high - low)


def _sigmoid(ds: Dataset, value: NDArray[np.float32], top: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A sigmoid VOI LUT function (PS3.3 C.11.2.1.3.1)."""
    center, width = int(top * rng.uniform(0.45, 0.55)), int(top * rng.uniform(0.4, 0.45))
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = center, width, "SIGMOID"
    inner = np.clip(value, 0.02, 0.98)
    return center + width / 4 * np.log(inner / (1 - inner))


def _lut(ds: Dataset, value: NDArray[np.float32], top: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A VOI LUT of 12 bits that undoes the curve under which the values are stored."""
    power = rng.uniform(1.3, 1.7)
    table = np.rint(4095 * (np.arange(top + 1) / top) ** (1 / power)).astype("<u2")
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [top + 1, 0, 12])
    item.LUTExplanation = "NORMAL"
    item.add_new("LUTData", "OW", table.tobytes())
    ds.VOILUTSequence = [item]
    return top * value**power


_VOI: dict[str, Callable[[Dataset, NDArray[np.float32], int, np.random.Generator], NDArray[np.float32]]]
_VOI = {"window": _window, "sigmoid": _sigmoid, "lut": _lut}


def synthesize(
    root: Path,
    *,
    task: str = "classification",
    dataset: str = "chest_xray",
    hospitals: Sequence[Hospital] | int = 3,
    cases: Sequence[int] | int = CASES,
    longer: int = SIZES["small"],
    multi_label: bool = False,
    seed: int = 0,
    force: bool = False,
    workers: int | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Make synthetic hospitals below `root`, as `<site>/<dataset>/manifest.json` with the images below that folder.

    What is there already from the same arguments is left as it is.

    Args:
        root: the data root; made if missing.
        task: one of `TASKS`.
        hospitals: the hospitals, or how many typical ones.
        cases: per hospital, or one number for all.
        longer: pixels on the images' longer side.
        seed: of everything; the same arguments give the same bytes.
        force: replace synthetic hospitals that were made with other arguments. Never touches what is not synthetic.
        workers: processes; the usable cores by default, one for a few images.
        console: where to show progress; nowhere by default.

    Returns:
        The manifests, in the order of the hospitals.

    Raises:
        FedImagingError: wrong arguments, a folder that holds other data, no space.
    """
    plans = _plans(task, dataset, hospitals, cases, longer, multi_label, seed)
    targets = {plan.hospital.name: root / plan.hospital.name / dataset for plan in plans}
    if not _up_to_date(root, dataset, plans, force):
        with _own_errors(root), _scratch(root) as scratch:
            _write(plans, scratch, dataset, workers, console)
            _swap(root, dataset, scratch, targets)
    return [target / "manifest.json" for target in targets.values()]


def _plans(
    task: str,
    dataset: str,
    hospitals: Sequence[Hospital] | int,
    cases: Sequence[int] | int,
    longer: int,
    multi_label: bool,
    seed: int,
) -> list[Plan]:
    """Check the arguments and plan every hospital."""
    if task not in TASKS:
        raise FedImagingError(f"task {task!r}: choose from {', '.join(TASKS)}")
    if not _DATASET_NAME.fullmatch(dataset):
        raise FedImagingError(
            f"dataset {dataset!r}: use letters, digits, '.', '_' and '-', and begin with a letter or digit"
        )
    if not 32 <= longer <= 4096:
        raise FedImagingError(f"matrix {longer}: give 32 to 4096 pixels for the longer side")
    if not 0 <= seed < 2**32:
        raise FedImagingError(f"seed {seed}: give a number from 0 to {2**32 - 1}")
    sites = typical_hospitals(hospitals) if isinstance(hospitals, int) else list(hospitals)
    counts = _counts(cases, len(sites))
    request = Request(dataset, longer, multi_label, seed)
    return [
        TASKS[task](hospital, at, count, request)
        for at, (hospital, count) in enumerate(zip(sites, counts, strict=True))
    ]


def _counts(cases: Sequence[int] | int, sites: int) -> list[int]:
    counts = [cases] * sites if isinstance(cases, int) else list(cases)
    if len(counts) != sites:
        raise FedImagingError(f"cases {_commas(counts)}: give one number, or one for each of the {sites} sites")
    if min(counts) < FEWEST_CASES:
        raise FedImagingError(
            f"cases {_commas(counts)}: give each site {FEWEST_CASES} or more, to have every class in every split"
        )
    return counts


def _commas(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def _up_to_date(root: Path, dataset: str, plans: Sequence[Plan], force: bool) -> bool:
    """Whether `root` already holds exactly these plans; refuses to go on where something else is in the way."""
    if root.exists() and not root.is_dir():
        raise FedImagingError(f"{root}: is a file, not a folder; give another --out")
    there = _folders(root, dataset)
    wanted = {root / plan.hospital.name / dataset: plan for plan in plans}
    if set(there) == set(wanted) and all(_holds(folder, plan) for folder, plan in wanted.items()):
        return True
    foreign = [folder for folder in there if not _is_synthetic(folder)]
    if foreign:
        raise FedImagingError(
            f"{foreign[0]}: holds data that `data synth` did not make; give another --out or --dataset"
        )
    if there and not force:
        sites = ", ".join(folder.parent.name for folder in there)
        raise FedImagingError(
            f"{root}: holds {dataset} made with other arguments ({sites}); give another --out, or --force to replace it"
        )
    if not force and not _is_data_root(root):
        raise FedImagingError(f"{root}: is not empty and no data root; give another --out, or --force to add to it")
    return False


def _folders(root: Path, dataset: str) -> list[Path]:
    return sorted(folder for folder in root.glob(f"[!.]*/{dataset}") if not folder.is_dir() or any(folder.iterdir()))


def _is_data_root(root: Path) -> bool:
    """Whether `root` is new, empty, or holds manifests where a data root holds them."""
    visible = [entry for entry in root.glob("*") if not entry.name.startswith(".")]
    return not visible or any(root.glob("[!.]*/*/manifest.json"))


def _is_synthetic(folder: Path) -> bool:
    try:
        made = Manifest.read(folder / "manifest.json").made
    except FedImagingError:
        return False
    return made.get("synthetic") is True and str(made.get("by", "")).startswith("fedimaging ")


def _holds(folder: Path, plan: Plan) -> bool:
    try:
        manifest = Manifest.read(folder / "manifest.json")
        manifest.check_files(folder)
    except FedImagingError:
        return False
    return manifest.digest() == plan.manifest.digest()


@contextmanager
def _own_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = Reason.NO_DISK_SPACE if full else Reason.BAD_SETTING
        raise FedImagingError(
            f"{root}: can't write the synthetic hospitals: {error.strerror or error}", reason
        ) from None


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A hidden folder in `root` that is gone afterwards, as is `root` if it was new and stayed empty."""
    new = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".synth-", dir=root))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if new and not any(root.iterdir()):
            root.rmdir()


def _write(plans: Sequence[Plan], scratch: Path, dataset: str, workers: int | None, console: Console | None) -> None:
    jobs = [(item, scratch / plan.hospital.name / dataset) for plan in plans for item in plan.items]
    if workers is None:
        workers = min(_cores(), 1 + len(jobs) // 64)
    with _written(jobs, workers) as done:
        quiet = Console(quiet=True)
        for _ in track(done, "Synthetic hospitals", len(jobs), console=console or quiet, transient=True):
            pass
    for plan in plans:
        plan.manifest.write(scratch / plan.hospital.name / dataset / "manifest.json")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _written(jobs: Sequence[tuple[Item, Path]], workers: int) -> Iterator[Iterator[None]]:
    """The files being written, one `None` each, by this process or by others that end with the block."""
    if workers <= 1:
        yield map(_write_one, jobs)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    try:
        yield pool.map(_write_one, jobs, chunksize=8)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write_one(job: tuple[Item, Path]) -> None:
    item, folder = job
    item.write(folder)


def _swap(root: Path, dataset: str, scratch: Path, targets: Mapping[str, Path]) -> None:
    """Put the new folders in the place of the old ones."""
    for folder in _folders(root, dataset):
        folder.rename(scratch / f"old-{folder.parent.name}")
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
    for site, target in targets.items():
        target.parent.mkdir(exist_ok=True)
        (scratch / site / dataset).replace(target)


def add_commands(subparsers: Any) -> None:
    """Register `synth` in the group `data`."""
    parser = subparsers.add_parser(
        "synth",
        help="make synthetic hospitals",
        description="Make synthetic hospitals: DICOM files of chest phantoms and a manifest for each hospital.\n"
        "They are for trying things out, and say nothing about real patients.",
        epilog="example:\n  python -m fedimaging data synth --out data/demo --sites 3 --cases 260,200,140",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the data root: <out>/<site>/<dataset>/manifest.json")
    parser.add_argument("--task", default="classification", help=f"{', '.join(TASKS)} (default: %(default)s)")
    parser.add_argument("--dataset", default="chest_xray", help="the dataset's name (default: %(default)s)")
    parser.add_argument("--sites", default="3", help="number of hospitals (default: %(default)s)")
    parser.add_argument(
        "--cases", help=f"images per hospital, one number or one for each (default: {_commas(CASES)} in turn)"
    )
    parser.add_argument(
        "--size", choices=SIZES, default="small", help="longer side: small 256, full 1024 pixels (default: %(default)s)"
    )
    parser.add_argument("--matrix", help="longer side in pixels, instead of --size")
    parser.add_argument("--multi-label", action="store_true", help="several findings per image; none means normal")
    parser.add_argument("--seed", default="0", help="the same seed makes the same files (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace synthetic hospitals made with other arguments")
    parser.set_defaults(run=_run)


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise FedImagingError(f"--{name} {text!r}: give a whole number") from None


def _run(arguments: argparse.Namespace) -> None:
    console = Console()
    sites = _whole("sites", arguments.sites)
    if arguments.cases is None:
        cases: list[int] | int = [CASES[site % len(CASES)] for site in range(sites)]
    else:
        numbers = [_whole("cases", text) for text in arguments.cases.split(",")]
        cases = numbers[0] if len(numbers) == 1 else numbers
    before = arguments.out / "."
    manifests = synthesize(
        arguments.out,
        task=arguments.task,
        dataset=arguments.dataset,
        hospitals=sites,
        cases=cases,
        longer=_whole("matrix", arguments.matrix) if arguments.matrix else SIZES[arguments.size],
        multi_label=arguments.multi_label,
        seed=_whole("seed", arguments.seed),
        force=arguments.force,
        console=console,
    )
    console.print(_table(manifests))
