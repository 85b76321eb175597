"""The report: what it reads, what it says when something is missing, and what it must never show."""

import argparse
import base64
import json
import math
import random
import re
import stat
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedimaging.errors import FedImagingError
from fedimaging.report import add_commands, write_report
from fedimaging.report.collect import collect
from fedimaging.report.evaluation import macro_mean

SITES = ("hospital-a", "hospital-b", "hospital-c")
ROUNDS = 8
BEST = 6
TRAINING = {"hospital-a": 140, "hospital-b": 96, "hospital-c": 61}


def metrics(site: str, after: int) -> dict:
    auroc = 0.5 + (0.44 - 0.05 * SITES.index(site)) * (1 - math.exp(-after / 2)) - 0.02 * (after > BEST)
    return {
        "auroc": round(auroc, 4),
        "loss": round(1.2 - auroc, 4),
        "accuracy": 0.8,
        "cases": 20 - 4 * SITES.index(site),
    }


def round_event(index: int) -> dict[str, Any]:
    refused = {"hospital-c": "unreadable_images"} if index == 3 else {}
    sites: dict[str, Any] = {
        site: {
            "cases": TRAINING[site],
            "seconds": 9.8 - 2 * i + 0.1 * index,
            "loss": round(0.68 * math.exp(-index / (4 + i)) + 0.05 * i, 4),
            "epoch_losses": [0.7, 0.61],
            "metrics": metrics(site, index),
            "votes": 20 - 4 * i,
            "skipped": 1 if site == "hospital-b" else 0,
        }
        for i, site in enumerate(SITES)
        if site not in refused
    }
    votes = sum(s["votes"] for s in sites.values())
    key = sum(s["votes"] * s["metrics"]["auroc"] for s in sites.values()) / votes
    return {
        "event": "round",
        "round": index,
        "seconds": 12.3 + 0.1 * index,
        "bytes_out": 83_700_000 - 27_900_000 * len(refused),
        "bytes_in": 83_600_000 - 27_900_000 * len(refused),
        "sites": sites,
        "refused": refused,
        "missing": [],
        "key_metric": round(key, 4),
        "best": index <= BEST,
    }


