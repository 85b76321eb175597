"""The site's word over real FLARE processes: a tampered trainer, consent that ends, a job with filters of its own."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedimaging.cli import main
from fedimaging.datasets.synthetic import synthesize
from fedimaging.federation import policy
from fedimaging.federation.job import JobFolder
from fedimaging.governance.grants import GRANTS_FILE, Grant, Kind, read_grants, write_grants
from fedimaging.governance.ledger import read_records, verify
from fedimaging.simulator import make_workspace, simulator_command, stop_process_tree

pytestmark = pytest.mark.federation

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "custom" / "fedimaging"
JOB = REPOSITORY / "jobs" / "chest_xray_fedavg"
SMALL = {"network.name": "ResNet18", "task.image_size": 32, "training.max_batches": 1, "min_clients": 1}
SECRET = "P0012-DOE-JOHN"
TAMPERED = f"""

def tampered(reply):
    import os
    import numpy as np

    site = Session.current._site_name
    if reply.params is None or site == "honest":
        return reply
    name = "class_layers.out.weight" if "class_layers.out.weight" in reply.params else next(iter(reply.params))
    report = reply.meta[REPORT]
    match site:
        case "extra":
            reply.params["{SECRET}"] = np.full(64, 7.25, np.float32)
        case "renamed":
            reply.params["{SECRET}"] = reply.params.pop(name)
        case "dtype":
            reply.params[name] = reply.params[name].astype(np.float64)
        case "nan":
            reply.params[name] = np.full_like(reply.params[name], np.nan)
        case "text":
            reply.metrics = {{**reply.metrics, "auroc": "{SECRET}"}}
        case "pixels":
            report["epoch_losses"] = [float(pixel) for pixel in range(4096)]
        case "bytes":
            reply.params[name] = np.concatenate([reply.params[name], reply.params[name]])
    return reply


"""
STOPPED = {
    "extra": "1 tensors that are not declared",
    "renamed": "lacks the tensor",
    "dtype": "another dtype",
    "nan": "is not finite",
    "text": "metrics: auroc",
    "pixels": "more values than epochs",
    "bytes": "another shape",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """One small synthetic hospital's dataset."""
    root = tmp_path_factory.mktemp("images")
    synthesize(root, hospitals=1, cases=40, longer=64, seed=3)
    return root / "hospital-a"


@pytest.fixture
def hospitals(images, tmp_path):
    """Makes a data root with as many hospitals of the same images."""

    def make(*names):
        for name in names:
            shutil.copytree(images, tmp_path / "data" / name, copy_function=os.link)
        return tmp_path / "data"

    return make


def make_job(folder, **changes):
    job = JobFolder(JOB)
    job.override(SMALL | changes)
    job.write(folder)
    return folder


