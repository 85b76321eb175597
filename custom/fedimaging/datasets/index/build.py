"""From a source to a manifest: every case is read, what can't be used is told, and patients are split."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedimaging import __version__
from fedimaging.datasets.index import pictures, volumes
from fedimaging.datasets.index.files import copy, in_threads, removed_on_error
from fedimaging.datasets.index.model import LABELS_FILE, Candidate, IndexResult, Notes, Options, Source
from fedimaging.datasets.manifest import SPLITS, Manifest, assign_splits
from fedimaging.datasets.site import MANIFEST_FILE
from fedimaging.datasets.volumes import series_files
from fedimaging.errors import FedImagingError, Reason

MOST_UNREADABLE = 0.5
TASKS = ("classification", "segmentation")


def build_index(options: Options) -> IndexResult:
    """Reads the source, checks every case, splits by patient and writes the manifest.

    Raises:
        FedImagingError: if there is no source or no usable case, if too many cases can't be read, if there is only one
            class to tell apart, or if the manifest's folder does not hold the images; nothing is left behind then.
    """
    check(options)
    notes = Notes()
    out = _out(options)
    previous = Manifest.read(out).assignments() if options.keep and out.exists() else {}
    with removed_on_error(out.parent) as created, open_source(options, out.parent, notes) as source:
        cases = usable_cases(source, options, out.parent, notes)
        previous = {**source.splits, **previous}
        name = options.name or out.parent.name
        header = {"name": name, **header_of(cases, source, options, notes)}
        manifest = Manifest.parse(header | entries(cases, source, options, previous), out)
        for case in cases:
            copy_case(case, out.parent, created)
        manifest.check_files(out.parent, out)
        manifest.write(out)
    kept = len({case.patient for case in cases} & previous.keys())
    return IndexResult(out, manifest, dict(notes.left_out), notes.warnings, kept)


def usable_cases(source: Source, options: Options, root: Path | None, notes: Notes) -> list[Candidate]:
    """The cases that can be read and have a label and a patient; the others are noted with the reason.

    Args:
        root: the manifest's folder, which the cases' names are relative to; None if all are copied from the source.
    """
    candidates = _with_labels(source, options, notes) if source.task == "classification" else source.candidates
    placed = candidates if root is None else _placed(candidates, source, options, root, notes)
    readable = _readable(placed, source, notes)
    cases = _without_duplicates(_with_patients(readable, options, notes), notes)
    if not cases:
        raise FedImagingError(f"{options.source}: no usable case: {notes.summary()}", Reason.TOO_FEW_CASES)
    return cases


def copy_case(case: Candidate, folder: Path, created: list[Path]) -> None:
    """Puts a case's files where its names say, unless they lie there; what is made is added to `created`."""
    for path, name in ((case.path, case.name), (case.mask, case.mask_name)):
        if path is None or path == folder / name:
            continue
        for file in series_files(path) if path.is_dir() else [path]:
            copy(file, folder / name / file.relative_to(path), created)


def check(options: Options) -> None:
    """Refuses options that are wrong whatever the source holds."""
    pattern = options.patient_regex
    try:
        groups = re.compile(pattern).groups if pattern else 1
    except re.error as error:
        raise FedImagingError(f"--patient-regex {pattern}: {error}") from None
    if groups < 1:
        raise FedImagingError(f"--patient-regex {pattern}: put the part that is the patient in (parentheses)")
    if options.task not in (None, *TASKS):
        raise FedImagingError(f"--task {options.task}: choose from {', '.join(TASKS)}")
    if options.concentration is not None and not (options.sites and 0.01 <= options.concentration <= 1000):
        raise FedImagingError(
            f"--concentration {options.concentration:g}: give 0.01 to 1000, and only with --split-sites"
        )
    if not options.source.exists():
        raise FedImagingError(f"{options.source}: no such folder or file", Reason.NO_DATASET)


def _out(options: Options) -> Path:
    source = options.source
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
def open_source(options: Options, scratch: Path, notes: Notes) -> Iterator[Source]:
    """The source's cases, not yet read; arrays are unpacked in a folder below `scratch` that is gone afterwards."""
    source = options.source
    if volumes.is_segmentation(options):
        yield volumes.find_volumes(options, notes)
        return
    if source.suffix == ".npz":
        with tempfile.TemporaryDirectory(prefix=".index-", dir=scratch) as temporary:
            yield pictures.unpack(source, Path(temporary))
        return
    folder = source if source.is_dir() else source.parent
    labels = options.labels or (folder / LABELS_FILE if source.is_dir() else source)
    if options.labels or labels.exists():
        yield pictures.from_csv(folder.resolve(), labels, options, notes)
    else:
        yield pictures.from_class_folders(folder.resolve())


def _with_labels(source: Source, options: Options, notes: Notes) -> list[Candidate]:
    """Candidates with their classes after renaming, without those that have none of the chosen classes."""
    chosen: list[Candidate] = []
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


def _placed(candidates: list[Candidate], source: Source, options: Options, root: Path, notes: Notes) -> list[Candidate]:
    """Candidates named by their path below the manifest's folder, where they lie or where they will be copied to."""
    placed: list[Candidate] = []
    for candidate in candidates:
        paths = [path for path in (candidate.path, candidate.mask) if path]
        if all(_lies_in(path, root) for path in paths):
            names = [path.relative_to(root).as_posix() for path in paths]
            renamed = replace(candidate, name=names[0], mask_name="".join(names[1:]))
            placed.append(candidate if source.kind == "npz" else renamed)
        elif options.copy:
            placed.append(candidate)
        elif all(path.is_relative_to(root) for path in paths):
            notes.leave_out(candidate.name, "a link out of the manifest's folder; give --copy to copy it")
        else:
            where = next(path for path in paths if not path.is_relative_to(root))
            folder = source.folder if where.is_relative_to(source.folder) else where.parent
            raise FedImagingError(
                f"{root}: does not hold the images, which lie in {folder}; give --copy or leave out --out"
            )
    return placed


