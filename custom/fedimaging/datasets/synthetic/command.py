"""`python -m fedimaging data synth`: plans synthetic hospitals, writes their files, and puts them in place together."""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fedimaging.commands import add_command
from fedimaging.datasets.manifest import SPLITS, Manifest
from fedimaging.datasets.synthetic.brains import plan_brains, typical_brain_hospitals
from fedimaging.datasets.synthetic.hospitals import MOST_SITES, Item, Named, Plan, Request, typical_hospitals
from fedimaging.datasets.synthetic.photographs import cameras, plan_photographs
from fedimaging.datasets.synthetic.radiographs import plan_chest
from fedimaging.errors import FedImagingError, Reason

SIZES = ("small", "full")
FEWEST_CASES = 12

_MOST_COLUMNS = 5
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Kind:
    """What is made for one task.

    Args:
        dataset: its usual name.
        cases: usual number of cases of the hospitals in turn.
        sizes: pixels or voxels on the longer side, by the names of `SIZES`.
        largest: of the longer side.
        hospitals: the first so many typical hospitals.
        plan: what will be made for one hospital, from the hospital, its number, its cases and the request.
    """

    dataset: str
    cases: tuple[int, ...]
    sizes: tuple[int, int]
    largest: int
    hospitals: Callable[[int], Sequence[Named]]
    plan: Callable[[Any, int, int, Request], Plan]

    def size(self, name: str) -> int:
        return self.sizes[SIZES.index(name)]


TASKS = {
    "classification": Kind("chest_xray", (480, 400, 320), (256, 1024), 4096, typical_hospitals, plan_chest),
    "segmentation": Kind("brain_lesion", (80, 60, 50), (64, 192), 256, typical_brain_hospitals, plan_brains),
    "photographs": Kind("photographs", (400, 300, 200), (64, 256), 1024, cameras, plan_photographs),
}
SKEWED = "photographs"
"""the task whose hospitals can be given a skewed share of the classes"""


