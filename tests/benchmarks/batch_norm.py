"""What BatchNorm's statistics cost a federation: the averaged model with the averaged ones, and without.

Trains a pooled and a federated model in one process, over the rounds and sites of a job, and judges both on every
site's test cases: with the running statistics that training left (of the federated model the sites' average), with
statistics measured anew over all sites' training cases, and with each site's own.

Example: python tests/benchmarks/batch_norm.py --data data/demo --set rounds=8
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fedimaging.compare.runs import Comparison, pool
from fedimaging.datasets.site import Dataset
from fedimaging.federation.job import parse_changes
from fedimaging.federation.selection import ModelSelection
from fedimaging.training.loop import Site, shuffled_batches
from fedimaging.training.rounds import run_rounds
from fedimaging.training.settings import JobSettings
from fedimaging.training.strategies import State, exchanged

JOBS = Path(__file__).parents[2] / "jobs"
console = Console(stderr=True)


def best_model(name: str, sites: Sequence[Site], judges: Sequence[Site], rounds: int, steps: int | None) -> State:
    """The weights after the round that did best on the judges' validation cases."""
    selection, best = ModelSelection(judges[0].task.key_metric), State()
    for number, record in enumerate(run_rounds(sites, rounds, steps=steps)):
        metrics = {site.dataset.site: site.metrics(record.weights) for site in judges}
        value, better = selection.judge(number, metrics)
        best = {key: tensor.clone() for key, tensor in record.weights.items()} if better else best
        console.print(f"{name}, round {number}: validation {'undefined' if value is None else f'{value:.3f}'}")
    return best


def together(found: Sequence[State], cases: Sequence[int]) -> State:
    """The running statistics of several sites as those of all their cases."""
    share = torch.tensor(cases, dtype=torch.float64) / sum(cases)

    def mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.tensordot(share, torch.stack([value.double() for value in values]), dims=1)

    whole: State = {}
    for name in (key for key in found[0] if key.endswith("running_mean")):
        means, variances = (
            [one[name.replace("running_mean", kind)] for one in found] for kind in ("running_mean", "running_var")
        )
        whole[name] = mean(means).float()
        # The variance of all is the mean of the sites' variances and the variance of their means.
        spread = mean([m.double().square() for m in means]) - mean(means).square()
        whole[name.replace("running_mean", "running_var")] = (mean(variances) + spread).float()
    return whole


def measured(weights: Mapping[str, torch.Tensor], site: Site) -> State:
    """The running statistics that weights have on an epoch of a site's training cases: the mean of its batches'."""
    site._load_state(weights)
    norms = [module for module in site.network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    data, augment = site.split("training"), site.task.augmentation(0)
    site.network.train()
    with torch.no_grad():
        for batch in shuffled_batches(len(data), site.settings.training, np.random.default_rng(0)):
            images = site._batch([augment(data[int(i)]) for i in batch])["image"]
            with site.precision.autocast():
                site.network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return {key: value.clone() for key, value in exchanged(site.network.state_dict()).items() if "running" in key}


def judged(states: Mapping[str, State], sites: Mapping[str, Site]) -> dict[str, float]:
    """The key metric on each site's test cases; NaN where they are too few."""
    key = next(iter(sites.values())).task.key_metric
    return {name: site.metrics(states[name], "test").get(key, math.nan) for name, site in sites.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=JOBS / "chest_xray_fedavg", help="(default: %(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="data root with <site>/<dataset>/manifest.json")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="changes")
    arguments = parser.parse_args()
    comparison = Comparison([arguments.job], arguments.data, [0], parse_changes(arguments.changes))

    def make(dataset: Dataset) -> Site:
        return Site(JobSettings(comparison.settings.to_dict()), dataset)

    sites = {name: make(dataset) for name, dataset in comparison.datasets.items()}
    everyone = list(sites.values())
    pooled = make(pool(comparison.datasets, comparison.data))
    models = {
        "pooled": best_model("pooled", [pooled], [pooled], comparison.rounds, comparison.steps),
        "federated": best_model("federated", everyone, everyone, comparison.rounds, None),
    }
    table = Table("model", "running statistics", *sites, "macro mean", title=f"test {pooled.task.key_metric}")
    for name, weights in models.items():
        own = {site: measured(weights, there) for site, there in sites.items()}
        shared = together(list(own.values()), [len(site.split("training")) for site in everyone])
        kinds: dict[str, dict[str, Any]] = {
            "of training": dict.fromkeys(sites, weights),
            "measured anew at all sites": dict.fromkeys(sites, weights | shared),
            "measured anew at the site": {site: weights | statistics for site, statistics in own.items()},
        }
        for kind, states in kinds.items():
            values = judged(states, sites)
            shown = [f"{value:.3f}" for value in (*values.values(), np.nanmean(list(values.values())))]
            table.add_row(name, kind, *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
