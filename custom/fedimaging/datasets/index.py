"""`python -m fedimaging data index`: a manifest from the images that a hospital has.

Three kinds of source: a CSV of image files and labels, a folder of DICOM files with a CSV of labels that names them by
file or by a data element such as SOPInstanceUID, and a folder per class. A `.npz` of arrays as MedMNIST has them is
unpacked first. Every image is read once: what can't be read is left out and told, with the reason.
"""

from __future__ import annotations

import argparse
import csv
import errno
import filecmp
import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from pydicom.datadict import tag_for_keyword
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from fedimaging import __version__
from fedimaging.datasets import images
from fedimaging.datasets.manifest import COVARIATES, FRACTIONS, SPLITS, Manifest, assign_splits
from fedimaging.datasets.site import MANIFEST_FILE
from fedimaging.errors import FedImagingError, Reason

LABELS_FILE = "labels.csv"
MOST_UNREADABLE = 0.5

_T = TypeVar("_T")
_R = TypeVar("_R")

_EXAMPLES = """examples:
  a CSV of files and labels (columns file, label, patient_id):
    python -m fedimaging data index /srv/xray --labels /srv/xray/labels.csv
  DICOM files, labels by accession number:
    python -m fedimaging data index /srv/dicom --labels findings.csv --match AccessionNumber --image-column accession
  a folder per class, the patient being what precedes the first underscore of a file's name:
    python -m fedimaging data index /srv/classes --patient-regex '([^/_]+)_[^/]*$'
  images that lie on a read-only disk:
    python -m fedimaging data index /mnt/xray --copy --out data/real/hospital-a/chest_xray/manifest.json
"""


@dataclass(frozen=True)
class Options:
    """What to index and how; the fields are the command's options.

    Attributes:
        source: a folder, a CSV in the folder of its images, or a `.npz`.
        labels: the CSV of labels; None is `labels.csv` in the source, if there is one.
        match: a DICOM keyword whose value the CSV's image column holds; None if it holds file names.
        out: the manifest to write; None is `manifest.json` in the source.
        copy: whether images may be linked or copied below the manifest's folder.
        columns: what -> column of the CSV, for image, label, patient and the covariates (age_group, sex, vendor, view).
        label_separator: splits a label into the class names of a multi-label case; None for one class per case.
        patient_regex: finds the patient as its group 1 in an image's relative path.
        classes: which classes, in this order; empty for all that occur, sorted.
        rename: label -> class; an empty class means no finding.
        keep: whether patients keep the split that they have in an existing manifest.
    """

    source: Path
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
    seed: int = 0
    fractions: tuple[float, ...] = FRACTIONS
    keep: bool = True


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
class _Candidate:
    name: str
    """The path relative to the source, with /."""
    path: Path
    labels: tuple[str, ...]
    patient: str = ""
    covariates: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""
    modality: str = ""


class _Notes:
    """What is left out, by reason, and what the user should know."""

    def __init__(self) -> None:
        self.left_out: dict[str, list[str]] = defaultdict(list)
        self.warnings: list[str] = []

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out[reason].append(name)


@dataclass(frozen=True)
class _Source:
    kind: str
    folder: Path
    candidates: list[_Candidate]
    missing: int = 0
    splits: Mapping[str, str] = field(default_factory=dict)
    multi_label: bool = False


def build_index(options: Options) -> IndexResult:
    """Reads the source, checks every image, splits by patient and writes the manifest.

    Raises:
        FedImagingError: if there is no source or no usable case, if too many images can't be read, if there is only one
            class, or if the manifest's folder does not hold the images; nothing is left behind then.
    """
    notes = _Notes()
    _check_regex(options.patient_regex)
    out = _out(options)
    previous = Manifest.read(out).assignments() if options.keep and out.exists() else {}
    with _removed_on_error(out.parent) as created, _open_source(options, out, notes) as source:
        labelled = _with_labels(source, options, notes)
        placed = _placed(labelled, source, options, out.parent, notes)
        readable = _readable(placed, source.missing, notes)
        cases = _without_duplicates(_with_patients(readable, source.kind, options, notes), notes)
        if not cases:
            raise FedImagingError(f"{options.source}: no usable case: {_summary(notes.left_out)}", Reason.TOO_FEW_CASES)
        previous = {**source.splits, **previous}
        header = {"name": options.name or out.parent.name, **_header(cases, source, options, notes)}
        manifest = Manifest.parse(header | _entries(cases, source.multi_label, options, previous), out)
        for case in cases:
            if case.path != out.parent / case.name:
                _copy(case.path, out.parent / case.name, created)
        manifest.check_files(out.parent, out)
        manifest.write(out)
    kept = len({case.patient for case in cases} & previous.keys())
    return IndexResult(out, manifest, dict(notes.left_out), notes.warnings, kept)