def start(job, workspace, sites, package=PACKAGE.parent):
    """FLARE's simulator over a prepared workspace, its log beside it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{package}{os.pathsep}{REPOSITORY}"}
    environment.pop("FEDIMAGING_DATA", None)
    with workspace.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "nvflare.cli", *simulator_command(job, workspace, list(sites))],
            env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


def finish(process):
    try:
        process.wait(400)
    finally:
        stop_process_tree(process.pid)


def rounds(workspace):
    path = workspace / "server/simulate_job/rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ledger(workspace, site):
    assert verify(workspace / site).faults == []
    return read_records(workspace / site)


def progress(workspace, site):
    path = workspace / site / "simulate_job/progress.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


# -- a trainer that was tampered with ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tampered(images, tmp_path_factory):
    """A federation of an honest site and seven whose trainer was altered, under a server that asks for odd tasks."""
    folder = tmp_path_factory.mktemp("tampered")
    package = folder / "custom"
    shutil.copytree(PACKAGE, package / "fedimaging", ignore=shutil.ignore_patterns("__pycache__"))
    loop, workflow = (package / "fedimaging/federation" / name for name in ("client_loop.py", "workflow.py"))
    for path, before, after in (
        (loop, "flare.send(reply)", "flare.send(tampered(reply))"),
        (loop, "\ndef main()", TAMPERED + "def main()"),
        (
            workflow,
            "        super().run()\n",
            "        super().run()\n"
            '        self.send_model("steal", self._last, callback=lambda model: None)\n'
            "        while self.get_num_standing_tasks() and not self.abort_signal.triggered:\n"
            "            time.sleep(0.1)\n",
        ),
    ):
        text = path.read_text()
        assert text.count(before) == 1
        path.write_text(text.replace(before, after))
    sites = ["honest", *STOPPED]
    for name in sites:
        shutil.copytree(images, folder / "data" / name, copy_function=os.link)
    workspace = folder / "w"
    make_workspace(workspace, folder / "data")
    finish(start(make_job(folder / "job", rounds=1), workspace, sites, package))
    return workspace


def test_each_tampered_result_is_stopped_and_in_the_ledger(tampered):
    log = tampered.with_suffix(".log").read_text()
    for site, words in STOPPED.items():
        (line,) = [line for line in ledger(tampered, site) if line["task"] == "train"]
        assert line["gate"].startswith("stopped: "), log[-2000:]
        assert words in line["gate"]
        assert (line["bytes_out"], line["sha256"]) == (0, None)


def test_the_honest_site_s_result_left_and_is_all_that_the_server_has(tampered):
    (line,) = [line for line in ledger(tampered, "honest") if line["task"] == "train"]
    assert line["gate"] == "passed"
    assert line["bytes_out"] > 44_000_000
    (record,) = [record for record in rounds(tampered) if record["event"] == "round"]
    assert set(record["sites"]) == {"honest"}
    assert record["refused"] == dict.fromkeys(STOPPED, "stopped_at_gate")
    assert record["bytes_in"] < line["bytes_out"]
    model = torch.load(tampered / "server/simulate_job/app_server/FL_global_model.pt", weights_only=True)["model"]
    assert all(torch.isfinite(value).all() for value in model.values())
    for path in (tampered / "server").rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_task_that_sites_do_not_know_is_refused_and_in_the_ledger(tampered):
    for site in ("honest", *STOPPED):
        (line,) = [line for line in ledger(tampered, site) if line["task"] == "steal"]
        assert (line["kind"], line["gate"], line["bytes_out"]) == (None, "refused: unknown_task", 0)
    refused = [record for record in rounds(tampered) if record["event"] == "refused"]
    assert {record["reason"] for record in refused if record["site"] == "honest"} == {"unknown_task"}


def test_the_owner_sees_it_on_the_screen_and_the_page(tampered, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["ledger", "show", "--site", str(tampered / "extra")]) == 0
    assert "stopped" in capsys.readouterr().out
    assert main(["ledger", "report", "--site", str(tampered / "extra"), "--out", str(tmp_path / "page.html")]) == 0
    assert "not declared" in (tmp_path / "page.html").read_text()
    assert main(["grant", "show", "simulate_job", "--site", str(tampered / "extra")]) == 0
    assert "ResNet18" in capsys.readouterr().out


# -- consent -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def consent(images, tmp_path_factory):
    """Two sites take the grant of everything back in the middle of the first round. One grants one round instead."""
    folder = tmp_path_factory.mktemp("consent")
    for name in ("keeps", "takes"):
        shutil.copytree(images, folder / "data" / name, copy_function=os.link)
    workspace = folder / "w"
    make_workspace(workspace, folder / "data")
    grant = Grant(id="all", dataset="chest_xray", job=JOB.name, submitter="*", kinds=[Kind.TRAIN])
    write_grants(workspace / "local" / GRANTS_FILE, [grant])
    one = ["--dataset", "chest_xray", "--job", JOB.name, "--anybody", "--rounds", "1", "--until", "2999-12-31"]
    process = start(make_job(folder / "job", rounds=3, **{"training.epochs": 60}), workspace, ("keeps", "takes"))
    deadline = time.monotonic() + 600

    def wait_for_training(site):
        while not any(event["stage"] == "training" for event in progress(workspace, site)):
            assert process.poll() is None and time.monotonic() < deadline, workspace.with_suffix(".log").read_text()
            time.sleep(0.05)

    try:
        wait_for_training("takes")
        assert main(["grant", "take", "all", "--site", str(workspace / "takes")]) == 0
        before = len([e for e in progress(workspace, "takes") if e["stage"] == "training"])
        wait_for_training("keeps")
        assert main(["grant", "give", *one, "--site", str(workspace / "keeps")]) == 0
        assert main(["grant", "take", "all", "--site", str(workspace / "keeps")]) == 0
        process.wait(400)
    finally:
        stop_process_tree(process.pid)
    return SimpleNamespace(workspace=workspace, before=before)


def test_a_grant_taken_back_stops_the_site_within_one_batch_and_nothing_of_the_round_leaves(consent):
    events = progress(consent.workspace, "takes")
    # An epoch is one batch here, so that each batch is an event.
    assert len([event for event in events if event["stage"] == "training"]) <= consent.before + 1 < 60
    assert next(event["reason"] for event in events if event["stage"] == "refused") == "no_consent"
    first, *_ = ledger(consent.workspace, "takes")
    assert (first["task"], first["round"], first["gate"]) == ("train", 0, "refused: no_consent")
    assert first["consent"].startswith("refused: no grant for the dataset")
    assert all(line["bytes_out"] == 0 for line in ledger(consent.workspace, "takes"))


def test_the_lead_learns_which_site_and_no_consent_and_nothing_else(consent):
    first = next(record for record in rounds(consent.workspace) if record["event"] == "refused")
    assert first == {"event": "refused", "round": 0, "site": "takes", "reason": "no_consent"}
    (done,) = [record for record in rounds(consent.workspace) if record["event"] == "round"]
    assert set(done["sites"]) == {"keeps"}
    for path in (consent.workspace / "server").rglob("*"):
        assert not path.is_file() or b"no grant for" not in path.read_bytes()


def test_used_up_rounds_end_the_job_as_min_clients_says(consent):
    lines = [line for line in ledger(consent.workspace, "keeps") if line["task"] == "train"]
    assert [line["gate"] for line in lines] == ["passed", "refused: no_consent"]
    (grant,) = read_grants(consent.workspace / "keeps/local" / GRANTS_FILE)
    assert f"1 rounds of the grant {grant.id} are used up" in lines[1]["consent"]
    assert not any(record["event"] == "end" for record in rounds(consent.workspace))


# -- refused from the start --------------------------------------------------------------------------------------------


def test_a_job_with_filters_of_its_own_gets_nothing_even_where_the_allow_list_has_them(hospitals, tmp_path):
    data, workspace = hospitals("hospital-a", "hospital-b"), tmp_path / "w"
    make_workspace(workspace, data)
    job = make_job(tmp_path / "job", rounds=1)
    config = json.loads((job / "app/config/config_fed_client.json").read_text())
    config["task_result_filters"] = [
        {"tasks": ["train", "validate"], "filters": [{"path": "nvflare.app_common.filters.exclude_vars.ExcludeVars",
                                                     "args": {"exclude_vars": ["nothing"]}}]}
    ]  # fmt: skip
    (job / "app/config/config_fed_client.json").write_text(json.dumps(config))
    resources = policy.resources()
    resources["class_allow_list"].append("nvflare.app_common.filters.exclude_vars.ExcludeVars")
    policy.write_json(workspace / "local/resources.json", resources)
    finish(start(job, workspace, ("hospital-a", "hospital-b")))
    for site in ("hospital-a", "hospital-b"):
        (line,) = ledger(workspace, site)
        assert (line["task"], line["gate"], line["bytes_out"]) == ("train", "refused: bad_setting", 0)
        assert not any(event["stage"] == "training" for event in progress(workspace, site))
    assert not any(record["event"] == "round" for record in rounds(workspace))


@pytest.mark.parametrize("missing", [GRANTS_FILE, "privacy.json"])
def test_without_the_owner_s_file_or_the_gate_nothing_is_trained(hospitals, tmp_path, missing):
    workspace = tmp_path / "w"
    make_workspace(workspace, hospitals("hospital-a"))
    (workspace / "local" / missing).unlink()
    finish(start(make_job(tmp_path / "job", rounds=1), workspace, ("hospital-a",)))
    (line,) = ledger(workspace, "hospital-a")
    reason = "no_consent" if missing == GRANTS_FILE else "no_gate"
    assert (line["gate"], line["bytes_out"]) == (f"refused: {reason}", 0)
    assert [record["reason"] for record in rounds(workspace) if record["event"] == "refused"] == [reason]
    assert not any(event["stage"] in {"loading", "training"} for event in progress(workspace, "hospital-a"))
