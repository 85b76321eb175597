"""Training throughput: our loop against the plain one, and the cost of data from the second epoch on.

Example: python tests/benchmarks/training.py --job jobs/brain_lesion_fedavg --cases 60
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fedimaging.datasets.site import resolve
from fedimaging.datasets.synthetic import synthesize
from fedimaging.federation.job import JobFolder
from fedimaging.tasks import Item
from fedimaging.training.loop import Site, exchanged
from fedimaging.training.settings import JobSettings

JOBS = Path(__file__).parents[2] / "jobs"
PLAIN = "plain: float32, channels first, no cache"


class InMemory:
    """What the ideal data source is: every loaded item in a list."""

    def __init__(self, items: list[Item], cases: list[Any]) -> None:
        self.items, self.cases, self.unreadable = items, cases, list[str]()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


def changed(settings: JobSettings, **training: Any) -> JobSettings:
    """The job with other settings of local training."""
    raw = settings.to_dict()
    return JobSettings({**raw, "training": {**raw["training"], "epochs": 1, **training}})


def epoch_seconds(site: Site) -> float:
    state = exchanged(site.network.state_dict())
    return site.train({key: value.clone() for key, value in state.items()}, 0, 1).seconds


def plain_epoch(site: Site) -> Callable[[], float]:
    """The loop that one writes first: float32, channels first, each case loaded when its batch needs it."""
    task, dataset, training = site.task, site.dataset, site.settings.training
    network = site.network
    optimizer = torch.optim.AdamW(network.parameters(), lr=training.learning_rate)
    loss_function = task.loss(dataset.manifest.training)
    augment = task.augmentation(0)

    def run() -> float:
        start = time.monotonic()
        network.train()
        order = torch.randperm(len(dataset.manifest.training)).tolist()
        for first in range(0, len(order) - training.batch_size + 1, training.batch_size):
            chosen = order[first : first + training.batch_size]
            batch = task.collate([augment(task.load(dataset.root, dataset.manifest.training[i])) for i in chosen])
            optimizer.zero_grad()
            loss = loss_function(network(batch["image"]), batch["label"])
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            float(loss.detach())
        return time.monotonic() - start

    return run


def interleaved(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each, measured in turns so that the machine's moods hit all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names: Iterator[str] = itertools.chain.from_iterable(itertools.repeat(list(runs), repeats))
    for name in names:
        seconds[name].append(runs[name]())
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--job", type=Path, default=JOBS / "chest_xray_fedavg", help="job folder (default: %(default)s)"
    )
    parser.add_argument("--cases", type=int, default=320, help="cases of the synthetic hospital (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    settings = JobFolder(arguments.job).settings()
    task = settings.task.settings.name
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        root = Path(folder)
        [manifest] = synthesize(root, task=task, dataset=settings.dataset, hospitals=1, cases=arguments.cases)
        (root / "datasets.yml").write_text(f"{settings.dataset}: {{path: {manifest.parent}}}\n")
        dataset = resolve(settings.dataset, "hospital-a", root)

        ours, ideal = Site(changed(settings), dataset), Site(changed(settings), dataset)
        plain = Site(changed(settings, precision="float32"), dataset)
        loaded = ours.split("training")
        ideal._splits["training"] = InMemory([loaded[i] for i in range(len(loaded))], loaded.cases)  # type: ignore[assignment]
        spilled = Site(changed(settings, cache_memory_mb=0, cache_disk_mb=4096), dataset)
        runs = {
            "auto, cached": lambda: epoch_seconds(ours),
            "auto, tensors in memory": lambda: epoch_seconds(ideal),
            "auto, disk cache": lambda: epoch_seconds(spilled),
            PLAIN: plain_epoch(plain),
        }
        for run in runs.values():
            run()
        seconds = interleaved(runs, arguments.repeats)
        loading = time.monotonic()
        for case in dataset.manifest.training:
            settings.task.load(dataset.root, case)
        loading = time.monotonic() - loading

    cases = len(dataset.manifest.training)
    size = " x ".join(map(str, settings.task.input_shape))
    table = Table("loop", "cases/s", "against plain", title=f"{settings.network.name}, {size}, {cases} cases an epoch")
    for name, value in seconds.items():
        table.add_row(name, f"{cases / value:.1f}", f"{seconds[PLAIN] / value:.2f}x")
    console = Console()
    console.print(table)
    kind = "bfloat16, channels last" if ours.precision.bfloat16 else "float32"
    console.print(f"auto is {kind} here, {torch.get_num_threads()} threads; reading the cases alone: {loading:.1f} s")
    console.print(
        "from the second epoch on, against tensors in memory with the same augmentation: "
        f"{seconds['auto, tensors in memory'] / seconds['auto, cached']:.1%}"
    )


if __name__ == "__main__":
    main()