def evaluation(site: str, lift: float = 0.0) -> dict:
    i = SITES.index(site)
    auroc = 0.95 - 0.06 * i + lift
    fpr = [step / 20 for step in range(21)]
    withheld = site == "hospital-c"
    rng = random.Random(i)
    bins: list[dict[str, Any]] = [
        {
            "confidence": 0.05 + 0.1 * b,
            "accuracy": min(1, max(0, 0.05 + 0.1 * b + rng.uniform(-0.1, 0.1))),
        }
        for b in range(10)
    ]
    bins[4] = {"confidence": 0.45, "accuracy": None}
    return {
        "split": "test",
        "task": "classification",
        "cases": 40 - 8 * i,
        "patients": 38 - 8 * i,
        "classes": {"normal": None, "pneumonia": None} if withheld else {"normal": 20 - 2 * i, "pneumonia": 20 - 6 * i},
        "training": {
            "cases": TRAINING[site],
            "classes": {"normal": TRAINING[site] // 2, "pneumonia": TRAINING[site] - TRAINING[site] // 2},
        },
        "validation": {
            "cases": 20 - 4 * i,
            "classes": {"normal": None, "pneumonia": None} if withheld else {"normal": 10, "pneumonia": 10 - 4 * i},
        },
        "min_cell": 5,
        "auroc": auroc,
        "auroc_ci": [auroc - 0.07 - 0.05 * i, min(1.0, auroc + 0.04 + 0.02 * i)],
        "accuracy": 0.88 - 0.04 * i,
        "balanced_accuracy": 0.87 - 0.04 * i,
        "per_class": {
            "pneumonia": {
                "auroc": auroc,
                "auroc_ci": [auroc - 0.07, min(1.0, auroc + 0.04)],
                "threshold": 0.41 + 0.05 * i,
                "sensitivity": None if withheld else (0.14 + 0.03 * i) ** (0.12 + 0.08 * i),
                "sensitivity_ci": None if withheld else [0.66, 0.97],
                "specificity": 0.86 - 0.03 * i,
                "specificity_ci": [0.71, 0.95],
                "roc": {"fpr": fpr, "tpr": [x ** (0.12 + 0.08 * i) for x in fpr]},
            }
        },
        "calibration": {"ece": 0.041 + 0.02 * i, "brier": 0.09 + 0.03 * i, "bins": bins},
        "subgroups": {
            "sex": {
                "F": {"cases": 18 - 3 * i, "auroc": auroc - 0.01, "auroc_ci": [auroc - 0.13, min(1.0, auroc + 0.05)]},
                "M": {"cases": None, "auroc": None, "auroc_ci": None}
                if withheld
                else {"cases": 22 - 5 * i, "auroc": auroc, "auroc_ci": None},
            }
        },
        "seconds": 1.2,
        "skipped": 0,
    }


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def start_event(**changes: object) -> dict:
    return {
        "event": "start",
        "time": "2026-03-02T08:15:00+00:00",
        "job": "chest_xray_fedavg",
        "rounds": ROUNDS,
        "min_clients": 2,
        "model_bytes": 27_900_000,
        "parameters": 6_955_906,
        "key_metric": "auroc",
        "task": {"name": "classification", "classes": ["normal", "pneumonia"], "multi_label": False},
        "network": {"name": "densenet121", "norm": "batch"},
        "seed": 0,
        "versions": {
            "fedimaging": "0.1.0",
            "nvflare": "2.9.0",
            "torch": "2.13.0",
            "monai": "1.6.1",
            "python": "3.11.7",
        },
        "start_from": None,
        **changes,
    }


def write_events(run: Path, events: list[dict], tail: str = "") -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "rounds.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + tail, encoding="utf-8")


def server_run(run: Path, name: str = "hospital-a", crashed: bool = False) -> None:
    """A server's run directory; `name` is what hospital-a is called in it."""
    events = [start_event(), *(round_event(i) for i in range(5 if crashed else ROUNDS))]
    if not crashed:
        events += [
            {
                "event": "final",
                "metrics": {s: metrics(s, ROUNDS) for s in SITES},
                "key_metric": 0.88,
                "best": False,
                "seconds": 2.1,
            },
            {
                "event": "end",
                "best_round": BEST,
                "best_key_metric": 0.8961,
                "seconds": 120.0,
                "peak_memory": {"server": 812_000_000, "sites": dict.fromkeys(SITES, 1_200_000_000)},
            },
        ]
        results = {s: {"SRV_best": evaluation(s), "SRV_last": evaluation(s, -0.02)} for s in SITES}
        write_json(
            run / "cross_site_val" / "cross_val_results.json",
            json.loads(json.dumps(results).replace("hospital-a", name)),
        )
    write_events(
        run, json.loads(json.dumps(events).replace("hospital-a", name)), tail='{"event": "rou' if crashed else ""
    )
    client = {
        "format_version": 2,
        "executors": [{"executor": {"path": "fedimaging.federation.Executor", "args": {"dataset": "chest_xray"}}}],
    }
    write_json(run / "app_server" / "config" / "config_fed_client.json", client)
    write_json(
        run / "app_server" / "config" / "config_fed_server.json",
        {"workflows": [{"id": "fedavg", "args": {"rounds": ROUNDS}}]},
    )


def synthetic_data(root: Path, synthetic: bool = True) -> Path:
    """Tiny hospitals, one image per class."""
    for i, site in enumerate(SITES):
        folder = root / site / "chest_xray"
        cases = []
        for j, label in enumerate(("normal", "pneumonia")):
            (folder / "images").mkdir(parents=True, exist_ok=True)
            x, y = np.mgrid[-1:1:256j, -1:1:300j]
            pixels = 200 * np.exp(-((x**2 + y**2) * (1 + i + 2 * j)))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{label}.png")
            cases.append({"image": f"images/{label}.png", "label": label, "patient": f"PATIENT-{i}{j}"})
        write_json(
            folder / "manifest.json",
            {
                "name": "chest_xray",
                "modality": "DX",
                "task": "classification",
                "classes": ["normal", "pneumonia"],
                "made": {"by": "test", "synthetic": synthetic},
                "training": cases,
            },
        )
    return root


def make_workspace(workspace: Path, name: str = "hospital-a", crashed: bool = False) -> Path:
    server_run(workspace / "server" / "simulate_job", name, crashed)
    write_json(
        workspace / "simulate.json",
        {
            "job": "chest_xray_fedavg",
            "sites": [s.replace("hospital-a", name) for s in SITES],
            "overrides": {"training.rounds": ROUNDS},
            "command": "python -m fedimaging simulate jobs/chest_xray_fedavg --set training.rounds=8",
            "seconds": 130.2,
            "ok": not crashed,
            "errors": ["hospital-b stopped: out_of_memory"] if crashed else [],
        },
    )
    return workspace


def write_site_report(folder: Path, site: str = "hospital-a") -> None:
    cases = [
        {
            "image": "images/SECRET_1.dcm",
            "patient": "PID-77",
            "label": "normal",
            "scores": {"normal": 0.8, "pneumonia": 0.2},
        },
        {
            "image": "images/SECRET_2.dcm",
            "patient": "PID-78",
            "label": "pneumonia",
            "scores": {"normal": 0.9, "pneumonia": 0.1},
        },
    ]
    content = {
        "site": site,
        "dataset": "chest_xray",
        "models": {"SRV_best": {"eval": evaluation(site), "cases": cases}},
    }
    write_json(folder / "site_report.json", content)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return make_workspace(tmp_path / "run")


def read(paths: tuple[Path, Path]) -> tuple[str, dict]:
    return paths[0].read_text(encoding="utf-8"), json.loads(paths[1].read_text(encoding="utf-8"))


def visible(page: str) -> str:
    """The page's text as a reader sees it, without tags and style sheet."""
    texts: list[str] = []

    class Parser(HTMLParser):
        hidden = False

        def handle_starttag(self, tag, attrs):
            self.hidden = tag == "style"

        def handle_endtag(self, tag):
            self.hidden = False

        def handle_data(self, data):
            if not self.hidden:
                texts.append(data)

    Parser().feed(page)
    return re.sub(r"\s+", " ", " ".join(texts))


def test_headline_is_the_macro_mean_of_the_picked_model(workspace: Path) -> None:
    page, report = read(write_report(workspace))
    assert report["report_version"] == 1
    assert report["headline"]["model"] == "best"
    assert report["headline"]["macro_mean"]["value"] == pytest.approx((0.95 + 0.89 + 0.83) / 3)
    assert report["picked"]["after_rounds"] == BEST
    text = visible(page)
    assert "Three hospitals trained one model together over eight rounds." in text
    assert "The model picked is the one after round 6, the best on validation." in text
    assert "simulation" in text
    assert "0.890" in text
    assert "pooled" in text
    assert "highest vote-weighted validation AUROC (0.896); sites vote with their number of validation cases" in text


def test_a_hospital_left_out_is_shown_and_is_no_part_of_the_macro_mean(workspace: Path) -> None:
    run = workspace / "server" / "simulate_job"
    events = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for event in events:
        if event["event"] == "round":
            event["sites"].pop("hospital-c", None)
            event["refused"] = {}
    write_events(run, [start_event(leave_out="hospital-c"), *events[1:]])
    page, report = read(write_report(workspace))
    assert set(report["cross_site"]["best"]) == set(SITES)
    mean = report["headline"]["macro_mean"]
    assert mean["value"] == pytest.approx((0.95 + 0.89) / 2)
    assert mean["sites"] == ["hospital-a", "hospital-b"]
    text = visible(page)
    assert "the model never saw, and no part of the macro mean" in text
    assert "macro mean of those that trained" in text


def test_macro_mean_interval_matches_independent_sampling() -> None:
    """The interval of a mean of two independent normal estimates is narrower by the root of two than each alone."""
    one = {"metrics": {"auroc": {"value": 0.8, "ci": [0.7, 0.9], "status": "ok"}}}
    mean = macro_mean({"a": one, "b": one}, "auroc")
    assert mean["value"] == pytest.approx(0.8)
    assert mean["ci"] == pytest.approx([0.8 - 0.1 / math.sqrt(2), 0.8 + 0.1 / math.sqrt(2)])


@pytest.mark.parametrize("ci", [None, [1.0, 1.0], [0.5, 0.6]])
def test_macro_mean_has_no_interval_where_a_hospital_has_no_sound_one(ci: list[float] | None) -> None:
    evaluations = {
        "a": {"metrics": {"auroc": {"value": 0.9, "ci": [0.8, 0.95], "status": "ok"}}},
        "b": {"metrics": {"auroc": {"value": 1.0, "ci": ci, "status": "ok"}}},
        "c": {"metrics": {"auroc": {"value": None, "ci": None, "status": "withheld"}}},
    }
    mean = macro_mean(evaluations, "auroc")
    assert (mean["value"], mean["ci"]) == (pytest.approx(0.95), None)
    assert (mean["sites"], mean["left_out"]) == (["a", "b"], ["c"])


def test_participation_names_the_refusal_and_its_code(workspace: Path) -> None:
    page, report = read(write_report(workspace))
    cells = [row["sites"]["hospital-c"] for row in report["participation"]]
    assert [cell["status"] for cell in cells] == ["took_part"] * 3 + ["refused"] + ["took_part"] * 4
    assert cells[3]["reason"] == "unreadable_images"
    assert report["participation"][0]["sites"]["hospital-b"] == {"status": "took_part", "cases": 96, "skipped": 1}
    text = visible(page)
    assert "refused: unreadable_images" in text
    assert "hospital-c refused in 1 of 8 rounds (unreadable_images)." in text
    assert "96 cases, 1 skipped" in text


def test_withheld_cells_say_so_and_show_no_number(workspace: Path) -> None:
    page, report = read(write_report(workspace))
    best = report["cross_site"]["best"]["hospital-c"]
    assert best["per_class"]["pneumonia"]["metrics"]["sensitivity"] == {"value": None, "ci": None, "status": "withheld"}
    assert best["subgroups"]["sex"]["M"]["metrics"]["auroc"]["status"] == "withheld"
    assert best["classes"] == {"normal": None, "pneumonia": None}
    assert "withheld (< 5 cases)" in visible(page).replace("\xa0", " ")


def test_validation_counts_the_rounds_trained(workspace: Path) -> None:
    report = collect(workspace)
    assert [point["after_rounds"] for point in report["validation"]] == list(range(ROUNDS + 1))
    assert [point["after_rounds"] for point in report["validation"] if point["picked"]] == [BEST]
    assert report["validation"][0]["key"]["hospital-a"] == pytest.approx(0.5)
    assert report["training"][0]["round"] == 1
    assert "hospital-c" not in report["training"][3]["sites"]


def test_matrix_cases_resources_and_settings(workspace: Path) -> None:
    page, report = read(write_report(workspace))
    assert list(report["cross_site"]) == ["best", "last"]
    assert report["macro_mean"]["last"]["value"] == pytest.approx(0.87)
    assert report["cases"]["hospital-a"]["training"] == {"cases": 140, "classes": {"normal": 70, "pneumonia": 70}}
    assert report["resources"]["model_bytes"] == 27_900_000
    assert report["settings"]["client"]["executors"][0]["executor"]["args"]["dataset"] == "chest_xray"
    assert report["overrides"] == {"training.rounds": ROUNDS}
    text = visible(page)
    for shown in (
        "27.9 MB",
        "6,955,906 parameters",
        "812.0 MB",
        "1.20 GB",
        "training.rounds",
        "2.13.0",
        "fedavg",
        "balanced accuracy",
    ):
        assert shown in text
    assert page.count('<svg class="plot"') == 2 + 1 + 3


def test_the_page_needs_no_network_and_no_script(workspace: Path) -> None:
    page, _ = read(write_report(workspace))
    assert "Content-Security-Policy" in page
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link|iframe|object|embed|base|form)\b", page)
    assert set(re.findall(r"https?://[^\"'\s<]+", page)) <= {"http://www.w3.org/1999/xlink"}
    assert not re.search(r"\son\w+=", page)


