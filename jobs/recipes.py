"""Writes every job folder of this directory from one description each: `python jobs/recipes.py`.

A folder is what a job is made of (meta.json and app/config/*.json, no Python); change a recipe here and write them
all again. A test holds the committed folders equal to what this file writes.
"""

import sys
from pathlib import Path
from typing import Any

from nvflare.job_config.api import FedJob

from fedimaging.federation.evaluation import CrossSiteEvaluation
from fedimaging.federation.executor import TrainerExecutor
from fedimaging.federation.persistor import NetworkPersistor
from fedimaging.federation.protocol import PERSISTOR_ID
from fedimaging.federation.settings_table import settings_table
from fedimaging.federation.workflow import FederatedAveraging
from fedimaging.training.strategies import DEFAULT_STRATEGY
from fedimaging.version import needed_by_jobs

CHEST_XRAY: dict[str, Any] = {
    "dataset": "chest_xray",
    "task": {
        "name": "classification",
        "classes": ["normal", "consolidation", "effusion"],
        "image_size": 64,
    },
    "network": {"name": "DenseNet121", "norm": "batch"},
    "training": {"epochs": 1, "batch_size": 16, "optimizer": "adamw", "learning_rate": 0.001, "schedule": "one_cycle"},
    "seed": 0,
}
# Colour images of any ten classes, given to each site as a folder per class: name them in task.classes.
RGB: dict[str, Any] = {
    "dataset": "photographs",
    "task": {
        "name": "classification",
        "classes": [
            "crescent", "cross", "disc", "dots", "hexagon", "ring", "square", "star", "stripes", "triangle",
        ],
        "image_size": 224,
        "channels": 3,
        "key_metric": "accuracy",
        "class_weighting": "none",
        "augmentation": {"rotate_degrees": 15.0, "contrast": 0.2},
    },
    "network": {"name": "MobileNetV2", "norm": "batch"},
    "training": {"epochs": 2, "batch_size": 16, "optimizer": "adam", "learning_rate": 0.001, "schedule": "one_cycle"},
    "seed": 0,
}  # fmt: skip
HIPPOCAMPUS: dict[str, Any] = {
    "dataset": "hippocampus",
    "task": {
        "name": "segmentation",
        "classes": ["Anterior", "Posterior"],
        "spacing": [1.0, 1.0, 1.0],
        "patch_size": [40, 56, 40],
        "augmentation": {"flip": ["left_right"], "noise": 0.05, "contrast": 0.1},
    },
    "network": {"name": "SegResNet", "norm": "batch", "init_filters": 16},
    "training": {"epochs": 2, "batch_size": 2, "optimizer": "adamw", "learning_rate": 0.002, "schedule": "one_cycle"},
    "seed": 0,
}
BRAIN_LESION: dict[str, Any] = {
    "dataset": "brain_lesion",
    "task": {
        "name": "segmentation",
        "classes": ["lesion"],
        "spacing": [3.0, 3.0, 3.0],
        "patch_size": [48, 48, 48],
        "augmentation": {"flip": ["left_right"]},
        "allow_empty": True,
    },
    "network": {"name": "SegResNet", "norm": "batch", "init_filters": 16},
    "training": {"epochs": 2, "batch_size": 2, "optimizer": "adamw", "learning_rate": 0.002, "schedule": "one_cycle"},
    "seed": 0,
}
# Whom leave-one-hospital-out leaves out, unless `simulate --set leave_out=...` says another.
LEFT_OUT = "hospital-c"
# What differs from the base in the job of each strategy. SCAFFOLD is defined for plain SGD.
STRATEGIES: dict[str, dict[str, Any]] = {
    "fedprox": {"strategy": {"name": "fedprox", "mu": 0.01}},
    "scaffold": {"strategy": {"name": "scaffold"}, "optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.1},
    "fedavgm": {"strategy": {"name": "fedopt", "optimizer": "sgd", "learning_rate": 1.0, "momentum": 0.5}},
    "fedadam": {"strategy": {"name": "fedopt", "optimizer": "adam", "learning_rate": 0.01}},
    "fedbn": {"strategy": {"name": "fedbn"}},
    "ditto": {"strategy": {"name": "ditto", "mu": 0.1}},
}


def overlay(settings: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """The settings with some of their training changed."""
    return settings | {"training": settings["training"] | training}


def federated(
    name: str,
    settings: dict[str, Any],
    *,
    rounds: int,
    min_clients: int,
    site_models: bool = False,
    leave_out: str = "",
) -> FedJob:
    """A strategy over all sites (FedAvg where none is named), then the best and the last model on every test split.

    Args:
        min_clients: sites that must contribute to a round.
        site_models: evaluate each site's own model at every site too.
        leave_out: a site that the models are evaluated at and not trained at.
    """
    strategy = settings["training"].get("strategy", DEFAULT_STRATEGY)
    # FLARE starts a job at so many sites, and the one that is left out must be among them.
    job = FedJob(name=name, min_clients=min_clients + bool(leave_out))
    job.job.set_app_packages(["fedimaging"])
    job.to_server(
        FederatedAveraging(
            num_rounds=rounds,
            min_clients=min_clients,
            fedimaging=needed_by_jobs(),
            strategy=strategy,
            leave_out=leave_out,
        )
    )
    job.to_server(CrossSiteEvaluation(site_models=site_models))
    # Sites ask for their next task five times a second; FLARE asks every two seconds, which idles in every round.
    job.to_server({"server": {"task_request_interval": 0.2}})
    job.to_server(
        NetworkPersistor(task=settings["task"], network=settings["network"], seed=settings["seed"]), id=PERSISTOR_ID
    )
    job.to_clients(TrainerExecutor(**settings, fedimaging=needed_by_jobs()))
    return job


def recipes() -> list[FedJob]:
    """Every job of this folder."""
    return [
        federated("chest_xray_fedavg", CHEST_XRAY, rounds=12, min_clients=2),
        federated("rgb_fedavg", RGB, rounds=20, min_clients=2),
        federated("hippocampus_fedavg", HIPPOCAMPUS, rounds=24, min_clients=2),
        federated("brain_lesion_fedavg", BRAIN_LESION, rounds=10, min_clients=2),
        *(
            federated(f"chest_xray_{name}", overlay(CHEST_XRAY, training), rounds=12, min_clients=2)
            for name, training in STRATEGIES.items()
        ),
        federated(
            "chest_xray_alone",
            overlay(CHEST_XRAY, {"strategy": {"name": "alone", "give_model": True}}),
            rounds=12,
            min_clients=2,
            site_models=True,
        ),
        federated("chest_xray_leave_one_out", CHEST_XRAY, rounds=12, min_clients=2, leave_out=LEFT_OUT),
    ]


def write(folder: Path) -> None:
    """Writes (or writes anew) every job folder below ``folder``."""
    for job in recipes():
        job.export_job(str(folder))


def write_settings(readme: Path) -> None:
    """Writes the list of all settings between the marks of jobs/README.md."""
    before, mark, rest = readme.read_text().partition("<!-- settings -->\n")
    readme.write_text(f"{before}{mark}{settings_table()}{rest[rest.index('<!-- /settings -->') :]}")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
    write_settings(Path(__file__).with_name("README.md"))
