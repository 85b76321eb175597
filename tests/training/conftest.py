"""A toy dataset that a small network learns in seconds: a bright disc somewhere, or none."""

import numpy as np
import pytest
from PIL import Image

from fedimaging.datasets.manifest import Case, Manifest
from fedimaging.datasets.site import Dataset
from fedimaging.training.settings import JobSettings


def draw(generator, disc):
    image = generator.normal(100, 20, (36, 40))
    if disc:
        y, x = generator.integers(8, 28, 2)
        rows, columns = np.ogrid[:36, :40]
        image[(rows - y) ** 2 + (columns - x) ** 2 < 36] += 120
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def make_toy(folder, site="hospital-a", training=64, validation=24, test=24):
    generator = np.random.default_rng(sum(site.encode()))
    splits = {}
    for split, count in (("training", training), ("validation", validation), ("test", test)):
        cases = []
        for i in range(count):
            name = f"{split}-{i}.png"
            draw(generator, disc=i % 2).save(folder / name)
            label = ("plain", "disc")[i % 2]
            cases.append(Case(image=name, label=label, patient=f"{split}-{i}", sex="FM"[i // 2 % 2]))
        splits[split] = cases
    manifest = Manifest(name="toy", modality="OT", task="classification", classes=["plain", "disc"], **splits)
    manifest.write(folder / "manifest.json")
    return Dataset("toy", site, folder, folder / "manifest.json", manifest, "the test")


@pytest.fixture
def toy(tmp_path):
    return make_toy(tmp_path)


@pytest.fixture
def job():
    """Makes JobSettings of the toy task, with changes by group."""

    def make(network="ResNet18", norm="group", seed=0, task=None, **training):
        return JobSettings(
            {
                "dataset": "toy",
                "task": {"name": "classification", "classes": ["plain", "disc"], "image_size": 32, **(task or {})},
                "network": {"name": network, "norm": norm},
                "training": {"precision": "float32", **training},
                "seed": seed,
            }
        )

    return make