def test_strings_of_the_workspace_are_escaped(tmp_path: Path) -> None:
    """Names that a hostile site or job chose appear as text, whole, and never as markup."""
    name = "<script>alert(1)</script>"
    workspace = make_workspace(tmp_path / "run", name)
    run = workspace / "server" / "simulate_job"
    lines = (
        (run / "rounds.jsonl")
        .read_text()
        .replace("unreadable_images", "<img src=x onerror=y>")
        .replace('"auroc"', '"x$_{ <u>"')
    )
    (run / "rounds.jsonl").write_text(lines)
    write_json(run / "app_server" / "config" / "config_fed_client.json", {"</pre><script>": "{{ 7 * 7 }}<script>"})
    page, report = read(write_report(workspace))
    assert name in report["sites"]
    assert not re.search(r"<(script|img|u)\b", page)
    assert name in visible(page)
    assert "{{ 7 * 7 }}<script>" in visible(page)
    assert "refused: <img src=x onerror=y>" in visible(page)


def test_crashed_job_says_what_is_missing(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "run", crashed=True)
    page, report = read(write_report(workspace))
    assert report["job"]["finished"] is False
    assert report["job"]["rounds_done"] == 5
    assert report["headline"]["model"] is None
    assert report["picked"] == {"after_rounds": 4, "key_metric": round_event(4)["key_metric"], "so_far": True}
    text = visible(page)
    assert "What is missing" in text
    assert "its log ends after round 5 of 8" in text
    assert "The cross-site evaluation left no results" in text
    assert "hospital-b stopped: out_of_memory" in text
    assert "Results on the test cases" not in text


