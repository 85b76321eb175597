"""The comparison: what may be compared, what a run leaves, and one whole command over the simulator."""

import copy
import io
import json
import math
import multiprocessing
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from fedimaging.cli import main
from fedimaging.compare import paired
from fedimaging.compare.analysis import _Analysis, analyse
from fedimaging.compare.command import table
from fedimaging.compare.page import render
from fedimaging.compare.runs import ALONE, LEFT_OUT, POOLED, Comparison, Result, Runner, pool
from fedimaging.compare.workers import train_side_by_side
from fedimaging.datasets.synthetic import synthesize
from fedimaging.errors import FedImagingError
from fedimaging.training.loop import Site
from tests.conftest import REPOSITORY

FEDAVG, FEDBN = (REPOSITORY / "jobs" / f"chest_xray_{name}" for name in ("fedavg", "fedbn"))
SMALL = {
    "rounds": 2, "task.image_size": 32, "network.name": "ResNet18", "training.max_batches": 2,
    "training.precision": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    synthesize(root, hospitals=2, cases=(110, 90), longer=64, seed=2)
    return root


@pytest.fixture
def comparison(hospitals):
    return Comparison([FEDAVG, FEDBN], hospitals, [0, 1], SMALL)


def made_up(comparison, skill, missing=()):
    """Results as if models had been trained; ``skill`` is how well a run's model tells the classes apart."""
    results = []
    for at, run in enumerate(comparison.runs):
        cases = {}
        for site, dataset in comparison.datasets.items():
            cases[site] = []
            for case in dataset.manifest.test:
                rng = np.random.default_rng([*case.image.encode(), *site.encode(), at // 5])
                logits = rng.normal(size=3)
                classes = comparison.settings.task.settings.classes
                logits[classes.index(case.label)] += skill(run, site)
                values = np.exp(logits) / np.exp(logits).sum()
                if case.image not in missing:
                    row = {"image": case.image, "patient": case.patient, "label": case.label}
                    cases[site].append(row | {"scores": dict(zip(classes, map(float, values), strict=True))})
        validation = 0.9 if run.row == "chest_xray_fedbn" else 0.8
        results.append(Result(run, [0.5, 0.7, validation], 2, validation, 10.0, 1000, cases))
    return results


def typical(run, site):
    return {"local": 2.0 if run.row == site else 0.5, "pooled": 2.5, "federated": 2.5}[run.kind]


def test_every_row_has_the_same_budget_and_its_own_key(comparison):
    runs = comparison.runs
    assert [run.row for run in runs[:5]] == [
        "hospital-a",
        "hospital-b",
        POOLED,
        "chest_xray_fedavg",
        "chest_xray_fedbn",
    ]
    assert {run.steps for run in runs} == {4}, "two batches of each of two sites"
    assert len({run.key for run in runs}) == len(runs) == 10
    again = Comparison([FEDAVG, FEDBN], comparison.data, [0, 1], SMALL)
    assert [run.key for run in again.runs] == [run.key for run in runs]
    other = Comparison([FEDAVG, FEDBN], comparison.data, [0, 1], SMALL | {"training.learning_rate": 0.01})
    assert not {run.key for run in other.runs} & {run.key for run in runs}
    assert replace(runs[0], data={"hospital-a": "changed"}).key != runs[0].key


def test_a_strategy_without_a_job_folder_is_a_row(hospitals):
    strategies = [{"name": "fedprox", "mu": 0.1}, {"name": "fedbn"}]
    comparison = Comparison([FEDAVG], hospitals, [0], SMALL, strategies=strategies)
    rows = {run.row: run for run in comparison.runs if run.kind == "federated"}
    assert list(rows) == ["chest_xray_fedavg", "chest_xray_fedavg+fedprox,mu=0.1", "chest_xray_fedavg+fedbn"]
    used = [run.settings["training"]["strategy"] for run in rows.values()]
    assert used == [{"name": "fedavg"}, {"name": "fedprox", "mu": 0.1}, {"name": "fedbn", "keep": "all"}]
    assert len({run.steps for run in comparison.runs}) == 1
    assert {run.settings["training"]["strategy"]["name"] for run in comparison.runs if run.kind != "federated"} == {
        "fedavg"
    }


def test_a_result_of_other_code_is_not_taken_for_this_one_s(comparison, tmp_path, monkeypatch):
    result = made_up(comparison, typical)[0]
    result.write(tmp_path)
    assert Runner(comparison, tmp_path).is_done(result.run)
    monkeypatch.setattr("fedimaging.compare.runs.package_hash", lambda: "0" * 64)
    assert not Runner(comparison, tmp_path).is_done(result.run)


def test_hospitals_are_resampled_each_for_itself_and_all_models_of_one_alike(comparison):
    """Two hospitals whose cases and scores are the same: only the draws tell them apart."""
    one, other = comparison.sites
    dataset = comparison.datasets[one]
    more = dataset.manifest.model_copy(update={"test": dataset.manifest.training, "training": []})
    comparison.datasets |= dict.fromkeys((one, other), replace(dataset, manifest=more))
    results = made_up(comparison, lambda run, site: 1.0)
    for result in results:
        result.cases[other] = result.cases[one]
    analysis = _Analysis(comparison, results)
    at_one, at_other = (analysis._estimates(POOLED, site)[0] for site in (one, other))
    assert at_one.value == at_other.value
    assert abs(np.corrcoef(at_one.resampled, at_other.resampled)[0, 1]) < 0.15
    macro = paired.mean_over_sites([at_one, at_other])
    assert np.std(macro.resampled) == pytest.approx(math.sqrt((macro.parts**2).sum()), rel=0.15)
    same = analysis._estimates("chest_xray_fedavg", one)[0]
    assert np.array_equal(same.minus(at_one).resampled, np.zeros(len(at_one.resampled))), "drawn alike, so paired"


def test_pooling_keeps_each_case_and_its_split(comparison):
    pooled = pool(comparison.datasets, comparison.data)
    for split in ("training", "validation", "test"):
        assert len(pooled.manifest.split(split)) == sum(
            len(d.manifest.split(split)) for d in comparison.datasets.values()
        )
    assert all((pooled.root / case.image).is_file() for case in pooled.manifest.test)


def test_baselines_are_trained_for_the_steps_of_all_sites_and_done_once(comparison, tmp_path, monkeypatch):
    steps = []
    train = Site.train

    def counted(self, *arguments, **named):
        result = train(self, *arguments, **named)
        steps.append(result.steps)
        return result

    monkeypatch.setattr(Site, "train", counted)
    local, pooled = comparison.runs[0], comparison.runs[2]
    runner = Runner(comparison, tmp_path)
    results = [runner.result(run) for run in (local, pooled)]
    assert steps == [4, 4, 4, 4]
    for result in results:
        assert len(result.curve) == 3
        assert {site: len(rows) for site, rows in result.cases.items()} == {
            site: len(dataset.manifest.test) for site, dataset in comparison.datasets.items()
        }
    assert results[0].bytes == 0
    assert results[1].bytes > 10_000
    monkeypatch.setattr(Site, "train", lambda *_, **__: pytest.fail("trained again"))
    assert Runner(comparison, tmp_path).result(local) == results[0]
    stored = tmp_path / f"{local.key}.json"
    stored.write_text(stored.read_text()[:100])
    assert not Runner(comparison, tmp_path).is_done(local), "half a file is no result"


def test_the_figures_tell_who_is_better_and_how_surely(comparison):
    figures = analyse(comparison, made_up(comparison, typical))
    rows = figures["rows"]
    assert list(rows) == [ALONE, POOLED, "chest_xray_fedavg", "chest_xray_fedbn"]
    assert rows[POOLED]["macro"]["value"] > rows[ALONE]["macro"]["value"] > 0.85
    low, high = rows[POOLED]["macro"]["ci"]
    assert low < rows[POOLED]["macro"]["value"] < high
    assert rows[POOLED]["macro"]["sd"] is not None
    assert figures["others"]["hospital-a"]["hospital-b"]["value"] < 0.75
    assert figures["chosen"] == "chest_xray_fedbn", "by validation, not by test"
    against = {(d["row"], d["base"]): d["macro"] for d in figures["differences"]}
    assert against["chest_xray_fedavg", ALONE]["value"] > 0
    assert against["chest_xray_fedavg", POOLED] == {"value": 0.0, "ci": [0.0, 0.0], "p": None}
    assert figures["verdicts"]["chest_xray_fedavg"] == {"share_of_pooled": 1.0, "behind": [], "losers": []}
    json.dumps(figures, allow_nan=False)


def test_subgroups_are_shown_where_they_are_large_enough(comparison):
    assert analyse(comparison, made_up(comparison, typical))["subgroups"] == []
    for site, dataset in comparison.datasets.items():
        more = dataset.manifest.model_copy(update={"test": dataset.manifest.training, "training": []})
        comparison.datasets[site] = replace(dataset, manifest=more)
    found = analyse(comparison, made_up(comparison, typical))["subgroups"]
    assert {group["covariate"] for group in found} <= {"sex", "age_group", "view"}
    (women,) = (g for g in found if (g["site"], g["covariate"], g["group"]) == ("hospital-a", "sex", "F"))
    assert women["cases"] == sum(case.sex == "F" for case in comparison.datasets["hospital-a"].manifest.test)
    assert set(women["rows"]) == {ALONE, POOLED, "chest_xray_fedbn"}
    low, high = women["rows"][POOLED]["ci"]
    assert low <= women["rows"][POOLED]["value"] <= high


def test_who_loses_is_told(comparison):
    def poor(run, site):
        return 0.0 if run.kind == "federated" else typical(run, site)

    figures = analyse(comparison, made_up(comparison, poor))
    verdict = figures["verdicts"]["chest_xray_fedavg"]
    assert verdict["losers"] == ["hospital-a", "hospital-b"]
    assert {"site": "hospital-a", "owner": "hospital-b"} in verdict["behind"]
    assert verdict["share_of_pooled"] < 0.7
    worse = next(d for d in figures["differences"] if d["base"] == POOLED)["macro"]
    assert worse["p"] < 1e-4
    assert "at hospital-a: hospital-b’s" in render(figures | {"command": "x"})


@pytest.fixture
def leaving_out(hospitals):
    return Comparison([FEDAVG], hospitals, [0], SMALL | {"min_clients": 1}, leave_one_out=True)


def test_each_hospital_is_judged_by_the_model_that_was_trained_without_it(leaving_out):
    def skill(run, site):
        return 0.3 if run.leave_out == site else typical(run, site)

    assert [(run.row, run.leave_out, run.steps) for run in leaving_out.runs[-2:]] == [
        ("without_hospital-a", "hospital-a", 2), ("without_hospital-b", "hospital-b", 2)
    ]  # fmt: skip
    figures = analyse(leaving_out, made_up(leaving_out, skill))
    row = figures["rows"][LEFT_OUT]
    assert row["kind"] == "left_out"
    for site in ("hospital-a", "hospital-b"):
        assert row["sites"][site]["value"] < 0.75 < figures["rows"]["chest_xray_fedavg"]["sites"][site]["value"]
    assert row["seconds"] == 20.0, "two runs"
    assert figures["chosen"] == "chest_xray_fedavg"
    assert LEFT_OUT not in figures["curves"]
    against = {(d["row"], d["base"]): d["macro"]["value"] for d in figures["differences"]}
    assert against[LEFT_OUT, ALONE] < 0
    assert "each hospital by a model trained without it" in render(figures | {"command": "x"})


@pytest.mark.federation
def test_a_run_without_a_hospital_is_one_of_the_job_that_leaves_it_out(leaving_out, tmp_path):
    run = leaving_out.runs[-1]
    result = Runner(leaving_out, tmp_path).result(run)
    assert len(result.curve) == 3
    assert {site: len(rows) for site, rows in result.cases.items()} == {
        site: len(dataset.manifest.test) for site, dataset in leaving_out.datasets.items()
    }
    one_site_s_models = 2 * 2 * 40e6
    assert one_site_s_models < result.bytes < 1.5 * one_site_s_models, "nothing went to the other one in training"


@pytest.mark.parametrize(
    ("jobs", "changes", "told"),
    [
        ([FEDAVG], {}, "sites left to train at: 1, and chest_xray_fedavg needs 2"),
        ([FEDBN], {"min_clients": 1}, "judges sites by models of their own"),
        ([FEDAVG.with_name("chest_xray_leave_one_out")], {}, "leaves out hospital-c"),
    ],
)
def test_leaving_out_where_it_cannot_be_is_refused(hospitals, jobs, changes, told):
    with pytest.raises(FedImagingError, match=told):
        Comparison(jobs, hospitals, [0], SMALL | changes, leave_one_out=True)


@pytest.mark.parametrize("name", [ALONE, POOLED, LEFT_OUT, "hospital-a", "without_hospital-b"])
def test_a_job_with_the_name_of_another_row_is_refused(hospitals, tmp_path, name):
    job = shutil.copytree(FEDAVG, tmp_path / "job")
    meta = json.loads((job / "meta.json").read_text())
    (job / "meta.json").write_text(json.dumps(meta | {"name": name}))
    with pytest.raises(FedImagingError, match=f"compare: {name} is a row of its own; give the job another name"):
        Comparison([job], hospitals, [0], SMALL)


def test_cases_that_a_model_could_not_read_are_left_out_for_all(comparison):
    missing = {comparison.datasets["hospital-a"].manifest.test[0].image}
    results = made_up(comparison, typical)
    results[0] = made_up(comparison, typical, missing)[0]
    count = len(comparison.datasets["hospital-a"].manifest.test)
    assert analyse(comparison, results)["cases"]["hospital-a"]["judged"] == count - 1


@pytest.mark.parametrize(
    ("width", "hospitals_shown", "whole", "cost"),
    [
        (200, True, True, True),
        (90, True, True, True),
        (80, True, False, True),
        (58, False, True, True),
    ],
)
def test_a_narrow_terminal_shows_what_fits_and_nothing_cut_off(comparison, width, hospitals_shown, whole, cost):
    figures = analyse(comparison, made_up(comparison, typical))
    terminal = Console(width=width, record=True, file=io.StringIO())
    terminal.print(table(figures, width))
    text = terminal.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    shown = [title in text for title in ("hospital-b", "macro mean", "all cases", "cost")]
    assert shown == [hospitals_shown, True, whole, cost]
    macro = figures["rows"][POOLED]["macro"]
    assert f"{macro['value']:.3f} ± {macro['sd']:.3f}" in text
    assert f"{macro['ci'][0]:.3f}–{macro['ci'][1]:.3f}" in text


def test_the_page_escapes_and_needs_no_network(comparison):
    figures = analyse(comparison, made_up(comparison, typical)) | {"command": "<script>alert(1)</script>"}
    page = render(figures)
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert page.count('<svg class="plot"') == 1
    assert page.count("p not defined") == 6, "the federated models equal the pooled one"
    surely = copy.deepcopy(figures)
    surely["differences"][0]["macro"]["p"] = 0.0
    assert "p &lt; 0.001" in render(surely)
    text = re.sub(r"<[^>]+>", " ", page)
    for shown in ("chosen on validation", "DeLong", "hospital-a", "each hospital’s own model", "share of the pooled"):
        assert shown in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--set", "rounds=0"], "workflow.num_rounds"),
        (["--seeds", "1,1"], "--seeds"),
        (["--strategy", "fedbest"], "unknown name; choose one of"),
        (["--strategy", '{"name": '], "not JSON"),
        (["--strategy", "fedbn", "--strategy", "fedbn"], "give each once"),
        (["--data", "nowhere"], "nowhere"),
        (["--parallel", "0"], "--parallel 0"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_is_trained(hospitals, tmp_path, capsys, arguments, told):
    command = ["compare", str(FEDAVG), *(["--data", str(hospitals)] if "--data" not in arguments else []), *arguments]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_job_given_twice_is_refused(hospitals):
    with pytest.raises(FedImagingError, match="give each once"):
        Comparison([FEDAVG, FEDAVG], hospitals, [0], {})


def test_jobs_that_differ_in_more_than_their_strategy_are_refused(hospitals, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(FEDBN, other)
    path = other / "app/config/config_fed_client.json"
    path.write_text(path.read_text().replace('"batch_size": 16', '"batch_size": 8'))
    with pytest.raises(FedImagingError, match=r"training\.batch_size"):
        Comparison([FEDAVG, other], hospitals, [0], {})


def test_runs_side_by_side_give_what_they_give_alone(comparison, tmp_path):
    local, pooled = comparison.runs[0], comparison.runs[2]
    started, told = [], []
    results = train_side_by_side(
        comparison, tmp_path, [local, pooled], 2,
        started=started.append, report=lambda run, event: told.append((run.title, event["stage"])),
    )  # fmt: skip
    side_by_side = {result.run.title: result for result in results}
    assert started == [local, pooled]
    assert {(run.title, stage) for run in started for stage in ("loading", "training")} <= set(told)
    alone = Runner(comparison, tmp_path / "alone").result(local)
    assert side_by_side[local.title].curve == pytest.approx(alone.curve, abs=0.02)
    assert side_by_side[local.title].cases.keys() == alone.cases.keys()
    assert Runner(comparison, tmp_path).is_done(pooled)


def test_a_run_that_fails_stops_those_beside_it_and_leaves_what_is_done(comparison, tmp_path):
    local, _, pooled, *_ = comparison.runs
    broken = replace(pooled, settings=pooled.settings | {"network": {"name": "NoSuchNetwork"}})
    long = replace(local, rounds=10_000)
    results = train_side_by_side(
        comparison, tmp_path, [local, broken, long], 2, started=lambda run: None, report=lambda run, event: None
    )
    with pytest.raises(FedImagingError, match=r"pooled, seed 0: network\.name: not a registered network"):
        list(results)
    assert multiprocessing.active_children() == []
    assert not list(tmp_path.glob("*.part"))


def test_a_run_whose_process_was_killed_is_told(comparison, tmp_path):
    def kill(run, event):
        for child in multiprocessing.active_children():
            child.kill()

    results = train_side_by_side(comparison, tmp_path, comparison.runs[:1], 1, started=lambda run: None, report=kill)
    with pytest.raises(FedImagingError, match=r"exit code -9 .* --parallel 1"):
        list(results)


@pytest.mark.federation
def test_the_command_ends_in_a_report_and_goes_on_where_it_was(hospitals, tmp_path):
    command = [
        sys.executable, "-m", "fedimaging", "compare", FEDBN, "--data", hospitals, "--out", tmp_path / "out",
        *(part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")),
    ]  # fmt: skip
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(done)
    figures = json.loads((tmp_path / "out/report.json").read_text())
    assert list(figures["rows"]) == [ALONE, POOLED, "chest_xray_fedbn"]
    assert len(figures["curves"]["chest_xray_fedbn"]) == 3
    assert figures["rows"]["chest_xray_fedbn"]["bytes"] > 2 * 2 * 2 * 40e6
    assert figures["rows"]["chest_xray_fedbn"]["strategy"]["name"] == "fedbn"
    assert "macro" in outputs[0].stdout
    assert outputs[1].stderr.count("done before") == 4
    assert outputs[0].stdout == outputs[1].stdout
    assert "Does federating pay?" in (tmp_path / "out/report.html").read_text()
    assert [path.suffix for path in (tmp_path / "out/runs").iterdir() if path.is_dir()] == []
