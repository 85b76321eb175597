"""Sources of classification: a CSV of image files or DICOM elements, a folder per class, and arrays as MedMNIST has."""

from __future__ import annotations

import csv
import hashlib
import os
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.datadict import tag_for_keyword

from fedimaging.datasets import images
from fedimaging.datasets.index.files import in_threads
from fedimaging.datasets.index.model import LABELS_FILE, Candidate, Notes, Options, Source
from fedimaging.datasets.manifest import COVARIATES, SPLITS
from fedimaging.errors import FedImagingError, Reason


def from_class_folders(folder: Path) -> Source:
    found = [
        Candidate(path.relative_to(folder).as_posix(), path, (subfolder.name,), guess=path.stem)
        for subfolder in sorted(folder.iterdir())
        if subfolder.is_dir() and not subfolder.name.startswith(".")
        for path in images.image_files(subfolder)
    ]
    if not found:
        raise FedImagingError(
            f"{folder}: holds neither {LABELS_FILE} nor a folder of images per class; give --labels", Reason.NO_DATASET
        )
    return Source("folder per class", folder, found, inspect)


def from_csv(folder: Path, labels: Path, options: Options, notes: Notes) -> Source:
    rows, columns = _read_csv(labels, options.columns)
    files = images.image_files(folder)
    found: list[Candidate] = []
    missing, used = 0, set()
    lookup = _by_element(files, options.match) if options.match else _by_name(files, folder)
    for row in rows:
        values = {what: (row.get(column) or "").strip() for what, column in columns.items()}
        paths, reason = lookup(values["image"])
        if reason:
            missing += 1
            notes.leave_out(values["image"], reason)
        used.update(paths)
        if values.get("age_group"):
            values["age_group"] = images.age_group(values["age_group"])
        covariates = {name: values[name] for name in COVARIATES if values.get(name)}
        names = values["label"].split(options.label_separator) if options.label_separator else [values["label"]]
        for path in paths:
            name = path.relative_to(folder).as_posix()
            found.append(Candidate(name, path, tuple(names), values.get("patient", ""), covariates=covariates))
    for path in files:
        if path not in used:
            notes.leave_out(path.relative_to(folder).as_posix(), f"not in {labels.name}")
    return Source("csv", folder, found, inspect, missing, multi_label=options.label_separator is not None)


def _read_csv(path: Path, given: Mapping[str, str]) -> tuple[list[dict[str, str]], dict[str, str]]:
    """The rows, and what -> column for those columns that are there."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FedImagingError(f"{path}: can't read the labels: {error.strerror}", Reason.NO_DATASET) from None
    except UnicodeDecodeError:
        raise FedImagingError(f"{path}: is not UTF-8 text; save the CSV as UTF-8", Reason.BAD_MANIFEST) from None
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    try:
        reader = csv.DictReader(text.splitlines(), delimiter=delimiter, strict=True)
        rows = list(reader)
    except csv.Error as error:
        raise FedImagingError(f"{path}: is not CSV: {error}", Reason.BAD_MANIFEST) from None
    names = list(reader.fieldnames or [])
    wanted = {"image": "file", "label": "label", "patient": "patient_id", **{name: name for name in COVARIATES}}
    columns = {what: given.get(what) or default for what, default in wanted.items()}
    for what, column in columns.items():
        if column not in names and (what in ("image", "label") or given.get(what)):
            option = "--age-column" if what == "age_group" else f"--{what}-column"
            message = f"{path}: has no column {column!r} (it has {', '.join(names)}); name it with {option}"
            raise FedImagingError(message, Reason.BAD_MANIFEST)
    return rows, {what: column for what, column in columns.items() if column in names}


_Lookup = Callable[[str], tuple[list[Path], str]]


def _by_name(files: list[Path], folder: Path) -> _Lookup:
    """Finds a file by its path below the folder or, if that is unique, by its name with or without its ending."""
    known = set(files)
    names: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        for name in {path.name, path.stem}:
            names[name].append(path)

    def look_up(value: str) -> tuple[list[Path], str]:
        path = Path(os.path.normpath(folder / value))
        if not value or not path.is_relative_to(folder):
            return [], "its path leaves the folder" if value else "no file name"
        if path in known or path.is_file():
            return [path], ""
        found = names.get(value, [])
        return (found, "") if len(found) == 1 else ([], "several files have this name" if found else "no such file")

    return look_up


def _by_element(files: list[Path], keyword: str) -> _Lookup:
    """Finds the DICOM files with a value of one data element; a study or an accession number has several."""
    if tag_for_keyword(keyword) is None:
        raise FedImagingError(f"--match {keyword}: no DICOM keyword; SOPInstanceUID or AccessionNumber is one")
    values: dict[str, list[Path]] = defaultdict(list)
    for path, value in zip(
        files, in_threads("Reading headers", lambda path: _element(path, keyword), files), strict=True
    ):
        if value:
            values[value].append(path)

    def look_up(value: str) -> tuple[list[Path], str]:
        found = values.get(value, [])
        return found, "" if found else f"no DICOM file with this {keyword}"

    return look_up


def _element(path: Path, keyword: str) -> str:
    try:
        return str(images.read_header(path).get(keyword) or "").strip() if images.is_dicom(path) else ""
    except (FedImagingError, OSError):
        return ""


def unpack(source: Path, folder: Path) -> Source:
    """Writes the images of a `.npz` as PNG: arrays `{train,val,test}_images` (N, H, W[, 3]) uint8 and `_labels` (N, C).

    One column of labels holds class numbers; several hold 0 or 1 for each class of a multi-label case.
    """
    candidates: list[Candidate] = []
    splits: dict[str, str] = {}
    columns = 1
    (folder / "images").mkdir()
    try:
        with np.load(source, allow_pickle=False) as arrays:
            for old, split in zip(("train", "val", "test"), SPLITS, strict=True):
                if f"{old}_images" not in arrays:
                    continue
                pixels, labels = arrays[f"{old}_images"], arrays[f"{old}_labels"]
                if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or len(labels) != len(pixels):
                    raise ValueError(f"{old}_images is no uint8 array (N, H, W) or (N, H, W, 3) with a label each")
                for number, (image, label) in enumerate(zip(pixels, labels.reshape(len(pixels), -1), strict=True)):
                    columns = len(label)
                    path = folder / "images" / f"{split}_{number:06d}.png"
                    Image.fromarray(image).save(path)
                    splits[path.stem] = split
                    present = label if columns == 1 else np.flatnonzero(label)
                    names = tuple(str(int(value)) for value in present)
                    candidates.append(Candidate(f"images/{path.name}", path, names, path.stem))
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise FedImagingError(f"{source}: can't unpack the arrays: {reason}", Reason.UNREADABLE_IMAGES) from None
    if not candidates:
        raise FedImagingError(f"{source}: holds no train_images, val_images or test_images", Reason.NO_DATASET)
    return Source("npz", folder, candidates, inspect, splits=splits, multi_label=columns > 1)


def inspect(candidate: Candidate) -> Candidate | str:
    """The candidate with digest and, for DICOM, patient, covariates and modality; or why it can't be read."""
    path = candidate.path
    try:
        images.read_image(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if not images.is_dicom(path):
            return replace(candidate, digest=digest)
        header = images.read_header(path)
    except FedImagingError as error:
        return str(error).removeprefix(f"{path}: ")
    except OSError as error:
        return f"can't be read ({error.strerror})"
    return replace(
        candidate,
        digest=digest,
        patient=candidate.patient or images.element(header, "PatientID"),
        covariates=images.covariates(header) | dict(candidate.covariates),
        modality=images.element(header, "Modality"),
    )
