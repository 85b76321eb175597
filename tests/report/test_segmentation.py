"""The report of a segmentation: spread over the cases, the site's own cases, and slices of synthetic volumes alone."""

import base64
import json
import re
from io import BytesIO

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from fedimaging.networks import build_network, network_settings
from fedimaging.report import write_report
from fedimaging.report.examples import CONTOURS
from fedimaging.report.slices import _picture

SITES = ("hospital-a", "hospital-b")
JOB = {
    "dataset": "brain",
    "task": {
        "name": "segmentation",
        "classes": ["lesion"],
        "spacing": [1.0, 1.0, 1.0],
        "patch_size": [16, 16, 16],
        "allow_empty": True,
    },
    "network": {"name": "SegResNet", "init_filters": 8},
    "seed": 0,
}
EVALUATION = {
    "split": "test",
    "task": "segmentation",
    "cases": 12,
    "min_cell": 5,
    "mean_dice": 0.81,
    "mean_dice_ci": [0.74, 0.86],
    "per_class": {
        "lesion": {
            "cases": 12,
            "dice": 0.81,
            "dice_ci": [0.74, 0.86],
            "dice_quantiles": [0.752, 0.823, 0.874],
            "hd95": 12.5,
            "hd95_ci": [10.0, 15.0],
            "hd95_quantiles": [8.1, 11.2, 16.3],
        }
    },
}
CASES = [
    {"image": "SECRET_1.nii.gz", "patient": "PID-1", "mean_dice": 0.9, "dice lesion": 0.9, "hd95 lesion": 2.0},
    {"image": "SECRET_2.nii.gz", "patient": "PID-2", "mean_dice": 0.4, "dice lesion": 0.4, "hd95 lesion": 9.0},
    {"image": "SECRET_3.nii.gz", "patient": "PID-3", "mean_dice": None, "dice lesion": None, "hd95 lesion": None},
]


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_hospital(folder, synthetic=True, empty_first=False):
    """One case a split: a bright box in a volume that is wider than it is high."""
    splits = {}
    for split in ("training", "validation", "test"):
        splits[split] = []
        for i in range(2):
            mask = np.zeros((24, 20, 12), np.uint8)
            mask[4:10, 6:14, 3:9] = not (empty_first and i == 0)
            name = f"{split}{i}"
            folder.mkdir(parents=True, exist_ok=True)
            for stem, values in ((name, mask * 100.0 + np.arange(24)[:, None, None]), (f"{name}_mask", mask)):
                nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4)), folder / f"{stem}.nii.gz")
            splits[split].append({"image": f"{name}.nii.gz", "label": f"{name}_mask.nii.gz", "patient": name})
    header = {"name": "brain", "modality": "MR", "task": "segmentation", "classes": ["lesion"]}
    write_json(folder / "manifest.json", {**header, "made": {"synthetic": synthetic}, **splits})