@pytest.mark.parametrize("events", [[], [start_event()]])
def test_job_without_a_round_still_has_a_report(tmp_path: Path, events: list[dict]) -> None:
    write_events(tmp_path / "server" / "simulate_job", events)
    page, report = read(write_report(tmp_path))
    assert "no round of training" in visible(page)
    assert report["training"] == []


def test_missing_site_and_partial_cross_site_results(workspace: Path) -> None:
    run = workspace / "server" / "simulate_job"
    path = run / "cross_site_val" / "cross_val_results.json"
    results = json.loads(path.read_text())
    write_json(
        path,
        {
            "hospital-a": {"SRV_FL_global_model.pt": results["hospital-a"]["SRV_last"]},
            "hospital-b": results["hospital-b"],
        },
    )
    page, report = read(write_report(workspace))
    assert list(report["cross_site"]["last"]) == ["hospital-a", "hospital-b"]
    assert list(report["cross_site"]["best"]) == ["hospital-b"]
    text = visible(page)
    assert "No test results came from hospital-c." in text
    assert "no result" in text


@pytest.mark.parametrize("folder", ["", "workspace", "a1b2/workspace"])
def test_downloaded_job_is_found(tmp_path: Path, folder: str) -> None:
    server_run(tmp_path / folder)
    _, report = read(write_report(tmp_path, tmp_path / "out.html"))
    assert report["sites"] == list(SITES)
    assert report["job"]["simulated"] is False


