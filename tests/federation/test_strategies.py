"""Strategies over a real FLARE simulation give what the same rounds in one process give, and keep at home what is."""

import json

import pytest
import torch

from fedimaging.compare.analysis import ALONE
from fedimaging.compare.results import analyse_results
from fedimaging.datasets.site import resolve
from fedimaging.datasets.synthetic import synthesize
from fedimaging.federation.job import JobFolder
from fedimaging.simulator import simulate
from fedimaging.training.loop import Site
from fedimaging.training.rounds import run_rounds
from fedimaging.training.strategies import batch_norm_names
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.federation

SITES = ["hospital-a", "hospital-b"]
SMALL = {
    "rounds": 2, "task.image_size": 32, "network.name": "ResNet18", "training.max_batches": 2,
    "training.precision": "float32", "training.schedule": "constant",
}  # fmt: skip


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    synthesize(root, hospitals=2, cases=(70, 50), longer=64, seed=1)
    return root


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Sums over more threads differ in their last bits, and Adam's first steps make whole steps of that."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(strategy, hospitals, folder):
    """(workspace, the last global weights, the last round in one process, the sites there)"""
    job = JobFolder(REPOSITORY / "jobs" / f"chest_xray_{strategy}")
    outcome = simulate(job.path, hospitals, folder / strategy, changes=SMALL)
    assert not outcome.errors
    job.override(SMALL)
    settings = job.settings()
    local = folder / strategy / "local"
    sites = [Site(settings, resolve(settings.dataset, name, local)) for name in SITES]
    *_, last = run_rounds(sites, 2)
    saved = folder / strategy / "server/simulate_job/app_server/FL_global_model.pt"
    return folder / strategy, torch.load(saved, weights_only=True)["model"], last, sites


def records(workspace):
    lines = (workspace / "server/simulate_job/rounds.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == "round"]


def test_scaffold_over_flare_is_scaffold_in_one_process(hospitals, tmp_path):
    workspace, weights, last, sites = run("scaffold", hospitals, tmp_path)
    assert weights.keys() == last.weights.keys(), "no control variate is saved as a weight"
    assert all(torch.allclose(weights[name], value, atol=2e-4) for name, value in last.weights.items())
    moved = sum(float((value - last.arrived[name]).abs().sum()) for name, value in last.weights.items())
    assert moved > 1
    parameters = sum(p.numel() for p in sites[0].network.parameters())
    sent = 4 * (sum(value.numel() for value in last.weights.values()) + parameters)
    assert all(event["bytes_in"] == event["bytes_out"] == 2 * sent for event in records(workspace))


def test_fedbn_over_flare_keeps_normalisation_at_each_site(hospitals, tmp_path):
    workspace, weights, last, sites = run("fedbn", hospitals, tmp_path)
    assert all(torch.allclose(weights[name], value, atol=2e-4) for name, value in last.weights.items())
    own = batch_norm_names(sites[0].network)
    kept = {name: torch.load(workspace / name / "simulate_job/strategy.pt", weights_only=True) for name in SITES}
    for site, name in zip(sites, SITES, strict=True):
        assert kept[name]["memory"].keys() == own
        assert all(torch.allclose(kept[name]["memory"][key], site.local.memory[key], atol=2e-4) for key in own)
        assert (workspace / name / "simulate_job/strategy.pt").stat().st_mode & 0o777 == 0o600
    assert not all(torch.equal(kept[SITES[0]]["memory"][key], kept[SITES[1]]["memory"][key]) for key in own)
    results = json.loads((workspace / "server/simulate_job/cross_site_val/cross_val_results.json").read_text())
    judged = {figures["judged"] for models in results.values() for figures in models.values()}
    assert judged == {"personal"}, "cross-site evaluation says that each site was judged by a model of its own"


def test_alone_every_site_s_model_is_judged_everywhere_and_nothing_else_leaves(hospitals, tmp_path):
    workspace, weights, last, sites = run("alone", hospitals, tmp_path)
    assert all(event["bytes_in"] == 0 for event in records(workspace)), "no weights came back from training"
    assert all(torch.equal(weights[name], last.arrived[name]) for name in weights), (
        "the global model is the initial one"
    )
    results = json.loads((workspace / "server/simulate_job/cross_site_val/cross_val_results.json").read_text())
    assert {site: set(models) for site, models in results.items()} == {
        site: {"SRV_best", "SRV_last", *SITES} for site in SITES
    }
    for site, name in zip(sites, SITES, strict=True):
        kept = torch.load(workspace / name / "simulate_job/strategy.pt", weights_only=True)
        assert all(torch.allclose(kept["memory"][key], site.local.memory[key], atol=2e-4) for key in weights)
        own = results[name]
        assert own["SRV_best"]["judged"] == "personal"
        assert own["SRV_best"]["accuracy"] == own[name]["accuracy"], "its own model by either way"
    assert results[SITES[0]][SITES[1]]["judged"] == "global"
    table = analyse_results([workspace])
    assert list(table["rows"]) == [ALONE]
    assert {owner: set(row) for owner, row in table["others"].items()} == {site: set(SITES) for site in SITES}
