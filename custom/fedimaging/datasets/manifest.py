"""The manifest: the list of a dataset's cases, and the split of its patients into training, validation and test.

The file is a data list in the layout of the Medical Segmentation Decathlon, as MONAI reads it, with a header:

    {"name": "chest_xray", "modality": "DX", "task": "classification", "classes": ["normal", "pneumonia"],
     "multi_label": false, "made": {"by": "fedimaging data index", "seed": 0},
     "training": [{"image": "images/1.dcm", "label": "normal", "patient": "P1", "sex": "F"}],
     "validation": [], "test": []}

Paths are relative to the file and stay below its folder. A multi-label case has a list of class names, empty where
nothing was found. In a segmentation manifest the image is a file or the folder of a DICOM series, the label is the path
of the mask, and the classes are the structures of the mask's values 1, 2 and so on; 0 is the background.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from fedimaging.errors import FedImagingError, Reason

SPLITS = ("training", "validation", "test")
COVARIATES = ("age_group", "sex", "vendor", "view")
FRACTIONS = (0.7, 0.1, 0.2)

_HEADER = ("name", "modality", "task", "classes", "multi_label", "made")
_SMALLEST_STRATUM = len(SPLITS) + 1

Split = Literal["training", "validation", "test"]


def _label(value: object) -> object:
    """Tells a wrong label in one line, where each branch of a union would complain."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError("is neither a text nor a list of texts")
    if not all(name.strip() for name in names):
        raise ValueError("is empty; a multi-label case without a finding has an empty list")
    return value


Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
Label = Annotated[str | tuple[str, ...], BeforeValidator(_label)]


class Case(BaseModel):
    """One labelled image or volume."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: Text
    label: Label
    patient: Text
    age_group: Text | None = None
    sex: Text | None = None
    vendor: Text | None = None
    view: Text | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names of a classification case; one, or any number of a multi-label case."""
        return (self.label,) if isinstance(self.label, str) else self.label