def test_several_jobs_are_refused_by_name(tmp_path: Path) -> None:
    for job in ("one", "two"):
        server_run(tmp_path / job / "workspace")
    with pytest.raises(FedImagingError, match="one/workspace, two/workspace"):
        write_report(tmp_path)


def test_folder_without_a_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FedImagingError) as error:
        write_report(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "server/simulate_job/rounds.jsonl" in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_damaged_log_is_refused(workspace: Path) -> None:
    path = workspace / "server" / "simulate_job" / "rounds.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", *lines[2:]]))
    with pytest.raises(FedImagingError, match="line 2 is not JSON"):
        write_report(workspace)
    assert not (workspace / "report.html").exists()


def test_wrong_types_and_not_finite_numbers_are_dropped(workspace: Path) -> None:
    run = workspace / "server" / "simulate_job"
    text = (
        (run / "rounds.jsonl")
        .read_text()
        .replace('"loss": 0.68,', '"loss": NaN,')
        .replace('"seconds": 12.3,', '"seconds": "long",')
    )
    (run / "rounds.jsonl").write_text(text)
    path = run / "cross_site_val" / "cross_val_results.json"
    results = json.loads(path.read_text())
    results["hospital-a"]["SRV_best"] |= {
        "auroc_ci": "wide",
        "calibration": [1],
        "subgroups": {"sex": 3},
        "per_class": None,
        "cases": True,
    }
    write_json(path, results)
    _, report = read(write_report(workspace))
    assert report["training"][0]["sites"]["hospital-a"]["loss"] is None
    assert report["training"][0]["seconds"] is None
    assert report["cross_site"]["best"]["hospital-a"]["metrics"]["auroc"]["ci"] is None
    assert report["macro_mean"]["best"]["ci"] is None