def _check_regex(pattern: str | None) -> None:
    try:
        groups = re.compile(pattern).groups if pattern else 1
    except re.error as error:
        raise FedImagingError(f"--patient-regex {pattern}: {error}") from None
    if groups < 1:
        raise FedImagingError(f"--patient-regex {pattern}: put the part that is the patient in (parentheses)")


def _out(options: Options) -> Path:
    source = options.source
    if not source.exists():
        raise FedImagingError(f"{source}: no such folder or file", Reason.NO_DATASET)
    folder = source if source.is_dir() else source.with_suffix("") if source.suffix == ".npz" else source.parent
    given = options.out or folder / MANIFEST_FILE
    out = given.parent.resolve() / given.name
    existing = next(parent for parent in out.parents if parent.exists())
    if not os.access(existing, os.W_OK):
        raise FedImagingError(
            f"{existing}: can't be written to; give --copy and --out FOLDER/{MANIFEST_FILE} elsewhere"
        )
    return out


@contextmanager
def _open_source(options: Options, out: Path, notes: _Notes) -> Iterator[_Source]:
    source = options.source
    if source.suffix == ".npz":
        with tempfile.TemporaryDirectory(prefix=".index-", dir=out.parent) as temporary:
            yield _unpack(source, Path(temporary))
        return
    folder = source if source.is_dir() else source.parent
    labels = options.labels or (folder / LABELS_FILE if source.is_dir() else source)
    if options.labels or labels.exists():
        yield _from_csv(folder.resolve(), labels, options, notes)
    else:
        yield _from_class_folders(folder.resolve())


def _from_class_folders(folder: Path) -> _Source:
    found = [
        _Candidate(path.relative_to(folder).as_posix(), path, (subfolder.name,))
        for subfolder in sorted(folder.iterdir())
        if subfolder.is_dir() and not subfolder.name.startswith(".")
        for path in images.image_files(subfolder)
    ]
    if not found:
        raise FedImagingError(
            f"{folder}: holds neither {LABELS_FILE} nor a folder of images per class; give --labels", Reason.NO_DATASET
        )
    return _Source("folder per class", folder, found)


def _from_csv(folder: Path, labels: Path, options: Options, notes: _Notes) -> _Source:
    rows, columns = _read_csv(labels, options.columns)
    files = images.image_files(folder)
    found: list[_Candidate] = []
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
            found.append(_Candidate(name, path, tuple(names), values.get("patient", ""), covariates))
    for path in files:
        if path not in used:
            notes.leave_out(path.relative_to(folder).as_posix(), f"not in {labels.name}")
    return _Source("csv", folder, found, missing, multi_label=options.label_separator is not None)


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
        files, _in_threads("Reading headers", lambda path: _element(path, keyword), files), strict=True
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


def _unpack(source: Path, folder: Path) -> _Source:
    """Writes the images of a `.npz` as PNG: arrays `{train,val,test}_images` (N, H, W[, 3]) uint8 and `_labels` (N, C).

    One column of labels holds class numbers; several hold 0 or 1 for each class of a multi-label case.
    """
    candidates: list[_Candidate] = []
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
                    candidates.append(_Candidate(f"images/{path.name}", path, names, path.stem))
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise FedImagingError(f"{source}: can't unpack the arrays: {reason}", Reason.UNREADABLE_IMAGES) from None
    if not candidates:
        raise FedImagingError(f"{source}: holds no train_images, val_images or test_images", Reason.NO_DATASET)
    return _Source("npz", folder, candidates, splits=splits, multi_label=columns > 1)


