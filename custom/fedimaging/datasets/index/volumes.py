"""Sources of segmentation: the Decathlon layout, pairs of image and mask by name, and DICOM series with masks."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedimaging.datasets import images
from fedimaging.datasets.index.model import LABELS_FILE, Candidate, Notes, Options, Source
from fedimaging.datasets.volumes import (
    NIFTI_SUFFIXES,
    is_nifti,
    is_series_folder,
    read_label,
    read_volume,
    series_files,
)
from fedimaging.errors import FedImagingError, Reason

DECATHLON_FILE = "dataset.json"
MOST_CLASSES = 255

_THREADS = 2  # a CT volume takes gigabytes while it is read
_MODALITIES = {"MRI": "MR"}


def is_segmentation(options: Options) -> bool:
    """Whether the source is one of segmentation, by what was asked for or else by what lies there."""
    if options.task is not None:
        return options.task == "segmentation"
    if options.image_suffix or options.label_suffix or options.masks or options.allow_empty:
        return True
    classification = options.labels or (options.source / LABELS_FILE).exists()
    return not classification and (options.source / DECATHLON_FILE).is_file()


def find_volumes(options: Options, notes: Notes) -> Source:
    """The images and masks below the source, not yet read."""
    folder = options.source.resolve()
    if not folder.is_dir():
        raise FedImagingError(f"{options.source}: is no folder of volumes; give the folder", Reason.NO_DATASET)
    for option, value in (("--labels", options.labels), ("--match", options.match),
                          ("--label-separator", options.label_separator)):  # fmt: skip
        if value:
            raise FedImagingError(
                f"{option} {value}: is for classification; leave it out, or give --task classification"
            )
    pairs = options.image_suffix or options.label_suffix or options.masks
    if not pairs and (folder / DECATHLON_FILE).is_file():
        return _from_decathlon(folder, options, notes)
    return _from_pairs(folder, options, notes)


def _from_decathlon(folder: Path, options: Options, notes: Notes) -> Source:
    path = folder / DECATHLON_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise _bad(path, f"can't be read as JSON ({images.reason(error)}); restore it") from None
    entries = content.get("training") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise _bad(path, "has no list 'training' of images and labels; give --image-suffix, --label-suffix and --masks")
    classes = _classes(_structures(path, content.get("labels")), options)
    found: list[Candidate] = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("image", "label")):
            raise _bad(path, f"training[{number}] is not an object with the texts 'image' and 'label'; correct it")
        image, mask = (Path(os.path.normpath(folder / entry[key])) for key in ("image", "label"))
        fault = _fault(folder, image, "") or _fault(folder, mask, "its mask: ")
        if fault:
            notes.leave_out(entry["image"], fault)
            continue
        name = image.relative_to(folder).as_posix()
        mask_name = mask.relative_to(folder).as_posix()
        found.append(Candidate(name, image, guess=_without_suffix(image.name), mask_name=mask_name, mask=mask))
    if tests := content.get("test"):
        notes.warnings.append(f"{len(tests)} images of the list 'test' have no masks and are not used")
    modality = content.get("modality")
    said = str(modality.get("0", "")) if isinstance(modality, dict) else ""
    return Source(
        "Decathlon",
        folder,
        found,
        partial(inspect_volume, folder=folder, classes=classes, allow_empty=options.allow_empty),
        missing=len(entries) - len(found),
        classes=classes,
        modality=_MODALITIES.get(said, said),
        threads=_THREADS,
    )


def _structures(path: Path, labels: Any) -> tuple[str, ...]:
    """The names of the values 1, 2, ... in a Decathlon's `labels`."""
    numbers = [str(number) for number in range(len(labels))] if isinstance(labels, dict) else []
    if len(numbers) < 2 or set(labels) != set(numbers) or not all(isinstance(name, str) for name in labels.values()):
        raise _bad(
            path, "'labels' must name the values 0 (background), 1, 2, ... without a gap; correct it and the masks"
        )
    return tuple(labels[number] for number in numbers[1:])


