"""Leave-one-hospital-out over real FLARE: the models are evaluated at the hospital, and nothing of it is trained on."""

import json
import os

import pytest
import torch

from fedimaging.compare.results import analyse_results
from fedimaging.errors import FedImagingError
from fedimaging.governance.ledger import PASSED, read_records, verify
from fedimaging.report import write_report
from fedimaging.simulator import Outcome, show_event, simulate
from tests.conftest import REPOSITORY, SITES

JOB = REPOSITORY / "jobs" / "chest_xray_leave_one_out"
SMALL = {
    "rounds": 2, "task.image_size": 32, "network.name": "ResNet18", "training.max_batches": 1,
    "training.precision": "float32",
}  # fmt: skip
TRAINED, LEFT_OUT = SITES[:2], SITES[2]


@pytest.fixture(scope="module")
def runs(hospitals, tmp_path_factory):
    """(the job as it is committed, but small; FedAvg where the third hospital does not exist)"""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "OMP_NUM_THREADS", "1")
        left_out = simulate(JOB, hospitals, folder / "left_out", changes=SMALL)
        fedavg = simulate(JOB.with_name("chest_xray_fedavg"), hospitals, folder / "two", changes=SMALL, sites=TRAINED)
    assert left_out.errors == fedavg.errors == []
    return folder / "left_out", folder / "two"


def server(workspace):
    return workspace / "server/simulate_job"


def weights(workspace, name):
    return torch.load(server(workspace) / "app_server" / name, weights_only=True)["model"]


@pytest.mark.federation
def test_the_models_are_those_of_a_federation_without_the_hospital(runs):
    for name in ("FL_global_model.pt", "best_FL_global_model.pt"):
        one, other = (weights(workspace, name) for workspace in runs)
        assert all(torch.allclose(one[key], value, rtol=0, atol=1e-6) for key, value in other.items())


@pytest.mark.federation
def test_the_hospital_is_in_no_round_and_in_the_evaluation(runs):
    lines = (server(runs[0]) / "rounds.jsonl").read_text().splitlines()
    start, *rounds, final, end = map(json.loads, lines)
    assert start["leave_out"] == LEFT_OUT
    assert [sorted(record["sites"]) for record in rounds] == [TRAINED, TRAINED]
    assert not any(record["missing"] or record["refused"] for record in rounds)
    assert sorted(final["metrics"]) == TRAINED, "it has no say in which model is the best"
    assert end["event"] == "end"
    results = json.loads((server(runs[0]) / "cross_site_val/cross_val_results.json").read_text())
    assert {site: set(models) for site, models in results.items()} == {site: {"SRV_best", "SRV_last"} for site in SITES}
    assert results[LEFT_OUT]["SRV_best"]["split"] == "test"


@pytest.mark.federation
def test_the_ledger_of_the_hospital_knows_of_evaluation_alone(runs):
    for site, kinds in ((LEFT_OUT, ["evaluate"] * 2), (TRAINED[0], ["train"] * 2 + ["evaluate"] * 3)):
        assert verify(runs[0] / site).faults == []
        records = read_records(runs[0] / site)
        assert [record["kind"] for record in records] == kinds
        assert {record["gate"] for record in records} == {PASSED}
    stages = {json.loads(line)["stage"] for line in (runs[0] / LEFT_OUT / "simulate_job/progress.jsonl").open()}
    assert stages <= {"loading", "evaluated"}


@pytest.mark.federation
def test_the_report_says_who_was_left_out(runs):
    page, data = write_report(runs[0])
    report = json.loads(data.read_text())
    assert report["job"]["leave_out"] == LEFT_OUT
    assert {row["sites"][LEFT_OUT]["status"] for row in report["participation"]} == {"left_out"}
    assert report["problems"] == []
    assert any(line.startswith(f"{LEFT_OUT} was left out of training") for line in report["headline"]["summary"])
    assert page.read_text().count("left out of training") >= 4


@pytest.mark.federation
def test_finished_jobs_make_a_table_with_the_hospital_judged_by_the_model_that_never_saw_it(runs):
    table = analyse_results(runs)
    assert {name: row["kind"] for name, row in table["rows"].items()} == {
        "chest_xray_fedavg": "federated", "chest_xray_leave_one_out": "left_out"
    }  # fmt: skip
    results = json.loads((server(runs[0]) / "cross_site_val/cross_val_results.json").read_text())
    shown = table["rows"]["chest_xray_leave_one_out"]["sites"]
    assert [shown[site] for site in TRAINED] == [None, None]
    assert shown[LEFT_OUT]["value"] == results[LEFT_OUT]["SRV_best"]["auroc"] is not None
    assert shown[LEFT_OUT]["ci"] == results[LEFT_OUT]["SRV_best"]["auroc_ci"]
    assert table["cautions"] == []


def test_what_is_shown_of_a_job_tells_who_is_left_out_and_why_it_ended(capsys):
    outcome = Outcome(SITES)
    show_event({"event": "start", "key_metric": "auroc", "leave_out": LEFT_OUT}, outcome)
    show_event({"event": "failed", "round": 0, "reason": "leave_out: no site hospital-z takes part"}, outcome)
    said = " ".join(capsys.readouterr().err.split())
    assert "training loss: hospital-a, hospital-b, hospital-c (left out)" in said
    assert said.endswith("0 the job ends: leave_out: no site hospital-z takes part")
    assert outcome.end is None


@pytest.mark.parametrize(
    ("changes", "sites", "told"),
    [
        ({"leave_out": "hospital-z"}, None, "leave_out: no site hospital-z takes part; name one of hospital-a"),
        ({}, TRAINED, "leave_out: no site hospital-c takes part; name one of hospital-a, hospital-b"),
        ({"min_clients": 3}, None, "2 sites to train at, and the job needs 3"),
        ({"required_sites": [LEFT_OUT]}, None, "required_sites names hospital-c, which leave_out keeps from training"),
    ],
)
def test_a_simulation_that_cannot_be_is_refused_before_it_starts(hospitals, tmp_path, changes, sites, told):
    with pytest.raises(FedImagingError, match=told):
        simulate(JOB, hospitals, tmp_path / "run", changes=changes, sites=sites)
    assert not (tmp_path / "run").exists()


def test_a_simulation_that_leaves_out_a_site_starts_from_no_model(hospitals, tmp_path):
    (tmp_path / "model.pt").touch()
    with pytest.raises(FedImagingError, match="--start-from: nobody can tell whether hospital-c"):
        simulate(JOB, hospitals, tmp_path / "run", start_from=tmp_path / "model.pt")
    assert not (tmp_path / "run").exists()
