"""The table of finished jobs: made of what sites reported, and of nothing that cannot stand in one table."""

import io
import json
import re

import pytest
from rich.console import Console

from fedimaging.cli import main
from fedimaging.compare.command import results_table
from fedimaging.compare.page import render_results
from fedimaging.compare.results import analyse_results
from fedimaging.compare.runs import ALONE
from fedimaging.errors import FedImagingError
from tests.conftest import SITES

SKILL = {"hospital-a": 0.90, "hospital-b": 0.80, "hospital-c": 0.70}


def figures(auroc, cases=40, judged="global"):
    """What a site reports of a model, as far as a table needs it; the names are those of real reports."""
    return {
        "split": "test", "task": "classification", "cases": cases, "patients": cases, "min_cell": 5, "judged": judged,
        "classes": {"normal": cases // 2, "effusion": cases // 2}, "auroc": auroc,
        "auroc_ci": None if auroc is None else [round(auroc - 0.1, 3), round(auroc + 0.05, 3)],
    }  # fmt: skip


def lift(by, judged="global"):
    return {site: figures(round(skill + by, 3), judged=judged) for site, skill in SKILL.items()}


@pytest.fixture
def download(tmp_path):
    """Writes a job as `nvflare job download` leaves it: below its id, the server's run directory as ``workspace``."""

    def write(name, evaluations, *, strategy="fedavg", leave_out="", folder=None, training=None, **start):
        path = tmp_path / (folder or f"{name}{leave_out}")
        run = path / "0b5e3c1a" / "workspace"
        (run / "cross_site_val").mkdir(parents=True)
        begun = {
            "event": "start", "job": name, "rounds": 1, "seed": 0, "leave_out": leave_out, "key_metric": "auroc",
            "strategy": {"name": strategy}, "task": {"name": "classification", "classes": ["normal", "effusion"]},
            "network": {"name": "ResNet18"},
        }  # fmt: skip
        trained = {site: {"cases": 40, "metrics": {}} for site in SITES if site != leave_out}
        round_ = {"event": "round", "round": 0, "seconds": 1.0, "sites": trained, "refused": {}, "missing": []}
        final = {"event": "final", "metrics": {}, "key_metric": 0.8, "best": True}
        events = [begun | start, round_ | {"key_metric": 0.7, "best": True}, final, {"event": "end", "best_round": 1}]
        (run / "rounds.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        by_site = {site: {} for site in SITES}
        for model, found in evaluations.items():
            for site, evaluation in found.items():
                by_site[site][model] = evaluation
        (run / "cross_site_val/cross_val_results.json").write_text(json.dumps(by_site))
        executor = {"args": {"training": {"epochs": 1, "batch_size": 16} | (training or {})}}
        (run / "app_server/config").mkdir(parents=True)
        (run / "app_server/config/config_fed_client.json").write_text(
            json.dumps({"executors": [{"executor": executor}]})
        )
        return path

    return write


@pytest.fixture
def jobs(download):
    """The four kinds: FedAvg, two leave-one-hospital-out, training alone with every hospital's own model."""
    own = {site: lift(-0.2) | {site: figures(SKILL[site] - 0.05)} for site in SITES}
    return [
        download("chest_xray_fedavg", {"SRV_best": lift(0.04), "SRV_last": lift(-0.3)}),
        download("leave_one_out", {"SRV_best": lift(-0.1)}, leave_out="hospital-c"),
        download("leave_one_out", {"SRV_best": lift(-0.15)}, leave_out="hospital-a"),
        download("chest_xray_alone", {"SRV_best": lift(-0.05, judged="personal")} | own, strategy="alone"),
    ]


def test_each_job_is_a_row_of_its_best_model_with_the_sites_own_intervals(jobs):
    table = analyse_results(jobs)
    assert list(table["rows"]) == [ALONE, "chest_xray_fedavg", "leave_one_out"]
    federated = table["rows"]["chest_xray_fedavg"]
    assert {site: cell["value"] for site, cell in federated["sites"].items()} == {
        "hospital-a": 0.94, "hospital-b": 0.84, "hospital-c": 0.74
    }  # fmt: skip
    assert federated["sites"]["hospital-b"]["ci"] == [0.74, 0.89]
    assert federated["macro"]["value"] == pytest.approx(0.84)
    low, high = federated["macro"]["ci"]
    assert 0.74 < low < 0.84 < high < 0.89, "three hospitals tell more than one"
    assert table["cautions"] == []
    assert set(federated) == {"kind", "personal", "sites", "macro"}, "no p-value: that would need results of cases"


def test_of_jobs_that_leave_a_site_out_only_that_site_s_figure_counts(jobs):
    row = analyse_results(jobs)["rows"]["leave_one_out"]
    assert row["kind"] == "left_out"
    assert row["sites"]["hospital-a"]["value"] == 0.75
    assert row["sites"]["hospital-c"]["value"] == 0.6
    assert row["sites"]["hospital-b"] is None, "nobody trained without it"
    assert row["macro"] is None, "a mean over other hospitals than the other rows' would mislead"


def test_every_hospital_s_own_model_is_shown_on_every_hospital(jobs):
    others = analyse_results(jobs)["others"]
    assert list(others) == SITES
    assert others["hospital-a"]["hospital-a"]["value"] == pytest.approx(0.85)
    assert others["hospital-a"]["hospital-b"]["value"] == pytest.approx(0.6)


def test_a_figure_that_a_site_withheld_is_left_out_of_every_mean(jobs, download):
    jobs[0] = download("fedprox", {"SRV_best": lift(0.04) | {"hospital-c": figures(None, cases=4)}})
    table = analyse_results(jobs)
    assert table["rows"]["fedprox"]["sites"]["hospital-c"]["absent"] == "too few cases"
    assert "too few cases" in render_results(table | {"command": "x"})
    assert table["judged"] == ["hospital-a", "hospital-b"]
    assert table["rows"][ALONE]["macro"]["value"] == pytest.approx(0.8)


def test_what_differs_besides_the_strategy_is_told(jobs, download):
    changed = lift(0.0) | {"hospital-b": figures(0.8, cases=30)}
    jobs[1] = download(
        "fedprox", {"SRV_best": changed}, network={"name": "DenseNet121"}, training={"batch_size": 8}, rounds=3
    )
    cautions = analyse_results(jobs[:2])["cautions"]
    assert cautions == [
        "fedprox: The job ended after 1 of 3 rounds.",
        "fedprox and chest_xray_fedavg differ in network, rounds, training.batch_size: the table compares that too.",
        "The test cases of hospital-b changed between the jobs: it judged chest_xray_fedavg on 40, fedprox on 30.",
    ]


def test_a_setting_that_one_job_has_and_the_other_leaves_at_its_default_is_told_in_both_orders(jobs, download):
    one_batch = download("one_batch", {"SRV_best": lift(0.0)}, strategy="fedprox", training={
        "max_batches": 1, "strategy": {"name": "fedprox"}
    })  # fmt: skip
    for pair in ([jobs[0], one_batch], [one_batch, jobs[0]]):
        (caution,) = analyse_results(pair)["cautions"]
        assert "differ in training.max_batches: the table" in caution
    written_out = download(
        "written_out", {"SRV_best": lift(0.0)}, training={"max_batches": None, "schedule": "one_cycle"}
    )
    assert analyse_results([jobs[0], written_out])["cautions"] == []


def test_a_job_that_started_from_a_model_is_told(jobs, download):
    started = download("spring", {"SRV_best": lift(0.0)}, start_from="spring.pt")
    (caution,) = analyse_results([jobs[0], started])["cautions"]
    assert "differ in start_from: the table" in caution


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"key_metric": "accuracy"}, "another key metric than in"),
        ({"name": ALONE}, "alone is the row of the hospitals' own models; give the job another name"),
        ({"task": {"name": "classification", "classes": ["normal", "pneumonia"]}}, "another task than in"),
        ({"name": "chest_xray_fedavg", "folder": "again"}, "2 jobs chest_xray_fedavg; give one of each"),
        ({"name": "chest_xray_fedavg", "leave_out": "hospital-b"}, "with and without a site left out"),
    ],
)
def test_what_cannot_stand_in_one_table_is_refused(jobs, download, other, told):
    more = download(other.pop("name", "fedprox"), {"SRV_best": lift(0.0)}, **other)
    with pytest.raises(FedImagingError, match=told):
        analyse_results([jobs[0], more])