def _classes(found: tuple[str, ...], options: Options) -> tuple[str, ...]:
    if found and options.classes and len(options.classes) != len(found):
        raise FedImagingError(
            f"--classes names {len(options.classes)} structures, but {DECATHLON_FILE} has {len(found)}: "
            f"{', '.join(found)}"
        )
    classes = tuple(options.rename.get(name, name) for name in options.classes or found)
    if not classes:
        raise FedImagingError(
            f"{options.source}: the masks do not say what their values mean; give --classes with the names of "
            "the values 1, 2, ... in this order"
        )
    if len(classes) > MOST_CLASSES or len(set(classes)) < len(classes) or not all(name.strip() for name in classes):
        raise FedImagingError(f"classes {', '.join(classes)}: give 1 to {MOST_CLASSES} names that differ")
    return classes


def _fault(folder: Path, path: Path, what: str) -> str | None:
    if not path.is_relative_to(folder):
        return f"{what}its path leaves the folder"
    return None if path.is_file() or path.is_dir() else f"{what}no such file"


def _from_pairs(folder: Path, options: Options, notes: Notes) -> Source:
    classes = _classes((), options)
    masks = (options.masks or folder).resolve()
    if not masks.is_dir():
        raise FedImagingError(f"{masks}: no such folder of masks", Reason.NO_DATASET)
    ends = (options.label_suffix,) if options.label_suffix else NIFTI_SUFFIXES
    named = _NamedMasks(masks, ends)
    keys = _keys(folder, masks, ends, options)
    found = {path: named.of(path, key) for path, key in keys}
    of_series = {mask for path, (mask, _) in found.items() if path.is_dir()}  # these look like images otherwise
    keys = [(path, key) for path, key in keys if path not in of_series]
    if not keys:
        raise FedImagingError(
            f"{folder}: holds no DICOM series and no NIfTI image whose name ends in "
            f"{options.image_suffix or ' or '.join(NIFTI_SUFFIXES)}; give --image-suffix",
            Reason.NO_DATASET,
        )
    uses = Counter(found[path][0] for path, _ in keys)
    guesses = Counter(_last(key) for _, key in keys)
    candidates: list[Candidate] = []
    for path, key in keys:
        mask, reason = found[path]
        name = path.relative_to(folder).as_posix()
        if mask is None or uses[mask] > 1:
            notes.leave_out(name, reason or "its mask is that of another image too")
            continue
        inside = mask.is_relative_to(folder)
        mask_name = mask.relative_to(folder).as_posix() if inside else f"masks/{mask.relative_to(masks).as_posix()}"
        guess = _last(key) if guesses[_last(key)] == 1 else key
        candidates.append(Candidate(name, path, guess=guess, mask_name=mask_name, mask=mask))
    if masks != folder and (unused := len(named.paths - uses.keys())):
        notes.warnings.append(f"{unused} masks belong to no image and are not used")
    return Source(
        "image and mask pairs",
        folder,
        candidates,
        partial(inspect_volume, folder=folder, classes=classes, allow_empty=options.allow_empty),
        missing=len(keys) - len(candidates),
        classes=classes,
        threads=_THREADS,
    )


def _keys(folder: Path, masks: Path, ends: tuple[str, ...], options: Options) -> list[tuple[Path, str]]:
    """Images and series below the folder, each with what its mask's name begins with."""
    starts = (options.image_suffix,) if options.image_suffix else NIFTI_SUFFIXES
    keys = [(path, path.relative_to(folder).as_posix()) for path in _folders(folder) if is_series_folder(path)]
    series = {path for path, _ in keys}
    for path in _niftis(folder):
        name = path.relative_to(folder).as_posix()
        start = next((suffix for suffix in starts if name.endswith(suffix)), None)
        is_mask = path.is_relative_to(masks) if masks != folder else _is_mask(name, start or "", ends)
        if start is not None and not is_mask and not series & set(path.parents):
            keys.append((path, name.removesuffix(start)))
    return sorted(keys)


