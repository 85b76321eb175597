"""Training throughput: our loop against the plain one, and the cost of data from the second epoch on.

Example: python tests/benchmarks/training.py --images 256 --size 64
"""

import argparse
import itertools
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

from fedimaging.datasets.images import read_image
from fedimaging.datasets.site import MANIFEST_FILE, resolve
from fedimaging.datasets.synthetic import synthesize
from fedimaging.tasks import Item
from fedimaging.training.loop import Site, exchanged
from fedimaging.training.precision import Precision
from fedimaging.training.settings import JobSettings

NETWORK = "DenseNet121"


class InMemory:
    """What the ideal data source is: every loaded item in a list."""

    def __init__(self, items: list[Item], cases: list[Any]) -> None:
        self.items, self.cases, self.unreadable = items, cases, list[str]()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


def job(size: int, precision: str, **training: Any) -> JobSettings:
    return JobSettings(
        {
            "dataset": "chest_xray",
            "task": {"name": "classification", "classes": ["normal", "consolidation", "effusion"], "image_size": size},
            "network": {"name": NETWORK},
            "training": {"precision": precision, **training},
        }
    )


def epoch_seconds(site: Site) -> float:
    state = exchanged(site.network.state_dict())
    return site.train({key: value.clone() for key, value in state.items()}, 0, 1).seconds


def plain_epoch(site: Site) -> Callable[[], float]:
    """The loop that one writes first: float32, NCHW, each image decoded and transformed when its batch needs it."""
    task, dataset, training = site.task, site.dataset, site.settings.training
    network = site.network.float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
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
    parser.add_argument("--images", type=int, default=320, help="images of the synthetic hospital")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest = synthesize(Path(folder), hospitals=1, cases=arguments.images)[0]
        assert manifest.name == MANIFEST_FILE
        (Path(folder) / "datasets.yml").write_text(f"chest_xray: {{path: {manifest.parent}}}\n")
        dataset = resolve("chest_xray", "hospital-a", Path(folder))

        ours = Site(job(arguments.size, "auto"), dataset)
        plain = Site(job(arguments.size, "float32"), dataset)
        ideal = Site(job(arguments.size, "auto"), dataset)
        loaded = ours.split("training")
        ideal._splits["training"] = InMemory([loaded[i] for i in range(len(loaded))], loaded.cases)  # type: ignore[assignment]
        spilled = Site(job(arguments.size, "auto", cache_memory_mb=0, cache_disk_mb=1024), dataset)
        run_plain = plain_epoch(plain)
        runs = {
            "auto, cached": lambda: epoch_seconds(ours),
            "auto, tensors in memory": lambda: epoch_seconds(ideal),
            "auto, disk cache": lambda: epoch_seconds(spilled),
            "plain: float32, NCHW, no cache": run_plain,
        }
        for run in runs.values():
            run()
        seconds = interleaved(runs, arguments.repeats)
        decode = time.monotonic()
        for case in dataset.manifest.training:
            read_image(dataset.root / case.image)
        decode = time.monotonic() - decode

    cases = len(dataset.manifest.training)
    precision = Precision.choose("auto")
    table = Table("loop", "images/s", "against plain", title=f"{NETWORK}, {arguments.size} px, {cases} images an epoch")
    for name, value in seconds.items():
        table.add_row(name, f"{cases / value:.0f}", f"{seconds['plain: float32, NCHW, no cache'] / value:.2f}x")
    console = Console()
    console.print(table)
    kind = "bfloat16, channels_last" if precision.bfloat16 else "float32"
    console.print(
        f"auto is {kind} here, {torch.get_num_threads()} threads; reading the DICOM files alone: {decode:.1f} s"
    )
    console.print(
        "from the second epoch on, against tensors in memory with the same augmentation: "
        f"{seconds['auto, tensors in memory'] / seconds['auto, cached']:.1%}"
    )


if __name__ == "__main__":
    main()
