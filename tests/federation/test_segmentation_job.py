"""A real FLARE simulation of the committed brain lesion job, with smaller patches, on volumes quick to learn."""

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fedimaging.cli import main
from fedimaging.datasets.manifest import SPLITS, Case, Manifest

pytestmark = pytest.mark.federation

JOB = Path(__file__).parents[2] / "jobs" / "brain_lesion_fedavg"
SITES = ["hospital-a", "hospital-b"]
CHANGES = {
    "rounds": "4",
    "task.spacing": "[1,1,1]",
    "task.patch_size": "[16,16,16]",
    "network.init_filters": "8",
    "training.epochs": "4",
    "training.learning_rate": "0.005",
}


def write_hospital(folder, seed):
    """Bright boxes in noise, of another brightness and voxel order at each hospital; two volumes hold none."""
    generator = np.random.default_rng(seed)
    axes = np.diag([-1.0 if seed else 1.0, 1.0, 1.0, 1.0])
    splits = {}
    for split, count in (("training", 16), ("validation", 6), ("test", 8)):
        splits[split] = []
        for i in range(count):
            mask = np.zeros((20, 18 + i % 3, 16), np.uint8)
            x, y, z = generator.integers(1, 9, 3)
            mask[x : x + 6, y : y + 6, z : z + 6] = not (split == "training" and i < 2)
            image = (seed + 1) * (100 + 10 * generator.normal(0, 1, mask.shape) + 40.0 * mask)
            name = f"SECRET-{split}-{i}"
            folder.mkdir(parents=True, exist_ok=True)
            for stem, values in ((name, image), (f"{name}-mask", mask)):
                nib.save(nib.Nifti1Image(values.astype(np.float32), axes), folder / f"{stem}.nii.gz")
            splits[split].append(Case(image=f"{name}.nii.gz", label=f"{name}-mask.nii.gz", patient=f"PID-{split}-{i}"))
    header = {"name": "brain_lesion", "modality": "MR", "task": "segmentation", "classes": ["lesion"]}
    Manifest(**header, made={"synthetic": True}, **splits).write(folder / "manifest.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workspace and the data of a finished simulation."""
    data, workspace = tmp_path_factory.mktemp("brains") / "data", tmp_path_factory.mktemp("runs") / "brain"
    for seed, site in enumerate(SITES):
        write_hospital(data / site / "brain_lesion", seed)
    changes = [word for name, value in CHANGES.items() for word in ("--set", f"{name}={value}")]
    command = ["simulate", JOB, "--data", data, "--workspace", workspace, *changes]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FEDIMAGING_DATA", raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        assert main([str(word) for word in command]) == 0
    return workspace, data


def read(workspace, name):
    return json.loads((workspace / "server/simulate_job" / name).read_text())


def test_the_global_model_learns_to_segment(run):
    rounds = [json.loads(line) for line in (run[0] / "server/simulate_job/rounds.jsonl").read_text().splitlines()]
    judged = [record["key_metric"] for record in rounds if "key_metric" in record and record["event"] != "start"]
    assert max(judged) > 0.6 > judged[0]
    results = read(run[0], "cross_site_val/cross_val_results.json")
    assert sum(results[site]["SRV_best"]["mean_dice"] for site in SITES) / 2 > 0.6


def test_sites_tell_dice_and_hd95_of_structures_and_of_no_case(run):
    results = read(run[0], "cross_site_val/cross_val_results.json")
    assert set(results) == set(SITES)
    for site in SITES:
        figures = results[site]["SRV_best"]
        lesion = figures["per_class"]["lesion"]
        for name in ("dice", "hd95"):
            low, middle, high = lesion[f"{name}_quantiles"]
            assert low <= middle <= high
            assert lesion[f"{name}_ci"][0] <= lesion[name] <= lesion[f"{name}_ci"][1]
        assert figures["cases"] == len(Manifest.read(run[1] / site / "brain_lesion/manifest.json").test)


def test_nothing_that_names_a_case_is_in_the_server_s_workspace(run):
    workspace, data = run
    secrets = set()
    for site in SITES:
        manifest = Manifest.read(data / site / "brain_lesion/manifest.json")
        for case in (case for split in SPLITS for case in manifest.split(split)):
            secrets |= {case.image, str(case.label), case.patient}
    pattern = re.compile("|".join(map(re.escape, sorted(secrets))).encode())
    files = [path for path in (workspace / "server").rglob("*") if path.is_file()]
    assert any(path.name == "rounds.jsonl" for path in files)
    for path in files:
        assert not pattern.search(path.read_bytes()), path


def test_the_report_has_quartiles_and_slices_with_both_contours(run):
    page = (run[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * 3
    assert "Spread over the cases" in page and "HD95 (mm)" in page
    evaluated = json.loads((run[0] / "report.json").read_text())["cross_site"]["best"]
    assert {len(evaluated[site]["per_class"]["lesion"]["quartiles"]["hd95"]) for site in SITES} == {3}


def test_a_site_s_own_report_has_each_of_its_cases(run):
    workspace, data = run
    assert main(["report", str(workspace), "--site", "hospital-a"]) == 0
    page = (workspace / "report-hospital-a.html").read_text()
    assert all(case.image in page for case in Manifest.read(data / "hospital-a/brain_lesion/manifest.json").test)
