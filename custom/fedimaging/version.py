"""Which version of this package runs: its number, the hash of its sources, and whether a job can run on it."""

import hashlib
from functools import cache
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import TypeAdapter, ValidationError

from fedimaging import __version__
from fedimaging.errors import FedImagingError, Reason
from fedimaging.settings import Specifier

PACKAGE = Path(__file__).parent
SOURCE_SUFFIXES = frozenset({".py", ".html", ".css", ".typed"})


def needed_by_jobs() -> str:
    """What a job that is written today says it needs: this version or a later one that is compatible (PEP 440)."""
    return f"~={__version__}"


def require(specifier: object) -> None:
    """Refuses a job that needs another version than the one that runs.

    Args:
        specifier: see :data:`fedimaging.settings.Specifier`.

    Raises:
        FedImagingError: WRONG_VERSION, or BAD_SETTING if it is no specifier.
    """
    try:
        wanted = SpecifierSet(TypeAdapter(Specifier).validate_python(specifier, strict=True))
    except (ValidationError, InvalidSpecifier):
        raise FedImagingError(
            "job.fedimaging: expected the version that the job needs, such as ~=0.1.0", Reason.BAD_SETTING
        ) from None
    if not wanted.contains(__version__, prereleases=True):
        raise FedImagingError(
            f"the job needs fedimaging {specifier}, and this is {__version__}; ask the project admin for the site "
            "package of that version",
            Reason.WRONG_VERSION,
        )


def package_sources(package: Path = PACKAGE) -> dict[str, Path]:
    """The source files of this package by their path inside it. A file of another kind is an error: it would ship."""
    sources = {}
    for path in sorted(package.rglob("*")):
        name = path.relative_to(package)
        if "__pycache__" in name.parts or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink() or path.suffix not in SOURCE_SUFFIXES:
            raise FedImagingError(f"{path}: no source file of the package; remove it before kits or bundles are made")
        sources[name.as_posix()] = path
    return sources


@cache
def package_hash() -> str:
    """SHA-256 over names and contents of this package's sources: what a hospital reviews once."""
    files = (path for path in PACKAGE.rglob("*") if path.suffix in SOURCE_SUFFIXES and path.is_file())
    return tree_hash({path.relative_to(PACKAGE).as_posix(): sha256(path) for path in files})


def tree_hash(files: dict[str, str]) -> str:
    """SHA-256 of the lines ``<sha256>  <name>`` sorted by name, as ``sha256sum`` writes them."""
    return hashlib.sha256("".join(f"{files[name]}  {name}\n" for name in sorted(files)).encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
