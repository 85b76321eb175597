"""The loop, the cache and the settings over volumes: shapes differ from case to case, and the label is a file."""

import nibabel as nib
import numpy as np
import pytest
import torch

from fedimaging.datasets.manifest import Case, Manifest
from fedimaging.datasets.site import Dataset
from fedimaging.errors import FedImagingError, Reason
from fedimaging.training.cache import CaseCache, DiskCache
from fedimaging.training.loop import Site, case_results, exchanged
from fedimaging.training.settings import JobSettings


def settings(network="SegResNet", task=None, **training):
    return JobSettings(
        {
            "dataset": "boxes",
            "task": {
                "name": "segmentation",
                "classes": ["box"],
                "spacing": [1.0, 1.0, 1.0],
                "patch_size": [16, 16, 16],
                "augmentation": {"flip": ["left_right"]},
                **(task or {}),
            },
            "network": {"name": network},
            "training": {"batch_size": 4, "precision": "float32", **training},
        }
    )


@pytest.fixture
def boxes(tmp_path):
    """Bright boxes in noise; no two volumes of a split have one shape."""
    generator = np.random.default_rng(0)
    splits = {}
    for split, count in (("training", 12), ("validation", 6), ("test", 7)):
        splits[split] = []
        for i in range(count):
            mask = np.zeros((12 + i, 20 - i, 14), np.uint8)
            x, y, z = generator.integers(1, 3, 3)
            mask[x : x + 6, y : y + 6, z : z + 6] = 1
            name = f"{split}-{i}"
            image = generator.normal(0, 1, mask.shape) + 4.0 * mask
            for stem, values in ((name, image), (f"{name}-mask", mask)):
                nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4)), tmp_path / f"{stem}.nii.gz")
            splits[split].append(Case(image=f"{name}.nii.gz", label=f"{name}-mask.nii.gz", patient=name))
    manifest = Manifest(name="boxes", modality="MR", task="segmentation", classes=["box"], **splits)
    return Dataset("boxes", "hospital-a", tmp_path, tmp_path / "manifest.json", manifest, "the test")


def initial(site):
    return exchanged({key: value.clone() for key, value in site.network.state_dict().items()})


@pytest.mark.parametrize("network", ["SegResNet", "UNet", "DynUNet"])
def test_it_learns_to_segment_volumes_of_any_shape(boxes, network):
    site = Site(settings(network, epochs=10, learning_rate=0.005), boxes)
    state = initial(site)
    before = site.metrics(state)["mean_dice"]
    result = site.train(state, 0, 1)
    after = site.metrics(exchanged(result.state))["mean_dice"]
    assert after > max(0.6, before + 0.2)
    assert result.cases == 12


def test_evaluation_and_results_by_case(boxes):
    site = Site(settings(), boxes)
    state = initial(site)
    figures = site.evaluation(state)
    assert figures["cases"] == figures["per_class"]["box"]["cases"] == 7
    assert figures["classes"] == {}
    assert not any(name in str(figures) for case in boxes.manifest.test for name in (case.image, case.patient))
    rows = case_results(site, site.outcomes(state, "test"), "test")
    assert [row["image"] for row in rows] == [case.image for case in boxes.manifest.test]
    assert {"mean_dice", "dice box", "hd95 box"} <= set(rows[0])


def test_a_case_that_cannot_be_used_is_skipped_and_counted(boxes):
    path = boxes.root / "training-3-mask.nii.gz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FedImagingError, match="1 of 12 training images") as caught:
        Site(settings(), boxes).split("training")
    assert caught.value.reason is Reason.UNREADABLE_IMAGES
    site = Site(settings(max_unreadable=0.1), boxes)
    assert site.train(initial(site), 0, 1).cases == 11
    assert site.skipped() == 1


def test_outputs_that_are_not_finite_are_refused(boxes):
    site = Site(settings(), boxes)
    state = initial(site)
    state[next(iter(state))].fill_(float("nan"))
    with pytest.raises(FedImagingError, match="outputs are not finite") as caught:
        site.metrics(state)
    assert caught.value.reason is Reason.NOT_FINITE


def test_bfloat16_segments_nearly_the_same(boxes):
    larger = {"patch_size": [24, 24, 24]}
    sites = [Site(settings(task=larger, precision=precision), boxes) for precision in ("float32", "bfloat16")]
    losses = [site.train(initial(site), 0, 1).epoch_losses[0] for site in sites]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]


def test_a_changed_mask_is_not_taken_from_the_disk_cache(boxes, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    task = settings().task

    def first_label():
        cases = boxes.manifest.test[:1]
        return CaseCache(task, boxes.root, cases, memory_budget=0, disk=DiskCache(10**9))[0]["label"]

    before = first_label()
    assert torch.equal(before, first_label())
    path = boxes.root / "test-0-mask.nii.gz"
    turned = np.flip(nib.load(path).get_fdata(dtype=np.float32), 0)
    nib.save(nib.Nifti1Image(turned, np.eye(4)), path)
    assert torch.equal(first_label(), before.flip(1))


def test_a_file_that_is_gone_is_told_with_the_disk_cache_too(boxes, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (boxes.root / "test-0.nii.gz").unlink()
    cache = CaseCache(settings().task, boxes.root, boxes.manifest.test, memory_budget=0, disk=DiskCache(10**9))
    assert len(cache) == 6
    assert "test-0.nii.gz" in cache.unreadable[0]


@pytest.mark.parametrize(
    ("network", "task", "words"),
    [
        (
            "ResNet18",
            {},
            "network.name: ResNet18 gives no output for each voxel; choose one of DynUNet, SegResNet, UNet",
        ),
        ("SegResNet", {"patch_size": [16, 16, 20]}, "multiples of 8"),
        ("DynUNet", {"patch_size": [16, 16, 24]}, "multiples of 16"),
    ],
)
def test_a_network_that_does_not_fit_the_task_is_refused(network, task, words):
    with pytest.raises(FedImagingError, match=words) as caught:
        settings(network, task)
    assert caught.value.reason is Reason.BAD_SETTING


def test_a_network_of_voxels_is_refused_for_images():
    job = {
        "dataset": "x",
        "task": {"name": "classification", "classes": ["a", "b"]},
        "network": {"name": "UNet"},
    }
    with pytest.raises(FedImagingError, match="no output for each case; choose one of DenseNet121"):
        JobSettings(job)