def test_only_aggregates_are_taken_from_what_a_site_sent(workspace: Path) -> None:
    """Texts and lists that do not belong into an evaluation never reach the report."""
    path = workspace / "server" / "simulate_job" / "cross_site_val" / "cross_val_results.json"
    results = json.loads(path.read_text())
    results["hospital-a"]["SRV_best"] |= {
        "files": ["images/SECRET.dcm"],
        "uid": "1.2.3.SECRET",
        "per_case": {"SECRET": 0.4},
    }
    results["hospital-a"]["SRV_best"]["per_class"]["pneumonia"]["worst"] = "images/SECRET.dcm"
    write_json(path, results)
    html, data = write_report(workspace)
    assert "SECRET" not in html.read_text() + data.read_text()


def test_segmentation_is_rendered_from_what_is_there(tmp_path: Path) -> None:
    run = tmp_path / "workspace"
    rounds = [
        {
            **round_event(i),
            "sites": {"a": {"cases": 9, "loss": 1 - i / 10, "metrics": {"mean_dice": i / 10}, "votes": 3}},
        }
        for i in range(3)
    ]
    write_events(run, [start_event(key_metric="mean_dice"), *rounds])
    result = {
        "task": "segmentation",
        "split": "test",
        "cases": 12,
        "min_cell": 5,
        "mean_dice": 0.81,
        "mean_dice_ci": [0.74, 0.86],
        "per_class": {"lung": {"dice": 0.81, "dice_ci": [0.74, 0.86], "hd95": 12.5}},
    }
    write_json(run / "cross_site_val" / "cross_val_results.json", {s: {"SRV_best": result} for s in ("a", "b")})
    page, report = read(write_report(tmp_path))
    assert report["headline"]["macro_mean"]["value"] == pytest.approx(0.81)
    text = visible(page)
    assert "mean Dice" in text
    assert "HD95" in text
    assert "12.5" in text
    assert "AUROC" not in text


def test_per_case_results_are_in_the_sites_own_report_only(workspace: Path) -> None:
    write_site_report(workspace / "hospital-a" / "simulate_job")
    html, data = write_report(workspace)
    assert "SECRET" not in html.read_text() + data.read_text()
    assert "PID-77" not in html.read_text() + data.read_text()
    own = write_report(workspace, site="hospital-a")
    assert own == (workspace / "report-hospital-a.html", workspace / "report-hospital-a.json")
    assert [stat.S_IMODE(path.stat().st_mode) for path in own] == [0o600, 0o600]
    page, report = read(own)
    cases = report["site"]["models"]["best"]["cases"]
    assert [case["image"] for case in cases] == ["images/SECRET_2.dcm", "images/SECRET_1.dcm"]
    assert cases[0]["error"] == pytest.approx(0.9)
    assert page.index("SECRET_2") < page.index("SECRET_1")
    assert not [path for path in workspace.iterdir() if path.name.endswith(".part")]