def synthesize(
    root: Path,
    *,
    task: str = "classification",
    dataset: str | None = None,
    hospitals: Sequence[Named] | int = 3,
    cases: Sequence[int] | int | None = None,
    longer: int | None = None,
    multi_label: bool = False,
    concentration: float | None = None,
    seed: int = 0,
    force: bool = False,
    workers: int | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Make synthetic hospitals below `root`, as `<site>/<dataset>/manifest.json` with the images below that folder.

    What is there already from the same arguments is left as it is.

    Args:
        root: the data root; made if missing.
        task: one of `TASKS`.
        dataset: its name; by default the task's usual one, as with `cases` and `longer`.
        hospitals: the hospitals, or how many typical ones.
        cases: per hospital, or one number for all.
        longer: pixels or voxels on the images' longest side.
        concentration: of the Dirichlet distribution of each hospital's classes, for photographs: the smaller, the more
            the hospitals differ; None for equal shares.
        seed: of everything; the same arguments give the same bytes.
        force: replace synthetic hospitals that were made with other arguments. Never touches what is not synthetic.
        workers: processes; the usable cores by default, one for a few images.
        console: where to show progress; nowhere by default.

    Returns:
        The manifests, in the order of the hospitals.

    Raises:
        FedImagingError: wrong arguments, a folder that holds other data, no space.
    """
    kind = _kind(task)
    if concentration is not None and (task != SKEWED or not 0.01 <= concentration <= 1000):
        raise FedImagingError(f"concentration {concentration:g}: give 0.01 to 1000, and with the task {SKEWED} only")
    dataset = kind.dataset if dataset is None else dataset
    plans = _plans(
        kind,
        dataset=dataset,
        hospitals=hospitals,
        cases=cases,
        longer=kind.size("small") if longer is None else longer,
        multi_label=multi_label,
        concentration=concentration,
        seed=seed,
    )
    targets = {plan.hospital.name: root / plan.hospital.name / dataset for plan in plans}
    with _own_errors(root):
        if not _up_to_date(root, dataset, plans, force):
            with _scratch(root) as scratch:
                _write(plans, scratch, dataset, workers, console)
                _swap(root, dataset, scratch, targets)
        elif console:
            console.print(f"{root}: up to date, made with the same arguments before", highlight=False)
    return [target / "manifest.json" for target in targets.values()]


def _kind(task: str) -> Kind:
    if task not in TASKS:
        raise FedImagingError(f"task {task!r}: choose from {', '.join(TASKS)}")
    return TASKS[task]


def _plans(
    kind: Kind,
    *,
    dataset: str,
    hospitals: Sequence[Named] | int,
    cases: Sequence[int] | int | None,
    longer: int,
    multi_label: bool,
    concentration: float | None,
    seed: int,
) -> list[Plan]:
    """Check the arguments and plan every hospital."""
    if not _NAME.fullmatch(dataset):
        raise FedImagingError(
            f"dataset {dataset!r}: use letters, digits, '.', '_' and '-', and begin with a letter or digit"
        )
    if not 32 <= longer <= kind.largest:
        raise FedImagingError(f"matrix {longer}: give 32 to {kind.largest} for the longest side")
    if not 0 <= seed < 2**32:
        raise FedImagingError(f"seed {seed}: give a number from 0 to {2**32 - 1}")
    sites = kind.hospitals(hospitals) if isinstance(hospitals, int) else list(hospitals)
    if len(sites) > MOST_SITES:
        raise FedImagingError(f"sites {len(sites)}: give at most {MOST_SITES}")
    names = [hospital.name for hospital in sites]
    if not names or len(set(names)) < len(names) or not all(map(_NAME.fullmatch, names)):
        raise FedImagingError(
            f"hospitals {', '.join(names)}: give each a name of its own, of letters, digits, '.', '_' and '-'"
        )
    counts = _counts(cases, len(sites), kind)
    request = Request(dataset, longer, multi_label, seed, concentration)
    return [
        kind.plan(hospital, at, count, request) for at, (hospital, count) in enumerate(zip(sites, counts, strict=True))
    ]


def _counts(cases: Sequence[int] | int | None, sites: int, kind: Kind) -> list[int]:
    if cases is None:
        return [kind.cases[site % len(kind.cases)] for site in range(sites)]
    counts = [cases] * sites if isinstance(cases, int) else list(cases)
    if len(counts) != sites:
        raise FedImagingError(f"cases {_commas(counts)}: give one number, or one for each of the {sites} sites")
    if min(counts) < FEWEST_CASES:
        raise FedImagingError(f"cases {_commas(counts)}: give each site {FEWEST_CASES} or more, to fill three splits")
    return counts


def _commas(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def _up_to_date(root: Path, dataset: str, plans: Sequence[Plan], force: bool) -> bool:
    """Whether `root` already holds exactly these plans; refuses to go on where something else is in the way."""
    if root.exists() and not root.is_dir():
        raise FedImagingError(f"{root}: is a file, not a folder; give another --out")
    there = _folders(root, dataset)
    wanted = {root / plan.hospital.name / dataset: plan for plan in plans}
    if set(there) == set(wanted) and all(_holds(folder, plan) for folder, plan in wanted.items()):
        return True
    foreign = [folder for folder in there if not _is_synthetic(folder)]
    if foreign:
        raise FedImagingError(
            f"{foreign[0]}: holds data that `data synth` did not make; give another --out or --dataset"
        )
    if there and not force:
        sites = ", ".join(folder.parent.name for folder in there)
        raise FedImagingError(
            f"{root}: holds {dataset} made with other arguments ({sites}); give another --out, or --force to replace it"
        )
    if not force and not _is_data_root(root):
        raise FedImagingError(f"{root}: is not empty and no data root; give another --out, or --force to add to it")
    return False


def _folders(root: Path, dataset: str) -> list[Path]:
    return sorted(folder for folder in root.glob(f"[!.]*/{dataset}") if not folder.is_dir() or any(folder.iterdir()))


def _is_data_root(root: Path) -> bool:
    """Whether `root` is new, empty, or holds manifests where a data root holds them."""
    visible = [entry for entry in root.glob("*") if not entry.name.startswith(".")]
    return not visible or any(root.glob("[!.]*/*/manifest.json"))


def _is_synthetic(folder: Path) -> bool:
    try:
        made = Manifest.read(folder / "manifest.json").made
    except FedImagingError:
        return False
    return made.get("synthetic") is True and str(made.get("by", "")).startswith("fedimaging ")


def _holds(folder: Path, plan: Plan) -> bool:
    try:
        manifest = Manifest.read(folder / "manifest.json")
        manifest.check_files(folder)
    except FedImagingError:
        return False
    return manifest.digest() == plan.manifest.digest()


@contextmanager
def _own_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        message = f"{root}: a process was ended from outside, for want of memory perhaps; try a smaller --size"
        raise FedImagingError(message, Reason.OUT_OF_MEMORY) from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = Reason.NO_DISK_SPACE if full else Reason.BAD_SETTING
        raise FedImagingError(
            f"{root}: can't write the synthetic hospitals: {error.strerror or error}", reason
        ) from None


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A hidden folder in `root` that is gone afterwards, as is `root` if it was new and stayed empty."""
    new = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".synth-", dir=root))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if new and not any(root.iterdir()):
            root.rmdir()