def _lies_in(path: Path, root: Path) -> bool:
    """Whether a file, or each file of a series, lies in a folder, links followed."""
    files = series_files(path) if path.is_dir() else [path]
    return path.is_relative_to(root) and all(file.resolve().is_relative_to(root.resolve()) for file in files)


def _readable(candidates: list[Candidate], source: Source, notes: Notes) -> list[Candidate]:
    """Reads every case; candidates with what their files say of themselves.

    Raises:
        FedImagingError: UNREADABLE_IMAGES if more than half of the images are missing or can't be read.
    """
    readable: list[Candidate] = []
    unreadable = source.missing
    results = in_threads("Reading images", source.inspect, candidates, source.threads)
    for candidate, result in zip(candidates, results, strict=True):
        if isinstance(result, str):
            unreadable += 1
            notes.leave_out(candidate.name, result)
        else:
            readable.append(result)
    total = len(candidates) + source.missing
    if unreadable > MOST_UNREADABLE * total:
        message = f"{unreadable} of {total} images are missing or can't be read: {notes.summary()}"
        raise FedImagingError(message, Reason.UNREADABLE_IMAGES)
    return readable


def _with_patients(candidates: list[Candidate], options: Options, notes: Notes) -> Iterator[Candidate]:
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
        elif candidate.guess:
            guessed = True
            yield replace(candidate, patient=candidate.guess)
        else:
            notes.leave_out(candidate.name, "no patient; give --patient-column or --patient-regex")
    if guessed:
        notes.warnings.append(
            "each image counts as a patient of its own: if a patient has several images, give --patient-regex, or the "
            "same patient may be in training and test"
        )


def _without_duplicates(candidates: Iterator[Candidate], notes: Notes) -> list[Candidate]:
    """One candidate for each content; none where the same content has two labels or two patients."""
    by_digest: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        by_digest[candidate.digest].append(candidate)
    kept: list[Candidate] = []
    for same in by_digest.values():
        if len({(frozenset(one.labels), one.mask_digest, _known_patient(one)) for one in same}) > 1:
            for candidate in same:
                notes.leave_out(candidate.name, "the same image has two different labels or patients")
            continue
        first, *others = sorted(same, key=lambda candidate: candidate.name)
        kept.append(first)
        for candidate in others:
            notes.leave_out(candidate.name, "a duplicate of another image")
    return sorted(kept, key=lambda candidate: candidate.name)


def _known_patient(candidate: Candidate) -> str:
    """The patient, or nothing where the file's name stands for it."""
    return "" if candidate.patient in (candidate.guess, Path(candidate.name).stem) else candidate.patient


def header_of(cases: list[Candidate], source: Source, options: Options, notes: Notes) -> dict[str, Any]:
    """What a manifest says before its cases, without its name."""
    modalities = Counter(case.modality for case in cases if case.modality)
    found = modalities.most_common(1)[0][0] if modalities else source.modality
    segmentation = source.task == "segmentation"
    return {
        "modality": options.modality or found or ("MR" if segmentation else "DX"),
        "task": source.task,
        "classes": list(source.classes) if segmentation else _found_classes(cases, source, options),
        "multi_label": source.multi_label,
        "made": {
            "by": f"fedimaging {__version__} data index",
            "source": source.kind,
            "seed": options.seed,
            "fractions": list(options.fractions),
            "left_out": notes.counts(),
            **({"empty_masks": sum(not case.labels for case in cases)} if segmentation else {}),
            "synthetic": False,
        },
    }


def _found_classes(cases: list[Candidate], source: Source, options: Options) -> list[str]:
    found = {name for case in cases for name in case.labels}
    if not source.multi_label and len(found) < 2:
        message = f"{options.source}: all {len(cases)} usable cases are {min(found)!r}; a classifier needs two classes"
        raise FedImagingError(message, Reason.ONE_CLASS)
    classes = list(options.classes or sorted(found))
    if not classes:
        raise FedImagingError(f"{options.source}: no case has a finding; give --classes", Reason.ONE_CLASS)
    return classes


def entries(
    cases: list[Candidate], source: Source, options: Options, previous: Mapping[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """The cases as a manifest has them, by split; the splits are balanced by class, or by what the masks hold."""
    patients = [case.patient for case in cases]
    splits = assign_splits(
        patients, seed=options.seed, fractions=options.fractions, previous=previous, strata=_rarest_class(cases)
    )
    listed: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for case in cases:
        names = list(case.labels)
        label = case.mask_name if source.classes else names if source.multi_label else names[0]
        entry = {"image": case.name, "label": label, "patient": case.patient, **case.covariates}
        listed[splits[case.patient]].append(entry)
    return listed


def _rarest_class(cases: list[Candidate]) -> dict[str, str]:
    """Patient -> that of the patient's classes which fewest patients have: what the splits are balanced by."""
    classes: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        classes[case.patient].update(case.labels)
    patients = Counter(name for names in classes.values() for name in names)
    return {
        patient: min(names, key=lambda name: (patients[name], name), default="") for patient, names in classes.items()
    }