def test_own_report_becomes_private_even_over_a_public_file(workspace: Path) -> None:
    write_site_report(workspace / "hospital-a" / "simulate_job")
    out = workspace / "own.html"
    out.write_text("old")
    out.chmod(0o644)
    for path in write_report(workspace, out, "hospital-a"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_hospital_makes_its_own_report_without_the_server(tmp_path: Path) -> None:
    write_site_report(tmp_path)
    page, report = read(write_report(tmp_path, site="hospital-a"))
    assert report["cross_site"]["best"]["hospital-a"]["metrics"]["auroc"]["value"] == pytest.approx(0.95)
    assert report["key_metric"]["name"] == "auroc"
    assert "SECRET_1" in page
    assert "macro mean" not in visible(page).lower()


@pytest.mark.parametrize("site", ["hospital-b", "../run", "", "..", "a/b"])
def test_site_without_a_report_or_with_a_wrong_name_is_refused(workspace: Path, site: str) -> None:
    write_site_report(workspace / "hospital-a" / "simulate_job")
    with pytest.raises(FedImagingError):
        write_report(workspace, site=site)
    assert not list(workspace.parent.rglob("report*.html"))


def test_example_images_of_synthetic_hospitals(workspace: Path, tmp_path: Path) -> None:
    simulate = json.loads((workspace / "simulate.json").read_text())
    write_json(workspace / "simulate.json", simulate | {"data": str(synthetic_data(tmp_path / "data"))})
    page, report = read(write_report(workspace))
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 6
    picture = Image.open(BytesIO(base64.b64decode(images[0])))
    assert max(picture.size) == 224
    assert "PATIENT-" not in page + json.dumps(report)
    assert "Synthetic images" in visible(page)


def test_example_images_through_the_sites_dataset_file(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDIMAGING_DATA", raising=False)
    data = synthetic_data(tmp_path / "data")
    (workspace / "local").mkdir()
    (workspace / "local" / "datasets.yml").write_text(
        f"chest_xray: {{path: '{data}/{{site}}/chest_xray', manifest: manifest.json}}\n"
    )
    page, _ = read(write_report(workspace))
    assert page.count("data:image/png") == 6


def test_no_image_of_real_data(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real images stay out of the report, whichever way the data is found."""
    data = synthetic_data(tmp_path / "data", synthetic=False)
    monkeypatch.setenv("FEDIMAGING_DATA", str(data))
    (workspace / "local").mkdir()
    (workspace / "local" / "datasets.yml").write_text(
        f"chest_xray: {{path: '{data}/{{site}}/chest_xray', manifest: manifest.json}}\n"
    )
    simulate = json.loads((workspace / "simulate.json").read_text())
    write_json(workspace / "simulate.json", simulate | {"data": str(data)})
    page, _ = read(write_report(workspace))
    assert "data:image" not in page
    assert "Example images" not in visible(page)


def test_no_image_in_the_report_of_a_downloaded_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDIMAGING_DATA", str(synthetic_data(tmp_path / "data")))
    server_run(tmp_path / "job" / "workspace")
    page, _ = read(write_report(tmp_path / "job"))
    assert "data:image" not in page


def test_unreadable_example_does_not_stop_the_report(workspace: Path, tmp_path: Path) -> None:
    data = synthetic_data(tmp_path / "data")
    (data / "hospital-b" / "chest_xray" / "images" / "normal.png").write_bytes(b"nothing")
    simulate = json.loads((workspace / "simulate.json").read_text())
    write_json(workspace / "simulate.json", simulate | {"data": str(data)})
    page, _ = read(write_report(workspace))
    assert page.count("data:image/png") == 4


def test_command_line(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    out = tmp_path / "out.html"
    arguments = parser.parse_args(["report", str(workspace), "--out", str(out)])
    assert arguments.run(arguments) == 0
    assert capsys.readouterr().out.split() == [str(out), str(tmp_path / "out.json")]
    assert out.is_file()


def test_place_that_cannot_be_written_is_told(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(FedImagingError, match="--out"):
        write_report(workspace, tmp_path / "absent" / "out.html")
    with pytest.raises(FedImagingError, match=r"\.html"):
        write_report(workspace, tmp_path / "out.json")


def test_a_personal_model_is_told(workspace: Path) -> None:
    path = workspace / "server/simulate_job/cross_site_val/cross_val_results.json"
    assert "model of its own" not in write_report(workspace)[0].read_text()
    results = json.loads(path.read_text())
    for models in results.values():
        for figures in models.values():
            figures["judged"] = "personal"
    path.write_text(json.dumps(results))
    assert "Each hospital is judged by a model of its own" in write_report(workspace)[0].read_text()


@pytest.mark.parametrize("other", ["0.1.0", "0.1.1"])
def test_which_package_each_hospital_ran_is_said_and_a_difference_is_a_problem(tmp_path: Path, other: str) -> None:
    event = round_event(0)
    for site, record in event["sites"].items():
        record["fedimaging"] = {"version": other if site == "hospital-b" else "0.1.0", "sha256": "ab" * 32}
    write_events(tmp_path, [start_event(), event])
    report = collect(tmp_path)
    assert report["versions"]["sites"]["hospital-b"] == f"{other} ({'ab' * 32})"
    told = [problem for problem in report["problems"] if "did not all run the same fedimaging" in problem]
    assert bool(told) == (other != "0.1.0")
