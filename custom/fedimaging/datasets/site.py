"""Where a site keeps a dataset: the one resolver from a logical name, as jobs use it, to a folder of this site."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from fedimaging.datasets.manifest import Manifest
from fedimaging.errors import FedImagingError, Reason

DATA_ROOT_VARIABLE = "FEDIMAGING_DATA"
SITE_FILE = "datasets.yml"
MANIFEST_FILE = "manifest.json"
STUDY_MOUNT = Path("/data")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_KEYS = ("path", "manifest")


@dataclass(frozen=True)
class Dataset:
    """One dataset at one site: its manifest, checked, and the folder its paths are relative to."""

    name: str
    site: str
    root: Path
    manifest_path: Path
    manifest: Manifest
    source: str
    """Which rule found it, for the site's own log."""


def resolve(name: str, site: str, local: Path | None) -> Dataset:
    """Finds a dataset, reads its manifest and checks that its images are there.

    The first rule that applies decides; if what it names is missing that is an error, never a reason to try the next:

    1. the environment variable FEDIMAGING_DATA: `<root>/<site>/<name>/manifest.json`;
    2. the dataset's entry in `local/datasets.yml`;
    3. the FLARE study mount: `/data/<study>/<name>/manifest.json`.

    Args:
        name: the dataset's logical name; a job may have chosen it, so it can be no path.
        site: the site's FLARE name.
        local: the site's `local` folder.

    Raises:
        FedImagingError: NO_DATASET if there is none, BAD_MANIFEST for a fault in it, BAD_SETTING for a wrong name.
    """
    for what, value in (("dataset", name), ("site", site)):
        if not _NAME.fullmatch(value):
            raise FedImagingError(f"{value!r} is no {what} name; use letters, digits, '.', '_' and '-'")
    manifest_path, source = (
        _from_environment(name, site) or _from_site_file(name, site, local) or _from_study_mount(name) or (None, "")
    )
    if manifest_path is None:
        raise FedImagingError(_what_to_write(name, site, local), Reason.NO_DATASET)
    try:
        manifest = Manifest.read(manifest_path)
    except FedImagingError as error:
        raise FedImagingError(f"{error} (dataset {name!r} as {source} says)", error.reason) from None
    manifest.check_files(manifest_path.parent, manifest_path)
    return Dataset(name, site, manifest_path.parent, manifest_path, manifest, source)


def _from_environment(name: str, site: str) -> tuple[Path, str] | None:
    root = os.environ.get(DATA_ROOT_VARIABLE)
    if not root:
        return None
    return Path(root).absolute() / site / name / MANIFEST_FILE, f"the environment variable {DATA_ROOT_VARIABLE}"


def _from_site_file(name: str, site: str, local: Path | None) -> tuple[Path, str] | None:
    if local is None or not (file := local.absolute() / SITE_FILE).exists():
        return None
    entries = _read_site_file(file)
    if name not in entries:
        return None
    entry = entries[name]
    if not isinstance(entry, dict) or "path" not in entry or not set(entry) <= set(_KEYS):
        raise _bad_file(file, f"{name} must be {{path: FOLDER, manifest: {MANIFEST_FILE}}}")
    if not all(isinstance(value, str) and value for value in entry.values()):
        raise _bad_file(file, f"{name}: path and manifest must be texts; put quotes around them")
    folder = file.parent / entry["path"].replace("{site}", site)
    return folder / entry.get("manifest", MANIFEST_FILE), str(file)


def _read_site_file(file: Path) -> dict[str, object]:
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise _bad_file(file, f"can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _bad_file(file, "is not UTF-8 text; save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise _bad_file(file, f"is not YAML{where}: {getattr(error, 'problem', None) or 'wrong syntax'}") from None
    if entries is None:
        return {}
    if not isinstance(entries, dict):
        raise _bad_file(file, f"must hold lines such as `chest_xray: {{path: /srv/xray, manifest: {MANIFEST_FILE}}}`")
    return entries


def _from_study_mount(name: str) -> tuple[Path, str] | None:
    try:
        found = sorted(path for path in STUDY_MOUNT.glob(f"*/{name}/{MANIFEST_FILE}") if path.is_file())
    except OSError:
        return None
    default = STUDY_MOUNT / "default" / name / MANIFEST_FILE
    if default in found:
        return default, f"the study mount {default.parents[1]}"
    if len(found) > 1:
        studies = ", ".join(path.parents[1].name for path in found)
        message = f"{STUDY_MOUNT}: the studies {studies} all hold {name!r}; say in local/{SITE_FILE} which to use"
        raise FedImagingError(message, Reason.NO_DATASET)
    return (found[0], f"the study mount {found[0].parents[1]}") if found else None


def _what_to_write(name: str, site: str, local: Path | None) -> str:
    file = (local or Path("local")) / SITE_FILE
    line = f"{name}: {{path: /folder/of/the/images, manifest: {MANIFEST_FILE}}}"
    return (
        f"site {site!r} has no dataset {name!r}: write the line `{line}` into {file}, where `python -m fedimaging data "
        f"index` makes the manifest (looked in ${DATA_ROOT_VARIABLE}, {file} and {STUDY_MOUNT}/<study>/{name})"
    )


def _bad_file(file: Path, reason: str) -> FedImagingError:
    return FedImagingError(f"{file}: {reason}", Reason.NO_DATASET)
