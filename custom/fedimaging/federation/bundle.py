"""A job with the package inside, for federations whose sites take code with a job (BYOC)."""

from pathlib import Path

from fedimaging.errors import FedImagingError
from fedimaging.federation.job import CLIENT_FILE, META_FILE, SERVER_FILE, JobFolder
from fedimaging.version import PACKAGE, package_sources, sha256

CUSTOM = f"app/custom/{PACKAGE.name}"


def bundle(folder: Path, out: Path, package: Path = PACKAGE) -> dict[str, str]:
    """Copies a job and the package's source files into ``out``; the same input gives the same bytes.

    Args:
        folder: the job.
        out: a folder that is new or empty.
        package: where the package's sources are.

    Returns:
        the SHA-256 of each file by its path in the bundle, sorted.

    Raises:
        FedImagingError: the job is faulty, ``out`` holds something, or the package has a file that is no source of
            its own; then nothing is written.
    """
    JobFolder(folder).settings()
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise FedImagingError(f"{out}: holds something already; name a new folder with --out")
    files = {name: folder / name for name in (META_FILE, SERVER_FILE, CLIENT_FILE)}
    files |= {f"{CUSTOM}/{name}": path for name, path in package_sources(package).items()}
    for path in files.values():
        if path.is_symlink() or not path.is_file():
            raise FedImagingError(f"{path}: no plain file; a bundle holds nothing else")
    for name, path in files.items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return {name: sha256(out / name) for name in sorted(files)}
