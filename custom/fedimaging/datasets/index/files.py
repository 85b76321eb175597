"""Files of `data index`: copies that are undone on an error, and reading in threads."""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

from fedimaging.errors import FedImagingError, Reason

_T = TypeVar("_T")
_R = TypeVar("_R")


@contextmanager
def removed_on_error(folder: Path) -> Iterator[list[Path]]:
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


def copy(source: Path, target: Path, created: list[Path]) -> None:
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


def in_threads(what: str, function: Callable[[_T], _R], items: list[_T], most: int = 8) -> list[_R]:
    """The function's results in order, with a progress bar on stderr."""
    pool = ThreadPoolExecutor(max_workers=min(most, os.cpu_count() or 1))
    try:
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            return list(progress.track(pool.map(function, items), total=len(items), description=what))
    finally:
        pool.shutdown(cancel_futures=True)
