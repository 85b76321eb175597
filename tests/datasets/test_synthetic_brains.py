"""Synthetic brain MRI: valid NIfTI pairs, hospitals that differ, lesions that brightness alone does not find."""

from __future__ import annotations

import hashlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from fedimaging.cli import main
from fedimaging.datasets.manifest import SPLITS, Case, Manifest
from fedimaging.datasets.synthetic import synthesize, typical_brain_hospitals
from fedimaging.datasets.synthetic.brain_phantom import Grid, Scanner, Subject, flair
from fedimaging.datasets.synthetic.brains import BrainStudy, plan_brains
from fedimaging.datasets.synthetic.hospitals import Request
from fedimaging.datasets.volumes import read_label, read_volume
from fedimaging.errors import FedImagingError
from fedimaging.tasks import make_task

SITES = ["hospital-a", "hospital-b", "hospital-c"]
GRID = Grid((56, 68, 50), (3.0, 3.0, 3.0), np.array([[3, 0, 0, -82], [0, 3, 0, -100], [0, 0, 3, -74], [0, 0, 0, 1.0]]))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hospitals with 12 coarse volumes each."""
    folder = tmp_path_factory.mktemp("brains") / "data"
    synthesize(folder, task="segmentation", cases=12, longer=40, seed=1)
    return folder


def _manifest(root: Path, site: str) -> tuple[Path, Manifest]:
    folder = root / site / "brain_lesion"
    return folder, Manifest.read(folder / "manifest.json")


def _cases(manifest: Manifest) -> list[Case]:
    return [case for split in SPLITS for case in manifest.split(split)]


def _planned(cases: int) -> list[list[BrainStudy]]:
    request = Request("brain_lesion", 64, False, 0)
    plans = [plan_brains(hospital, site, cases, request) for site, hospital in enumerate(typical_brain_hospitals(3))]
    return [[item for item in plan.items if isinstance(item, BrainStudy)] for plan in plans]


@pytest.mark.parametrize("site", SITES)
def test_every_case_is_a_volume_with_the_mask_that_was_drawn_on_it(root: Path, site: str) -> None:
    folder, manifest = _manifest(root, site)
    manifest.check_files(folder)
    assert (manifest.task, manifest.classes, manifest.modality) == ("segmentation", ["lesion"], "MR")
    assert manifest.synthetic
    cases = _cases(manifest)
    assert len(cases) == 12
    assert all(case.sex and case.age_group and case.vendor for case in cases)
    with_lesions = 0
    for case in cases:
        volume = read_volume(folder / case.image)
        mask = read_label(folder / str(case.label), volume, 1, allow_empty=True)
        assert mask.shape == volume.array.shape
        assert volume.array.std() > 0
        with_lesions += bool(mask.any())
    assert with_lesions == manifest.made["cases_with"]["lesion"] == 12 - manifest.made["empty_masks"]
    assert 0 < with_lesions < 12


def test_hospitals_differ_in_field_strength_coil_contrast_resolution_and_lesion_load(root: Path) -> None:
    scanners = [hospital.scanner for hospital in typical_brain_hospitals(3)]
    assert {scanner.field for scanner in scanners} == {1.5, 3.0}
    for name in ("echo", "inversion", "bias", "noise", "scale"):
        assert len({getattr(scanner, name) for scanner in scanners}) == 3, name
    spacings, axes, levels = set(), set(), []
    for site in SITES:
        folder, manifest = _manifest(root, site)
        stored = [nib.load(folder / case.image) for case in _cases(manifest)]
        axes.add("".join(nib.aff2axcodes(stored[0].affine)))
        spacings.add(tuple(np.round(read_volume(folder / manifest.training[0].image).spacing, 1)))
        levels.append(np.median([np.percentile(image.get_fdata(), 90) for image in stored]))
    assert axes == {"RAS", "LPS", "PSR"}
    assert len(spacings) == 3
    assert max(levels) > 3 * min(levels), "intensities have units of their own at each hospital"
    loads = [np.mean([item.lesions for item in items]) for items in _planned(200)]
    assert loads[1] > 1.3 * loads[0] > 1.3 * loads[2]


def test_the_same_seed_makes_the_same_bytes(tmp_path: Path) -> None:
    def hashes(name: str, seed: int, workers: int) -> dict[str, str]:
        synthesize(tmp_path / name, task="segmentation", hospitals=1, cases=12, longer=32, seed=seed, workers=workers)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / name)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    one, two, other = hashes("one", 7, 1), hashes("two", 7, 2), hashes("other", 8, 1)
    assert len(one) == 1 + 2 * 12
    assert one == two
    volumes = {value for name, value in one.items() if "images/" in name}
    assert not volumes & set(other.values())


def _study(patient: int, study: int = 1, lesions: int = 0) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    return flair(GRID, Subject((5, patient), (5, patient, study), lesions=lesions), Scanner())


def test_lesions_change_nothing_else_and_are_brighter_than_what_they_replace() -> None:
    for patient in range(3):
        healthy, none = _study(patient)
        ill, mask = _study(patient, lesions=6)
        assert not none.any() and mask.any()
        far = np.ones_like(mask)
        places = np.argwhere(mask)
        low, high = places.min(0) - 3, places.max(0) + 4
        far[tuple(slice(max(0, a), b) for a, b in zip(low, high, strict=True))] = False
        assert np.array_equal(healthy[far], ill[far])
        assert (ill[mask] > healthy[mask]).mean() > 0.9
        assert np.median(ill[mask]) > 1.2 * np.median(healthy[mask])


def test_a_patient_keeps_anatomy_and_lesions() -> None:
    loads: dict[int, list[int]] = {}
    for item in _planned(60)[0]:
        loads.setdefault(item.patient, []).append(item.lesions)
    assert any(len(counts) > 1 for counts in loads.values())
    assert all(counts == sorted(counts) for counts in loads.values()), "a lesion does not go away"
    _, few = _study(0, lesions=2)
    _, more = _study(0, lesions=6)
    assert more[few].all() and more.sum() > few.sum()


def test_brightness_alone_does_not_find_lesions(root: Path) -> None:
    """The best threshold of all, chosen on the truth, is far from a segmentation."""
    for site in SITES:
        folder, manifest = _manifest(root, site)
        best = []
        for case in _cases(manifest):
            volume = read_volume(folder / case.image)
            mask = read_label(folder / str(case.label), volume, 1, allow_empty=True)[0] > 0
            if not mask.any():
                continue
            values = volume.array[0]
            thresholds = np.quantile(values[mask], np.linspace(0, 0.95, 20))
            best.append(max(2 * (mask & (values > t)).sum() / (mask.sum() + (values > t).sum()) for t in thresholds))
        assert np.mean(best) < 0.5, site


def test_the_job_s_task_takes_them(root: Path) -> None:
    task = make_task(
        {
            "name": "segmentation",
            "classes": ["lesion"],
            "spacing": [4.0] * 3,
            "patch_size": [16] * 3,
            "allow_empty": True,
        }
    )
    for site in SITES:
        folder, manifest = _manifest(root, site)
        task.check(manifest, site)
        item = task.load(folder, manifest.training[0])
        assert task.augmentation(0)(item)["image"].shape == (1, 16, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"multi_label": True}, "--multi-label: is for classification"),
        ({"longer": 512}, "matrix 512: give 32 to 256"),
        ({"cases": 3}, "cases 3,3,3: give each site 12 or more"),
        ({"task": "detection"}, "choose from classification, segmentation"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_made(
    tmp_path: Path, arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(FedImagingError, match=words) as caught:
        synthesize(tmp_path / "data", **{"task": "segmentation", **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_the_command_tells_how_many_cases_have_a_lesion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    words = ["--task", "segmentation", "--sites", "1", "--cases", "12", "--matrix", "32"]
    assert main(["data", "synth", "--out", str(tmp_path / "data"), *words]) == 0
    manifest = Manifest.read(tmp_path / "data/hospital-a/brain_lesion/manifest.json")
    assert manifest.made["cases_with"]["lesion"] < 12
    [row] = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines() if "26x32x23" in line]
    assert row[-2:] == [str(manifest.made["cases_with"]["lesion"]), "26x32x23"]