def _write(plans: Sequence[Plan], scratch: Path, dataset: str, workers: int | None, console: Console | None) -> None:
    jobs = [(item, scratch / plan.hospital.name / dataset) for plan in plans for item in plan.items]
    if workers is None:
        workers = min(_cores(), 1 + len(jobs) // 64)
    with _written(jobs, workers) as done:
        quiet = Console(quiet=True)
        for _ in track(done, "Synthetic hospitals", len(jobs), console=console or quiet, transient=True):
            pass
    for plan in plans:
        plan.manifest.write(scratch / plan.hospital.name / dataset / "manifest.json")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _written(jobs: Sequence[tuple[Item, Path]], workers: int) -> Iterator[Iterator[None]]:
    """The files being written, one `None` each, by this process or by others that end with the block."""
    if workers <= 1:
        yield map(_write_one, jobs)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    try:
        yield pool.map(_write_one, jobs, chunksize=8)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write_one(job: tuple[Item, Path]) -> None:
    item, folder = job
    item.write(folder)


def _swap(root: Path, dataset: str, scratch: Path, targets: Mapping[str, Path]) -> None:
    """Put the new folders in the place of the old ones."""
    for folder in _folders(root, dataset):
        folder.rename(scratch / f"old-{folder.parent.name}")
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
    for site, target in targets.items():
        target.parent.mkdir(exist_ok=True)
        (scratch / site / dataset).replace(target)


def add_commands(subparsers: Any) -> None:
    """Register `synth` in the group `data`."""
    parser = add_command(
        subparsers,
        "synth",
        "make synthetic hospitals",
        "python -m fedimaging data synth --out data/demo --sites 3 --cases 480,400,320\n"
        "python -m fedimaging data synth --out data/demo --task segmentation\n"
        "python -m fedimaging data synth --out data/skewed --task photographs --sites 8 --concentration 0.1",
        "Make synthetic hospitals, with a manifest for each: DICOM files of chest phantoms for\n"
        "classification, NIfTI files of brain phantoms with lesions for segmentation, and JPEG photographs\n"
        "of coloured figures of ten classes for classification in colour.\n"
        "They are for trying things out, and say nothing about real patients.",
    )
    parser.add_argument("--out", type=Path, required=True, help="the data root: <out>/<site>/<dataset>/manifest.json")
    parser.add_argument("--task", default="classification", help=f"{', '.join(TASKS)} (default: %(default)s)")
    parser.add_argument("--dataset", help=f"the dataset's name (default: {_of_tasks(lambda kind: kind.dataset)})")
    parser.add_argument("--sites", default="3", help="number of hospitals (default: %(default)s)")
    parser.add_argument(
        "--cases",
        help="images per hospital, one number or one for each "
        f"(default: {_of_tasks(lambda kind: _commas(kind.cases))}, in turn)",
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="small",
        help="pixels or voxels on the longest side: "
        f"{_of_tasks(lambda kind: _commas(kind.sizes))} (default: %(default)s)",
    )
    parser.add_argument("--matrix", help="the longest side in pixels or voxels, instead of --size")
    parser.add_argument("--multi-label", action="store_true", help="several findings per image; none means normal")
    parser.add_argument(
        "--concentration",
        type=float,
        help="of photographs: each hospital's share of the ten classes is drawn from a Dirichlet distribution of this "
        "concentration; 0.1 differs much, 100 little (default: equal shares)",
    )
    parser.add_argument("--seed", default="0", help="the same seed makes the same files (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace synthetic hospitals made with other arguments")
    parser.set_defaults(run=_run)


def _of_tasks(value: Callable[[Kind], str]) -> str:
    return " or ".join(dict.fromkeys(value(kind) for kind in TASKS.values()))


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise FedImagingError(f"--{name} {text!r}: give a whole number") from None


def _run(arguments: argparse.Namespace) -> None:
    cases: list[int] | int | None = None
    if arguments.cases is not None:
        numbers = [_whole("cases", text) for text in arguments.cases.split(",")]
        cases = numbers[0] if len(numbers) == 1 else numbers
    console = Console()
    manifests = synthesize(
        arguments.out,
        task=arguments.task,
        dataset=arguments.dataset,
        hospitals=_whole("sites", arguments.sites),
        cases=cases,
        longer=_whole("matrix", arguments.matrix) if arguments.matrix else _kind(arguments.task).size(arguments.size),
        multi_label=arguments.multi_label,
        concentration=arguments.concentration,
        seed=_whole("seed", arguments.seed),
        force=arguments.force,
        console=console,
    )
    console.print(_table([Manifest.read(path) for path in manifests]))


def _table(manifests: Sequence[Manifest]) -> Table:
    """Cases, patients, cases in training/validation/test, and classes per hospital."""
    shown = len(manifests[0].classes) <= _MOST_COLUMNS
    table = Table(
        "site",
        "cases",
        "patients",
        "splits",
        *(manifests[0].classes if shown else ("classes", "most frequent")),
        "matrix",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for manifest in manifests:
        splits = [manifest.split(split) for split in SPLITS]
        patients = {case.patient for cases in splits for case in cases}
        classes: list[int | str] = [_cases_with(manifest, name) for name in manifest.classes]
        sizes = "/".join(str(len(cases)) for cases in splits)
        total = sum(map(len, splits))
        if not shown:
            most = max(manifest.classes, key=lambda name: _cases_with(manifest, name))
            classes = [sum(count != 0 for count in classes), f"{most} {_cases_with(manifest, most) / total:.0%}"]
        numbers = (total, len(patients), sizes, *classes)
        table.add_row(manifest.made["hospital"], *map(str, numbers), "x".join(map(str, manifest.made["matrix"])))
    return table


def _cases_with(manifest: Manifest, name: str) -> int:
    if manifest.task == "segmentation":
        return int(manifest.made["cases_with"][name])
    return sum(manifest.class_counts(split)[name] for split in SPLITS)
