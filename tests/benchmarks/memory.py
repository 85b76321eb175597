"""Peak memory of a site whose volumes outgrow the cache: so many cases, and ten times as many.

Each run is a process of its own. It loads the training split under a small budget of memory and of disk, reads every
case twice, and trains on a few batches. The larger dataset is the smaller one ten times over, by links, each copy a
case of its own to the cache.

Example: python tests/benchmarks/memory.py --cases 160 --memory-mb 24 --disk-mb 64
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedimaging.datasets.manifest import SPLITS, Case, Manifest
from fedimaging.datasets.site import resolve
from fedimaging.datasets.synthetic import synthesize
from fedimaging.training.cache import cache_folder
from fedimaging.training.loop import Site, exchanged
from fedimaging.training.settings import JobSettings

DATASET = "brain_lesion"


def settings(memory_mb: int, disk_mb: int) -> JobSettings:
    """Small patches and few batches: the network's own memory is the same in all runs and not what is looked at."""
    task = {"classes": ["lesion"], "spacing": [3.0] * 3, "patch_size": [32] * 3, "allow_empty": True}
    return JobSettings(
        {
            "dataset": DATASET,
            "task": {"name": "segmentation", **task},
            "network": {"name": "SegResNet", "init_filters": 8},
            "training": {
                "batch_size": 4,
                "max_batches": 8,
                "cache_memory_mb": memory_mb,
                "cache_disk_mb": disk_mb,
            },
        }
    )


def repeated(source: Path, folder: Path, times: int) -> Path:
    """The hospital in ``source`` ``times`` over, its files linked; returns the new hospital's folder."""
    manifest = Manifest.read(source / "manifest.json")
    splits: dict[str, list[Case]] = {split: [] for split in SPLITS}
    for copy in range(times):
        for split in SPLITS:
            for case in manifest.split(split):
                names = {"image": f"{copy}/{case.image}", "label": f"{copy}/{case.label}"}
                for old, new in zip((case.image, str(case.label)), names.values(), strict=True):
                    (folder / new).parent.mkdir(parents=True, exist_ok=True)
                    os.link(source / old, folder / new)
                splits[split].append(case.model_copy(update={**names, "patient": f"{case.patient}-{copy}"}))
    manifest.model_copy(update=splits).write(folder / "manifest.json")
    return folder


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(folder: Path, memory_mb: int, disk_mb: int) -> dict[str, float]:
    """Figures of one run in this process, whose caches are under the budgets given."""
    (folder / "datasets.yml").write_text(f"{DATASET}: {{path: {folder}}}\n")
    site = Site(settings(memory_mb, disk_mb), resolve(DATASET, "hospital-a", folder))
    idle = peak_mib()
    data = site.split("training")
    seconds = []
    for _ in range(2):
        start = time.monotonic()
        for i in range(len(data)):
            data[i]
        seconds.append(time.monotonic() - start)
    site.train({key: value.clone() for key, value in exchanged(site.network.state_dict()).items()}, 0, 1)
    return {
        "cases": len(data),
        "in memory": data.memory_bytes / 2**20,
        "on disk": sum(path.stat().st_size for path in cache_folder().glob("*.pt")) / 2**20,
        "idle": idle,
        "peak": peak_mib(),
        "seconds": min(seconds),
    }


def in_own_process(folder: Path, cache: Path, memory_mb: int, disk_mb: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(folder)]
    command += ["--memory-mb", str(memory_mb), "--disk-mb", str(disk_mb)]
    done = subprocess.run(
        command, env={**os.environ, "XDG_CACHE_HOME": str(cache)}, check=True, capture_output=True, text=True
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=160, help="of the smaller dataset (default: %(default)s)")
    parser.add_argument("--memory-mb", type=int, default=24, help="budget of the cache (default: %(default)s)")
    parser.add_argument("--disk-mb", type=int, default=64, help="budget of the disk cache (default: %(default)s)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    budgets = arguments.memory_mb, arguments.disk_mb
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, *budgets)))
        return
    table = Table("training cases", "all in memory", "cached in memory", "on disk", "peak", "over idle", "one pass")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        [manifest] = synthesize(root / "data", task="segmentation", hospitals=1, cases=arguments.cases, longer=48)
        for times in (1, 10):
            folder = repeated(manifest.parent, root / f"{times}", times)
            for chosen, whole in ((budgets, "no"), ((100_000, 0), "yes")):
                figures = in_own_process(folder, root / f"cache-{times}-{whole}", *chosen)
                table.add_row(
                    f"{figures['cases']:.0f}",
                    whole,
                    *(f"{figures[key]:.0f} MiB" for key in ("in memory", "on disk", "peak")),
                    f"{figures['peak'] - figures['idle']:.0f} MiB",
                    f"{figures['seconds']:.1f} s",
                )
    console = Console()
    console.print(table)
    console.print(f"budget where not all is in memory: {budgets[0]} MiB of memory, {budgets[1]} MiB of disk")


if __name__ == "__main__":
    main()