@pytest.fixture
def workspace(tmp_path):
    """A simulation of two hospitals, whose model finds nothing."""
    run = tmp_path / "run" / "server" / "simulate_job"
    sites = {site: {"cases": 9, "loss": 0.5, "metrics": {"mean_dice": 0.5, "cases": 5}, "votes": 5} for site in SITES}
    events = [
        {"event": "start", "job": "brain_fedavg", "rounds": 1, "key_metric": "mean_dice"},
        {"event": "round", "round": 0, "seconds": 1.0, "sites": sites, "refused": {}, "missing": [], "key_metric": 0.5},
        {"event": "end", "best_round": 1, "best_key_metric": 0.8, "seconds": 2.0},
    ]
    run.mkdir(parents=True)
    (run / "rounds.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    write_json(run / "cross_site_val" / "cross_val_results.json", {site: {"SRV_best": EVALUATION} for site in SITES})
    write_json(run / "app_server/config/config_fed_client.json", {"executors": [{"executor": {"args": JOB}}]})
    network = build_network(network_settings(JOB["network"]), spatial_dims=3, in_channels=1, out_channels=2, seed=0)
    zeros = {key: torch.zeros_like(value) for key, value in network.state_dict().items()}
    torch.save({"model": zeros}, run / "app_server" / "best_FL_global_model.pt")
    write_json(tmp_path / "run" / "simulate.json", {"data": str(tmp_path / "data"), "sites": list(SITES), "ok": True})
    own = {"site": SITES[0], "dataset": "brain", "models": {"SRV_best": {"eval": EVALUATION, "cases": CASES}}}
    write_json(tmp_path / "run" / SITES[0] / "simulate_job" / "site_report.json", own)
    return tmp_path / "run"


def pictures(page):
    return [Image.open(BytesIO(base64.b64decode(data))) for data in re.findall(r"data:image/png;base64,([^\"]+)", page)]


def test_quartiles_are_beside_means_and_intervals(workspace):
    html, data = write_report(workspace)
    page = html.read_text()
    lesion = json.loads(data.read_text())["cross_site"]["best"]["hospital-a"]["per_class"]["lesion"]
    assert lesion["quartiles"] == {"dice": [0.752, 0.823, 0.874], "hd95": [8.1, 11.2, 16.3]}
    assert set(lesion["metrics"]) == {"dice", "hd95"}
    assert "0.823" in page and "0.752–0.874" in page
    assert "HD95 (mm)" in page
    assert "SECRET" not in page + data.read_text()


def test_the_site_s_own_report_has_its_cases_the_worst_first(workspace):
    html, _ = write_report(workspace, site="hospital-a")
    page = html.read_text()
    assert page.index("SECRET_2") < page.index("SECRET_1") < page.index("SECRET_3")
    assert "1 − mean Dice" in page
    assert "distance from label" not in page


def drawn(picture, name):
    """Where the contour is."""
    colour = [int(CONTOURS[name][i : i + 2], 16) for i in (1, 3, 5)]
    return (np.asarray(picture) == colour).all(-1)


def test_what_is_predicted_is_drawn_beside_the_mask():
    masks = {name: np.zeros((20, 20, 20), np.uint8) for name in CONTOURS}
    masks["mask"][4:8, 4:8, 9], masks["predicted"][12:16, 12:16, 9] = 1, 1
    picture = _picture(np.random.default_rng(0).random((20, 20, 20), np.float32), masks, 2, [1.0, 1.0, 1.0])
    found = [np.nonzero(drawn(picture, name)) for name in ("mask", "predicted")]
    assert found[0][1].min() > found[1][1].max(), "right in the patient is left in the picture"
    assert found[0][0].min() > found[1][0].max(), "the front is on top"


def test_slices_of_a_synthetic_volume_lie_where_the_mask_is(workspace, tmp_path):
    for site in SITES:
        write_hospital(tmp_path / "data" / site / "brain", empty_first=site == "hospital-b")
    html, _ = write_report(workspace)
    page = html.read_text()
    found = pictures(page)
    assert len(found) == 6
    assert [picture.size for picture in found[:3]] == [(336, 280), (336, 168), (336, 202)]
    rows, columns = np.nonzero(drawn(found[0], "mask"))
    assert columns.min() == 336 * 14 / 24 and columns.max() == 336 * 20 / 24 - 1, "the patient's left is on the right"
    assert rows.min() == 280 * 6 / 20 and rows.max() == 280 * 14 / 20 - 1
    assert not drawn(found[0], "predicted").any()
    assert all(plane in page for plane in ("axial", "coronal", "sagittal", "predicted"))


def test_no_slice_of_real_data(workspace, tmp_path):
    for site in SITES:
        write_hospital(tmp_path / "data" / site / "brain", synthetic=False)
    html, _ = write_report(workspace)
    assert "data:image" not in html.read_text()


@pytest.mark.parametrize("what", ["model", "volume", "settings"])
def test_what_is_broken_leaves_the_slices_out_and_not_the_report(workspace, tmp_path, what):
    for site in SITES:
        write_hospital(tmp_path / "data" / site / "brain")
    run = workspace / "server" / "simulate_job" / "app_server"
    if what == "model":
        (run / "best_FL_global_model.pt").write_bytes(b"nothing")
    elif what == "volume":
        for site in SITES:
            (tmp_path / "data" / site / "brain" / "test0.nii.gz").write_bytes(b"nothing")
    else:
        write_json(
            run / "config" / "config_fed_client.json", {"executors": [{"executor": {"args": {"dataset": "brain"}}}]}
        )
    html, _ = write_report(workspace)
    assert "data:image" not in html.read_text()
    assert "0.823" in html.read_text()
