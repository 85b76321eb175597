"""Synthetic chest radiographs: who has which study with which finding, and the DICOM DX file of each.

A case's finding shows in the lungs only: no tag, matrix size or grey-level statistic is drawn from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import (
    PYDICOM_IMPLEMENTATION_UID,
    UID,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    generate_uid,
)

from fedimaging import __version__
from fedimaging.datasets.manifest import Case, Manifest
from fedimaging.datasets.synthetic.hospitals import (
    Hospital,
    Plan,
    Request,
    age_group,
    make_manifest,
    patient_id,
    studies_per_patient,
)
from fedimaging.datasets.synthetic.phantom import FINDINGS, Subject, radiograph

PHANTOM = 1
"""Version of the pictures: one more whenever the same seed gives other pixels."""

_NORMAL: frozenset[str] = frozenset()


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
        return patient_id(self.site, self.patient)

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
        return radiograph(shape, size, subject, self.findings, imaging)

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


def _shares(hospital: Hospital, multi_label: bool) -> dict[frozenset[str], float]:
    consolidation, effusion, both = hospital.prevalence
    shares = {frozenset({"consolidation"}): consolidation, frozenset({"effusion"}): effusion}
    if multi_label:
        shares[frozenset(FINDINGS)] = both
    return {_NORMAL: 1 - sum(shares.values()), **shares}


def plan_chest(hospital: Hospital, site: int, cases: int, request: Request) -> Plan:
    """Chest radiographs for classification: who has which study with which finding, and in which split."""
    rng = np.random.default_rng((request.seed, site + 1))
    allocated = _allocate(cases, _shares(hospital, request.multi_label))
    findings = iter([allocated[at] for at in rng.permutation(cases)])
    items: list[Radiograph] = []
    for patient, studies in enumerate(studies_per_patient(cases, rng), start=1):
        items.extend(_studies(hospital, site, patient, [next(findings) for _ in range(studies)], request))
    manifest = _chest_manifest(items, hospital, request)
    return Plan(hospital, manifest, items)


def _studies(
    hospital: Hospital, site: int, patient: int, findings: Sequence[frozenset[str]], request: Request
) -> Iterator[Radiograph]:
    rng = np.random.default_rng((request.seed, site + 1, patient, 20))
    sex = "F" if rng.random() < 0.48 else "M"
    taken = date(2021, 1, 1) + timedelta(days=int(rng.integers(0, 1200)))
    age = int(np.clip(rng.normal(58, 17), 19, 94))
    born = date(taken.year - age, int(rng.integers(1, 13)), int(rng.integers(1, 29)))
    for number, found in enumerate(findings, start=1):
        yield Radiograph(
            path=f"images/{patient_id(site, patient)}/{number}.dcm",
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


def _chest_manifest(items: Sequence[Radiograph], hospital: Hospital, request: Request) -> Manifest:
    names = [tuple(sorted(item.findings)) for item in items]
    cases = [
        Case(
            image=item.path,
            label=found if request.multi_label else (found or ("normal",))[0],
            patient=item.patient_id,
            age_group=age_group(item.age),
            sex=item.sex,
            vendor=hospital.vendor,
            view=item.view,
        )
        for item, found in zip(items, names, strict=True)
    ]
    return make_manifest(
        hospital,
        request,
        cases,
        {item.patient_id: "+".join(sorted(item.findings)) for item in reversed(items)},
        phantom=PHANTOM,
        matrix=hospital.matrix(request.longer),
        modality="DX",
        task="classification",
        classes=list(FINDINGS) if request.multi_label else ["normal", *FINDINGS],
        multi_label=request.multi_label,
    )


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
