"""Loaded, deterministically transformed cases: kept in memory first, then on disk, each under a byte budget.

The disk cache has one place, ``$XDG_CACHE_HOME/fedimaging`` (``~/.cache/fedimaging``), readable by its owner alone;
``python -m fedimaging data clear-cache`` deletes it. Random augmentation runs after the cache.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError

import torch

from fedimaging.datasets.manifest import Case
from fedimaging.errors import FedImagingError, Reason
from fedimaging.tasks import Item, Task


def cache_folder() -> Path:
    """Where the disk cache lies."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fedimaging"


def clear_cache() -> int:
    """Deletes the disk cache. Returns the number of bytes freed."""
    folder = cache_folder()
    size = sum(path.stat().st_size for path in folder.rglob("*.pt")) if folder.exists() else 0
    shutil.rmtree(folder, ignore_errors=True)
    return size


class DiskCache:
    """Items as files under a byte budget shared by all data sets of one owner."""

    def __init__(self, budget: int) -> None:
        self.folder = cache_folder()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder.chmod(0o700)
        self._free = budget - sum(path.stat().st_size for path in self.folder.glob("*.pt"))

    def get(self, key: str) -> Item | None:
        path = self.folder / f"{key}.pt"
        if not path.exists():
            return None
        try:
            item: Item = torch.load(path, weights_only=True)
        except (RuntimeError, EOFError, OSError, UnpicklingError):
            path.unlink(missing_ok=True)
            return None
        return item

    def put(self, key: str, item: Item) -> bool:
        """Stores the item whole or not at all. Returns False if the budget is used up."""
        size = item_bytes(item)
        if size > self._free:
            return False
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(item, file)
            Path(name).replace(self.folder / f"{key}.pt")
        except OSError as error:
            Path(name).unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise FedImagingError(
                    f"{self.folder}: no space left on the disk while caching; free some, or set "
                    "training.cache_disk_mb to 0",
                    Reason.NO_DISK_SPACE,
                ) from None
            raise
        self._free -= size
        return True


class CaseCache(Sequence[Item]):
    """The readable cases of one split, loaded once.

    Args:
        root: folder that the cases' paths are relative to.
        cases: the split's cases; those that cannot be read are left out of :attr:`cases` and listed in
            :attr:`unreadable` with the reason, for the site's eyes only.
        memory_budget: bytes of items kept in memory.
        disk: where the rest goes, if anywhere; what fits nowhere is loaded anew at each access.
        aborted: polled between cases; loading stops once it is true.
        progress: called with (cases loaded, cases in all).
    """

    def __init__(
        self,
        task: Task,
        root: Path,
        cases: Sequence[Case],
        *,
        memory_budget: int,
        disk: DiskCache | None = None,
        workers: int = 1,
        aborted: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._task, self._root, self._disk = task, root, disk
        self._memory: dict[int, Item] = {}
        self.memory_bytes = 0
        self.cases: list[Case] = []
        self.unreadable: list[str] = []
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for done, (case, loaded) in enumerate(zip(cases, _ahead(pool, self._try, cases), strict=False), start=1):
                if aborted():
                    break
                if isinstance(loaded, FedImagingError):
                    self.unreadable.append(str(loaded))
                else:
                    self._keep(len(self.cases), case, loaded, memory_budget)
                    self.cases.append(case)
                progress(done, len(cases))

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Item:  # type: ignore[override]
        item = self._memory.get(index)
        return item if item is not None else self._load(self.cases[index])

    def _try(self, case: Case) -> Item | FedImagingError:
        try:
            return self._load(case)
        except FedImagingError as error:
            return error

    def _load(self, case: Case) -> Item:
        if self._disk is not None and (item := self._disk.get(self._key(case))) is not None:
            return item
        return self._task.load(self._root, case)

    def _keep(self, index: int, case: Case, item: Item, memory_budget: int) -> None:
        size = item_bytes(item)
        if self.memory_bytes + size <= memory_budget:
            self._memory[index] = item
            self.memory_bytes += size
        elif self._disk is not None and self._disk.get(self._key(case)) is None:
            self._disk.put(self._key(case), item)

    def _key(self, case: Case) -> str:
        """Changes with the files, the label and every setting that the loaded item depends on."""
        files = [_fingerprint(self._root / name) for name in self._task.files(case)]
        return hashlib.sha256(repr((self._task.load_key(), files, case.label)).encode()).hexdigest()


def _fingerprint(path: Path) -> list[tuple[str, int, int]]:
    """Place, time and size of a file, or of each file in a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] * path.exists()
    return [(str(file.resolve()), (status := file.stat()).st_mtime_ns, status.st_size) for file in files]


def item_bytes(item: Item) -> int:
    return sum(tensor.nbytes for tensor in item.values())


def _ahead(
    pool: ThreadPoolExecutor, load: Callable[[Case], Item | FedImagingError], cases: Sequence[Case]
) -> Iterator[Item | FedImagingError]:
    """Results in order, a bounded number of loads ahead, so that memory does not fill with what is not kept."""
    window = 4 * pool._max_workers
    futures = [pool.submit(load, case) for case in cases[:window]]
    for position in range(len(cases)):
        loaded = futures[position].result()
        futures[position] = None  # type: ignore[call-overload]
        if position + window < len(cases):
            futures.append(pool.submit(load, cases[position + window]))
        yield loaded