def _with_labels(source: _Source, options: Options, notes: _Notes) -> list[_Candidate]:
    """Candidates with their classes after renaming, without those that have none of the chosen classes."""
    chosen: list[_Candidate] = []
    dropped: Counter[str] = Counter()
    for candidate in source.candidates:
        texts = [text.strip() for text in candidate.labels]
        names = tuple(dict.fromkeys(name for text in texts if (name := options.rename.get(text, text))))
        selected = tuple(name for name in names if name in options.classes) if options.classes else names
        if source.multi_label:
            dropped.update(set(names) - set(selected))
        elif not names:
            notes.leave_out(candidate.name, "no label")
            continue
        elif not selected:
            notes.leave_out(candidate.name, f"the class {names[0]} is not among --classes")
            continue
        chosen.append(replace(candidate, labels=selected))
    if dropped:
        found = ", ".join(f"{name} ({count})" for name, count in sorted(dropped.items()))
        notes.warnings.append(f"findings that are not among --classes were dropped from their cases: {found}")
    return chosen


def _placed(
    candidates: list[_Candidate], source: _Source, options: Options, root: Path, notes: _Notes
) -> list[_Candidate]:
    """Candidates named by their path below the manifest's folder, where they lie or where they will be copied to."""
    placed: list[_Candidate] = []
    real_root = root.resolve()
    for candidate in candidates:
        if candidate.path.is_relative_to(root) and candidate.path.resolve().is_relative_to(real_root):
            name = candidate.path.relative_to(root).as_posix()
            placed.append(candidate if source.kind == "npz" else replace(candidate, name=name))
        elif options.copy:
            placed.append(candidate)
        elif candidate.path.is_relative_to(root):
            notes.leave_out(candidate.name, "a link out of the manifest's folder; give --copy to copy it")
        else:
            message = f"{root}: does not hold the images, which lie in {source.folder}; give --copy or leave out --out"
            raise FedImagingError(message)
    return placed


def _readable(candidates: list[_Candidate], missing: int, notes: _Notes) -> list[_Candidate]:
    """Reads every image; candidates with what their files say of themselves.

    Raises:
        FedImagingError: UNREADABLE_IMAGES if more than half of the images are missing or can't be read.
    """
    readable: list[_Candidate] = []
    unreadable = missing
    for candidate, result in zip(candidates, _in_threads("Reading images", _inspect, candidates), strict=True):
        if isinstance(result, str):
            unreadable += 1
            notes.leave_out(candidate.name, result)
        else:
            readable.append(result)
    total = len(candidates) + missing
    if unreadable > MOST_UNREADABLE * total:
        message = f"{unreadable} of {total} images are missing or can't be read: {_summary(notes.left_out)}"
        raise FedImagingError(message, Reason.UNREADABLE_IMAGES)
    return readable


def _inspect(candidate: _Candidate) -> _Candidate | str:
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


def _with_patients(candidates: list[_Candidate], kind: str, options: Options, notes: _Notes) -> Iterator[_Candidate]:
    """Candidates with a patient: by the regular expression, the CSV or DICOM, or else the file's name."""
    guessed = False
    for candidate in candidates:
        if options.patient_regex:
            found = re.search(options.patient_regex, candidate.name)
            if found and found.group(1):
                yield replace(candidate, patient=found.group(1))
            else:
                notes.leave_out(candidate.name, "--patient-regex does not find a patient in its name")
        elif candidate.patient:
            yield candidate
        elif kind == "folder per class":
            guessed = True
            yield replace(candidate, patient=Path(candidate.name).stem)
        else:
            notes.leave_out(candidate.name, "no patient; give --patient-column or --patient-regex")
    if guessed:
        notes.warnings.append(
            "each image counts as a patient of its own: if a patient has several images, give --patient-regex, or the "
            "same patient may be in training and test"
        )