def test_a_job_without_an_evaluation_is_refused(jobs, download):
    with pytest.raises(FedImagingError, match="no site reported on the best model"):
        analyse_results([jobs[0], download("fedprox", {})])


def test_the_command_prints_the_table_and_writes_the_page(jobs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", "--results", *map(str, jobs), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "0.940" in said
    assert "0.840–0.990" in said
    page = (out / "report.html").read_text()
    assert "<script" not in page
    table = page[page.index("<tbody>") : page.index("</tbody>")]
    rows = [re.sub("<[^>]*>", " ", cell).split("  ") for cell in re.findall('<th scope="row">(.*?)</th>', table)]
    assert [[words.strip() for words in row if words.strip()] for row in rows] == [
        ["each hospital’s own model"],
        ["chest_xray_fedavg"],
        ["leave_one_out", "each hospital by a model that was trained without it"],
    ]
    assert all(f'<tr><th scope="row">{site}</th><td>' in page for site in SITES), "each hospital's own model at others"
    written = json.loads((out / "report.json").read_text())
    assert [source["job"] for source in written["sources"]] == [
        "chest_xray_fedavg", "leave_one_out without hospital-c", "leave_one_out without hospital-a", "chest_xray_alone"
    ]  # fmt: skip


@pytest.mark.parametrize(("width", "hospitals_shown"), [(100, True), (80, True), (60, False), (40, False)])
def test_a_narrow_terminal_shows_what_fits_and_nothing_cut_off(jobs, width, hospitals_shown):
    terminal = Console(width=width, record=True, file=io.StringIO())
    terminal.print(results_table(analyse_results(jobs), width))
    text = terminal.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert "macro mean" in text
    assert all((site in text) is hospitals_shown for site in SITES)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--results", "nowhere"], "no rounds.jsonl in nowhere"),
        (["--results", "nowhere", "--data", "data/demo"], "leave out JOB, --data"),
        (["--results", "nowhere", "--no-pooled"], "leave out JOB, --data"),
        (["--results", "nowhere", "--leave-one-out"], "leave out JOB, --data"),
        (["jobs/chest_xray_fedavg"], "name job folders and --data"),
        ([], "name job folders and --data"),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path, capsys, arguments, told):
    assert main(["compare", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