class Manifest(BaseModel):
    """The cases of one dataset at one site, by split. Construction checks everything that needs no file."""

    model_config = ConfigDict(extra="forbid")

    name: Text
    modality: Text
    task: Literal["classification", "segmentation"]
    classes: list[Text] = Field(min_length=1)
    multi_label: bool = False
    made: dict[str, Any] = {}
    training: list[Case] = []
    validation: list[Case] = []
    test: list[Case] = []

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads and checks a manifest file; whether its images exist is `check_files`' affair.

        Raises:
            FedImagingError: NO_DATASET if there is no file, BAD_MANIFEST for a fault in it, naming file and entry.
        """
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            message = f"{path}: no such manifest; make it with `python -m fedimaging data index`"
            raise FedImagingError(message, Reason.NO_DATASET) from None
        except OSError as error:
            raise FedImagingError(f"{path}: can't read the manifest: {error.strerror}", Reason.NO_DATASET) from None
        except UnicodeDecodeError:
            raise _bad(path, "is not UTF-8 text; save it as UTF-8") from None
        try:
            data = json.loads(text, object_pairs_hook=_unique_keys)
        except json.JSONDecodeError as error:
            raise _bad(path, f"line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
        except (_RepeatedKeyError, RecursionError) as error:
            raise _bad(path, str(error)) from None
        return cls.parse(data, path)

    @classmethod
    def parse(cls, data: object, path: Path) -> Manifest:
        """Builds a manifest from plain values; `path` is the file that an error names.

        Raises:
            FedImagingError: BAD_MANIFEST, one line naming file, entry and reason.
        """
        if not isinstance(data, dict):
            raise _bad(path, f"holds a {type(data).__name__}, not an object with the keys {', '.join(_HEADER)}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _bad(path, _first_fault(error)) from None

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes: {_first_repeated(self.classes)!r} is listed twice")
        used: dict[str, str] = {}
        patients: dict[str, tuple[str, str]] = {}
        for split, entry, case in self._entries():
            self._check_label(entry, case)
            for what, path in zip(("image", "mask"), self._paths(case), strict=False):
                if reason := _path_fault(path):
                    raise ValueError(f"{entry}: {path!r} {reason}")
                name = PurePosixPath(path).as_posix()
                if name in used:
                    raise ValueError(f"{entry}: the {what} {name!r} is already in {used[name]}; remove one of them")
                used[name] = entry
            other_split, other_entry = patients.setdefault(case.patient, (split, entry))
            if other_split != split:
                raise ValueError(f"{entry}: its patient is also in {other_entry}; a patient belongs to one split")
        if not used:
            raise ValueError(f"holds no case in {', '.join(SPLITS)}")
        return self

    def _check_label(self, entry: str, case: Case) -> None:
        if self.task == "segmentation":
            if not isinstance(case.label, str):
                raise ValueError(f"{entry}: label is a list, but in a segmentation manifest it is the mask's path")
            return
        if isinstance(case.label, str) == self.multi_label:
            wanted = "a list of class names" if self.multi_label else "one class name (multi_label is false)"
            raise ValueError(f"{entry}: label must be {wanted}")
        if len(set(case.class_names)) < len(case.class_names):
            raise ValueError(f"{entry}: label names the class {_first_repeated(case.class_names)!r} twice")
        for name in case.class_names:
            if name not in self.classes:
                raise ValueError(f"{entry}: unknown class {name!r}; the classes are {', '.join(self.classes)}")

    def _entries(self) -> Iterator[tuple[str, str, Case]]:
        for split in SPLITS:
            for index, case in enumerate(self.split(split)):
                yield split, f"{split}[{index}]", case

    def _paths(self, case: Case) -> tuple[str, ...]:
        return (case.image, str(case.label)) if self.task == "segmentation" else (case.image,)

    def split(self, name: str) -> list[Case]:
        """The cases of `training`, `validation` or `test`."""
        if name not in SPLITS:
            raise FedImagingError(f"{name!r} is no split; the splits are {', '.join(SPLITS)}")
        cases: list[Case] = getattr(self, name)
        return cases

    def class_counts(self, split: str) -> dict[str, int]:
        """Cases per class, in the order of `classes`; empty for segmentation, where images have no class."""
        if self.task == "segmentation":
            return {}
        counts = Counter(name for case in self.split(split) for name in case.class_names)
        return {name: counts[name] for name in self.classes}

    def assignments(self) -> dict[str, str]:
        """Patient -> split, what `assign_splits` takes as `previous`."""
        return {case.patient: split for split, _, case in self._entries()}

    @property
    def synthetic(self) -> bool:
        """Whether the images are of no real patient, as `made` says."""
        return self.made.get("synthetic") is True

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hexadecimal: the same for the same header and cases in the same order."""
        canonical = json.dumps(self._plain(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _plain(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True)

    def write(self, path: Path) -> None:
        """Writes the manifest, one case a line, in one step: a reader sees the old file or the whole new one.

        Raises:
            FedImagingError: where the folder can't be written to.
        """
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("w", encoding="utf-8") as file:
                    file.write(_pretty(self._plain()))
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            reason = Reason.NO_DISK_SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else Reason.NO_DATASET
            raise FedImagingError(f"{path}: can't write the manifest: {error.strerror}", reason) from None

    def check_files(self, root: Path, path: Path | None = None) -> None:
        """Each image and mask is a file that lies in `root`, the manifest's folder, links followed.

        The image of a segmentation case may be the folder of a DICOM series; this holds for the files in it then.

        Args:
            root: the manifest's folder.
            path: the file that an error names; the folder by default.

        Raises:
            FedImagingError: BAD_MANIFEST, naming the manifest, the entry and the file.
        """
        path = path or root
        base = os.path.realpath(root).rstrip(os.sep) + os.sep
        images: dict[str, str] = {}
        for _, entry, case in self._entries():
            for name in self._paths(case):
                series = name == case.image and self.task == "segmentation" and (root / name).is_dir()
                for file in _visible_files(root / name) if series else [root / name]:
                    shown = f"{entry}: {file.relative_to(root).as_posix()!r}"
                    real = os.path.realpath(file)
                    if not real.startswith(base):
                        raise _bad(path, f"{shown} is a link out of the manifest's folder; copy the file into it")
                    if fault := _file_fault(real):
                        raise _bad(path, f"{shown} {fault}; restore it or index the folder again")
            image = os.path.realpath(root / case.image)
            if image in images:
                raise _bad(path, f"{entry}: {case.image!r} is the same file as the image of {images[image]}")
            images[image] = entry


def assign_splits(
    patients: Iterable[str],
    *,
    seed: int,
    fractions: Sequence[float] = FRACTIONS,
    previous: Mapping[str, str] | None = None,
    strata: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Puts each patient into one split, by seed and independent of the order of the input.

    Patients in `previous` stay where they are. New ones are taken in the order of a seeded hash and go where their
    stratum is furthest below its share, so a fresh split is within one patient of the fractions per stratum. In a
    stratum of four patients or more each split gets at least one; smaller strata are split together.

    Args:
        patients: IDs, repeated or not.
        seed: of the hash.
        fractions: shares of training, validation and test; they sum to 1, and a share of 0 leaves a split empty.
        previous: patient -> split of an earlier manifest; patients no longer listed are ignored.
        strata: patient -> what to balance over the splits, such as a class; without it all are one stratum.

    Returns:
        Patient -> "training", "validation" or "test", for the given patients, sorted.
    """
    shares = _shares(fractions)
    result: dict[str, str] = {}
    for members in _strata(set(patients), strata or {}):
        kept = {patient: previous[patient] for patient in members if previous and patient in previous}
        if unknown := set(kept.values()) - set(SPLITS):
            raise FedImagingError(f"{min(unknown)!r} is no split; the splits are {', '.join(SPLITS)}")
        result |= kept | _place(members - kept.keys(), kept, _targets(len(members), shares), seed)
    return dict(sorted(result.items()))


def _shares(fractions: Sequence[float]) -> dict[str, float]:
    valid = len(fractions) == len(SPLITS) and all(math.isfinite(value) and value >= 0 for value in fractions)
    if not valid or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        given = ", ".join(f"{value:g}" for value in fractions)
        raise FedImagingError(f"fractions {given}: give three shares of {', '.join(SPLITS)} that sum to 1")
    return dict(zip(SPLITS, fractions, strict=True))


def _strata(patients: set[str], strata: Mapping[str, str]) -> list[set[str]]:
    groups: dict[str, set[str]] = defaultdict(set)
    for patient in patients:
        groups[strata.get(patient, "")].add(patient)
    large = [group for group in groups.values() if len(group) >= _SMALLEST_STRATUM]
    small = [group for group in groups.values() if len(group) < _SMALLEST_STRATUM]
    return [*large, set().union(*small)]


def _targets(count: int, shares: Mapping[str, float]) -> dict[str, float]:
    """Wanted patients per split; none below one where there are enough, at the expense of the largest."""
    targets = {split: share * count for split, share in shares.items()}
    if count >= _SMALLEST_STRATUM:
        targets = {split: max(1.0, target) if shares[split] else 0.0 for split, target in targets.items()}
        largest = max(targets, key=lambda split: targets[split])
        targets[largest] -= sum(targets.values()) - count
    return targets


def _place(new: set[str], kept: Mapping[str, str], targets: Mapping[str, float], seed: int) -> dict[str, str]:
    counts = Counter(kept.values())
    placed: dict[str, str] = {}
    for patient in sorted(new, key=lambda patient: (hashlib.sha256(f"{seed}:{patient}".encode()).digest(), patient)):
        lacking = {split: round(target - counts[split], 9) for split, target in targets.items() if target > 0}
        split = max(lacking, key=lambda split: (lacking[split], counts[split] == 0))
        placed[patient] = split
        counts[split] += 1
    return placed


class _RepeatedKeyError(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise _RepeatedKeyError(f"the key {_first_repeated(keys)!r} occurs twice in one object; merge the two")
    return dict(pairs)


def _first_repeated(names: Sequence[str]) -> str:
    return next(name for index, name in enumerate(names) if name in names[:index])


def _path_fault(path: str) -> str | None:
    """What is wrong with a relative path, or None."""
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).drive or path.startswith("\\"):
        return "is an absolute path; paths are relative to the manifest"
    if "\\" in path or "\0" in path:
        return "holds a backslash or a NUL; separate folders by /"
    if ".." in PurePosixPath(path).parts:
        return "leaves the manifest's folder (..); images lie below it"
    if not PurePosixPath(path).parts:
        return "names no file"
    return None


def _visible_files(folder: Path) -> list[Path]:
    """What lies in a series' folder; the folder itself if that is nothing."""
    return sorted(path for path in folder.glob("[!.]*") if not path.is_dir()) or [folder]


def _file_fault(path: str) -> str | None:
    try:
        mode = Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except OSError as error:
        return f"can't be reached ({error.strerror})"
    return None if stat.S_ISREG(mode) else "is no file"


def _first_fault(error: ValidationError) -> str:
    """The first of pydantic's complaints in our words: where, and why."""
    faults = error.errors(include_url=False, include_context=True)
    fault = faults[0]
    kind, where = fault["type"], _where(fault["loc"])
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    key = str(fault["loc"][-1]) if fault["loc"] else ""
    parent = _where(fault["loc"][:-1])
    in_entry = f"{parent}: " if parent else ""
    if kind == "extra_forbidden":
        allowed = Case.model_fields if parent else Manifest.model_fields
        return f"{in_entry}unknown key {key!r}; the keys are {', '.join(allowed)}{more}"
    if kind == "missing":
        return f"{in_entry}the key {key!r} is missing{more}"
    if kind in ("string_too_short", "string_pattern_mismatch"):
        return f"{where} is empty{more}"
    if kind == "value_error":
        reason = str(fault["ctx"]["error"])
        return f"{where} {reason}{more}" if where else reason
    text = fault["msg"]
    return f"{where}: {text[:1].lower()}{text[1:]}{more}"


def _where(location: Sequence[int | str]) -> str:
    """("training", 12, "image") -> "training[12].image"."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _bad(path: Path, reason: str) -> FedImagingError:
    return FedImagingError(f"{path}: {' '.join(reason.split())}", Reason.BAD_MANIFEST)


def _pretty(plain: dict[str, Any]) -> str:
    """JSON with one case a line, so that a person and a diff can read it."""
    parts = []
    for key, value in plain.items():
        if key in SPLITS and value:
            lines = ",\n".join(f"    {json.dumps(case, ensure_ascii=False)}" for case in value)
            parts.append(f"  {json.dumps(key)}: [\n{lines}\n  ]")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