def _is_mask(name: str, start: str, ends: tuple[str, ...]) -> bool:
    """Whether a name that ends like an image's ends like a mask's even more."""
    return any(len(end) > len(start) and end.endswith(start) and name.endswith(end) for end in ends)


class _NamedMasks:
    """The masks of a folder, found by the names of their images."""

    def __init__(self, folder: Path, ends: tuple[str, ...]) -> None:
        self.folder = folder
        self.ends = ends
        self.paths = {path for path in _niftis(folder) if path.name.endswith(ends)}
        self.names: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(self.paths):
            self.names[path.name].append(path)

    def of(self, image: Path, key: str) -> tuple[Path | None, str]:
        """The mask with the image's path, or else with its name, or else beside the series; or why there is none."""
        at_path = [path for end in self.ends if (path := self.folder / f"{key}{end}") in self.paths and path != image]
        by_name = [
            path for end in self.ends if _last(key) for path in self.names[f"{_last(key)}{end}"] if path != image
        ]
        for found in (at_path, by_name, *(self._beside(image) if image.is_dir() else ())):
            if len(found) > 1:
                return None, "several masks fit its name"
            if found:
                return found[0], ""
        return None, "no mask fits its name; see --label-suffix and --masks"

    def _beside(self, series: Path) -> Iterator[list[Path]]:
        """Masks in the series' own folder, then in the one above it if that holds no other series."""
        yield [path for path in sorted(self.paths) if path.parent == series]
        if sum(is_series_folder(path) for path in _folders(series.parent)) == 1:
            yield [path for path in sorted(self.paths) if path.parent == series.parent]


def inspect_volume(candidate: Candidate, folder: Path, classes: tuple[str, ...], allow_empty: bool) -> Candidate | str:
    """The candidate with its structures, digests and, for DICOM, what the header says; or why it can't be used."""
    if candidate.mask is None:
        return "no mask"
    try:
        volume = read_volume(candidate.path)
        label = read_label(candidate.mask, volume, len(classes), allow_empty=allow_empty)
        header = images.read_header(series_files(candidate.path)[0]) if candidate.path.is_dir() else None
    except FedImagingError as error:
        return _reason(candidate, str(error), folder)
    except MemoryError:
        return "too large for this machine's memory"
    digests = [
        hashlib.sha256(array.tobytes() + str(array.shape).encode()).hexdigest() for array in (volume.array, label)
    ]
    read = replace(
        candidate,
        labels=tuple(classes[value - 1] for value in np.unique(label) if value),
        digest=digests[0],
        mask_digest=digests[1],
        modality=volume.modality or "",
    )
    if header is None:
        return read
    patient = candidate.patient or images.element(header, "PatientID")
    return replace(read, patient=patient, covariates=images.covariates(header))


def _reason(candidate: Candidate, message: str, folder: Path) -> str:
    """An error without the name of the image at fault; with both names where image and mask do not fit."""
    if message.startswith(f"{candidate.path}: "):
        return message.removeprefix(f"{candidate.path}: ").replace(f"{folder}/", "")
    if f" {candidate.path} " not in message:
        message = message.removeprefix(f"{candidate.mask}: ")
        return f"its mask: {message}"
    return f"its mask {message}".replace(f"{folder}/", "")


def _folders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("[!.]*")) if path.is_dir() and _visible(path, folder)]


def _niftis(folder: Path) -> list[Path]:
    paths = (path for path in sorted(folder.rglob("[!.]*")) if is_nifti(path) and path.is_file())
    return [path for path in paths if _visible(path, folder)]


def _visible(path: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _last(key: str) -> str:
    return key.rstrip("/").rpartition("/")[2]


def _without_suffix(name: str) -> str:
    suffix = next((suffix for suffix in sorted(NIFTI_SUFFIXES, key=len, reverse=True) if name.endswith(suffix)), "")
    return name.removesuffix(suffix)


def _bad(path: Path, reason: str) -> FedImagingError:
    return FedImagingError(f"{path}: {reason}", Reason.BAD_MANIFEST)