def _without_duplicates(candidates: Iterator[_Candidate], notes: _Notes) -> list[_Candidate]:
    """One candidate for each content; none where the same content has two labels or two patients."""
    by_digest: dict[str, list[_Candidate]] = defaultdict(list)
    for candidate in candidates:
        by_digest[candidate.digest].append(candidate)
    kept: list[_Candidate] = []
    for same in by_digest.values():
        if len({(frozenset(candidate.labels), _known_patient(candidate)) for candidate in same}) > 1:
            for candidate in same:
                notes.leave_out(candidate.name, "the same image has two different labels or patients")
            continue
        first, *others = sorted(same, key=lambda candidate: candidate.name)
        kept.append(first)
        for candidate in others:
            notes.leave_out(candidate.name, "a duplicate of another image")
    return sorted(kept, key=lambda candidate: candidate.name)


def _known_patient(candidate: _Candidate) -> str:
    """The patient, or nothing where the file's name stands for it."""
    return "" if candidate.patient == Path(candidate.name).stem else candidate.patient


def _header(cases: list[_Candidate], source: _Source, options: Options, notes: _Notes) -> dict[str, Any]:
    """What a manifest says before its cases, without its name."""
    found = {name for case in cases for name in case.labels}
    if not source.multi_label and len(found) < 2:
        message = f"{options.source}: all {len(cases)} usable cases are {min(found)!r}; a classifier needs two classes"
        raise FedImagingError(message, Reason.ONE_CLASS)
    classes = list(options.classes or sorted(found))
    if not classes:
        raise FedImagingError(f"{options.source}: no case has a finding; give --classes", Reason.ONE_CLASS)
    modalities = Counter(case.modality for case in cases if case.modality)
    return {
        "modality": options.modality or (modalities.most_common(1)[0][0] if modalities else "DX"),
        "task": "classification",
        "classes": classes,
        "multi_label": source.multi_label,
        "made": {
            "by": f"fedimaging {__version__} data index",
            "source": source.kind,
            "seed": options.seed,
            "fractions": list(options.fractions),
            "left_out": {reason: len(names) for reason, names in notes.left_out.items()},
            "synthetic": False,
        },
    }


