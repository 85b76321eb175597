"""What `data index` is asked for, what it works on, and what it tells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedimaging.datasets.manifest import FRACTIONS, Manifest

LABELS_FILE = "labels.csv"


@dataclass(frozen=True)
class Options:
    """What to index and how; the fields are the command's options.

    Attributes:
        source: a folder, a CSV in the folder of its images, or a `.npz`.
        task: "classification" or "segmentation"; None finds out from the source and the other options.
        labels: the CSV of labels; None is `labels.csv` in the source, if there is one.
        match: a DICOM keyword whose value the CSV's image column holds; None if it holds file names.
        out: the manifest to write; None is `manifest.json` in the source. With `sites`, the data root.
        copy: whether images may be copied below the manifest's folder.
        columns: what -> column of the CSV, for image, label, patient and the covariates (age_group, sex, vendor, view).
        label_separator: splits a label into the class names of a multi-label case; None for one class per case.
        patient_regex: finds the patient as its group 1 in an image's relative path.
        classes: which classes, in this order; empty for all that occur, sorted. In segmentation the names of the
            masks' values 1, 2 and so on; empty for those of `dataset.json`.
        rename: label -> class; an empty class means no finding.
        image_suffix: how the names of NIfTI images end.
        label_suffix: how the names of masks end, after what they share with their image's.
        masks: the folder of the masks; None is the source.
        allow_empty: whether a mask without a structure is right, as in a brain without a lesion.
        keep: whether patients keep the split that they have in an existing manifest.
        sites: site -> number of cases, to split one source into several sites.
        concentration: with `sites`, of the Dirichlet distribution of each site's classes; None for alike sites.
    """

    source: Path
    task: str | None = None
    labels: Path | None = None
    match: str | None = None
    out: Path | None = None
    copy: bool = False
    name: str | None = None
    modality: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    label_separator: str | None = None
    patient_regex: str | None = None
    classes: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    image_suffix: str | None = None
    label_suffix: str | None = None
    masks: Path | None = None
    allow_empty: bool = False
    seed: int = 0
    fractions: tuple[float, ...] = FRACTIONS
    keep: bool = True
    sites: Mapping[str, int] = field(default_factory=dict)
    concentration: float | None = None


@dataclass(frozen=True)
class IndexResult:
    """What was written, and what was not and why."""

    path: Path
    manifest: Manifest
    left_out: dict[str, list[str]]
    """Reason -> the images' names, relative to the source."""
    warnings: list[str]
    kept_patients: int
    """Patients whose split an earlier manifest (or the `.npz`) decided."""


@dataclass(frozen=True)
class Candidate:
    """A case that may come into the manifest."""

    name: str
    """The image's path relative to the source, later to the manifest, with /."""
    path: Path
    """The image's file, or the folder of its DICOM series."""
    labels: tuple[str, ...] = ()
    """The classes; in segmentation the structures in the mask, known once it is read."""
    patient: str = ""
    guess: str = ""
    """The patient where nothing else says who it is: the file's name."""
    covariates: Mapping[str, str] = field(default_factory=dict)
    modality: str = ""
    digest: str = ""
    """Of what the image shows; equal for two copies of one image."""
    mask_name: str = ""
    mask: Path | None = None
    mask_digest: str = ""


class Notes:
    """What is left out, by reason, and what the user should know."""

    def __init__(self) -> None:
        self.left_out: dict[str, list[str]] = defaultdict(list)
        self.warnings: list[str] = []

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out[reason].append(name)

    def counts(self) -> dict[str, int]:
        return {reason: len(names) for reason, names in self.left_out.items()}

    def summary(self, most: int = 3) -> str:
        """ "12 x no such file (a.png); ...": the commonest reasons in one line."""
        reasons = sorted(self.left_out.items(), key=lambda item: -len(item[1]))
        parts = [f"{len(names)} x {reason} ({names[0]})" for reason, names in reasons[:most]]
        return (
            "; ".join(parts + [f"and {len(reasons) - most} more reasons"] * (len(reasons) > most)) or "no images found"
        )


@dataclass(frozen=True)
class Source:
    """The cases of one source, not yet read.

    Attributes:
        folder: what the candidates' names are relative to.
        inspect: reads a candidate's files; the candidate with what they say, or why they can't be used.
        missing: cases that the source names but does not hold.
        splits: patient -> split, where the source decides it.
        classes: the structures of a segmentation, by the masks' values from 1; empty for a classification.
        modality: what the source says.
        threads: at most how many cases are read at once.
    """

    kind: str
    folder: Path
    candidates: list[Candidate]
    inspect: Callable[[Candidate], Candidate | str]
    missing: int = 0
    splits: Mapping[str, str] = field(default_factory=dict)
    multi_label: bool = False
    classes: tuple[str, ...] = ()
    modality: str = ""
    threads: int = 8

    @property
    def task(self) -> str:
        return "segmentation" if self.classes else "classification"