def _entries(
    cases: list[_Candidate], multi_label: bool, options: Options, previous: Mapping[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """The cases as a manifest has them, by split."""
    patients = [case.patient for case in cases]
    splits = assign_splits(
        patients, seed=options.seed, fractions=options.fractions, previous=previous, strata=_rarest_class(cases)
    )
    entries: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for case in cases:
        label = list(case.labels) if multi_label else case.labels[0]
        entry = {"image": case.name, "label": label, "patient": case.patient, **case.covariates}
        entries[splits[case.patient]].append(entry)
    return entries


def _rarest_class(cases: list[_Candidate]) -> dict[str, str]:
    """Patient -> that of the patient's classes which fewest patients have: what the splits are balanced by."""
    classes: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        classes[case.patient].update(case.labels)
    patients = Counter(name for names in classes.values() for name in names)
    return {
        patient: min(names, key=lambda name: (patients[name], name), default="") for patient, names in classes.items()
    }


@contextmanager
def _removed_on_error(folder: Path) -> Iterator[list[Path]]:
    """Makes the folder; on an error removes what is in the list (newest first), and the folders that were made."""
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()][::-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield created
    except BaseException as error:
        for path in reversed(created):
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        if isinstance(error, OSError):
            reason = Reason.NO_DISK_SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else Reason.NO_DATASET
            raise FedImagingError(f"{folder}: can't be written to: {error.strerror}", reason) from None
        raise


def _copy(source: Path, target: Path, created: list[Path]) -> None:
    """Copies a file; a target of the same content is left as it is."""
    if target.exists():
        if filecmp.cmp(source, target, shallow=False):
            return
        raise FedImagingError(f"{target}: another file of this name exists; give an empty folder with --out")
    for parent in [parent for parent in target.parents if not parent.exists()][::-1]:
        parent.mkdir()
        created.append(parent)
    created.append(target)
    shutil.copyfile(source, target)


def _in_threads(what: str, function: Callable[[_T], _R], items: list[_T]) -> list[_R]:
    """The function's results in order, with a progress bar on stderr."""
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            return list(progress.track(pool.map(function, items), total=len(items), description=what))
    finally:
        pool.shutdown(cancel_futures=True)


def _summary(left_out: Mapping[str, list[str]], most: int = 3) -> str:
    """ "12 x no such file (a.png); ...": the commonest reasons in one line."""
    reasons = sorted(left_out.items(), key=lambda item: -len(item[1]))
    parts = [f"{len(names)} x {reason} ({names[0]})" for reason, names in reasons[:most]]
    return "; ".join(parts + [f"and {len(reasons) - most} more reasons"] * (len(reasons) > most)) or "no images found"


def show(result: IndexResult, console: Console) -> None:
    """Prints cases, patients and classes per split, and what was left out and why."""
    manifest = result.manifest
    table = Table(title=f"{manifest.name}: {escape(str(result.path))}", title_justify="left")
    for column in ("split", "cases", "patients", *manifest.classes):
        table.add_column(escape(column), justify="left" if column == "split" else "right")
    for split in SPLITS:
        cases = manifest.split(split)
        counts = (len(cases), len({case.patient for case in cases}), *manifest.class_counts(split).values())
        table.add_row(split, *map(str, counts))
    console.print(table)
    if result.kept_patients:
        console.print(f"{result.kept_patients} patients keep the split that they had")
    for reason, names in sorted(result.left_out.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        console.print(f"[yellow]left out {len(names)}:[/] {escape(reason)}: {escape(shown)}")
    for warning in result.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `index` to the `data` commands."""
    parser = subparsers.add_parser(
        "index",
        help="make a manifest from the images that are here",
        description="Makes a manifest from a folder of images: labels from a CSV, or from a folder per class.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "source", type=Path, help=f"folder of images (with {LABELS_FILE} or a folder per class), CSV, or .npz of arrays"
    )
    add("--labels", type=Path, metavar="CSV", help=f"labels; default {LABELS_FILE} in the folder, if it exists")
    add("--match", metavar="KEYWORD", help="the image column holds this DICOM element, such as SOPInstanceUID")
    add("--out", type=Path, help=f"default {MANIFEST_FILE} in the folder; images must lie below the manifest's folder")
    add("--copy", action="store_true", help="copy the images below the manifest's folder")
    add("--name", help="the dataset's name; default the name of the manifest's folder")
    add("--modality", help="default what the DICOM files say, else DX")
    for what, default in (("image", "file"), ("label", "label"), ("patient", "patient_id")):
        add(f"--{what}-column", metavar="NAME", help=f"column of the CSV; default {default}")
    for what in ("age", "sex", "vendor", "view"):
        default = "age_group" if what == "age" else what
        add(f"--{what}-column", metavar="NAME", help=f"column of the CSV; default {default} if there, else DICOM")
    add("--label-separator", metavar="TEXT", help="cases have several labels, separated by this in the label column")
    add("--patient-regex", metavar="REGEX", help="finds the patient as group 1 in an image's path")
    add("--classes", metavar="A,B", help="classes to use, in this order; default all, sorted")
    add("--rename", metavar="OLD=NEW", action="append", default=[], help="label to class; an empty NEW is no finding")
    add("--seed", type=int, default=0, help="of the split; default %(default)s")
    add("--fractions", default=",".join(map(str, FRACTIONS)), help="training,validation,test; default %(default)s")
    add("--keep", action=argparse.BooleanOptionalAction, default=True, help="keep the splits of an existing manifest")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    plain = {f.name: getattr(args, f.name) for f in fields(Options) if hasattr(args, f.name)}
    columns = {what: getattr(args, f"{what}_column") for what in ("image", "label", "patient", "sex", "vendor", "view")}
    columns["age_group"] = args.age_column
    options = Options(
        **plain
        | {
            "columns": {what: column for what, column in columns.items() if column},
            "classes": tuple(name.strip() for name in args.classes.split(",")) if args.classes else (),
            "rename": dict(_pair(text) for text in args.rename),
            "fractions": _fractions(args.fractions),
        }
    )
    show(build_index(options), Console())


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals or not old:
        raise FedImagingError(f"--rename {text}: write OLD=NEW, such as COVID-19=pneumonia")
    return old.strip(), new.strip()


def _fractions(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise FedImagingError(f"--fractions {text}: write three numbers, such as 0.7,0.1,0.2") from None
