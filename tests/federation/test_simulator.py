"""Real FLARE simulations of the committed job on small synthetic hospitals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from fedimaging import __version__
from fedimaging.cli import main
from fedimaging.datasets.manifest import Manifest
from fedimaging.simulator import simulator_command, stop_process_tree
from fedimaging.version import needed_by_jobs, package_hash
from tests.conftest import JOB, SITES, fedimaging

pytestmark = pytest.mark.federation

NEAR_ZERO = ["--set", "rounds=1", "--set", "training.max_batches=1", "--set", "task.image_size=32"]


def records(workspace):
    return [json.loads(line) for line in (workspace / "server/simulate_job/rounds.jsonl").read_text().splitlines()]


def federation_processes(workspace):
    commands = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return [command for command in commands if "nvflare" in command and str(workspace) in command]


@pytest.fixture
def without_one(hospitals, tmp_path):
    """The same hospitals; the images of hospital-c are broken."""
    root = tmp_path / "broken"
    shutil.copytree(hospitals, root, copy_function=os.link)
    folder = root / "hospital-c" / "chest_xray"
    for case in Manifest.read(folder / "manifest.json").training[:20]:
        (folder / case.image).unlink()
        (folder / case.image).write_bytes(b"not an image")
    return root


def test_the_global_model_beats_chance_clearly(plain_run):
    workspace, log = plain_run
    results = json.loads((workspace / "server/simulate_job/cross_site_val/cross_val_results.json").read_text())
    assert set(results) == set(SITES), log[-3000:]
    values = [results[site]["SRV_best"]["auroc"] for site in SITES]
    defined = [value for value in values if value is not None]
    assert len(defined) >= 2
    assert sum(defined) / len(defined) > 0.7


def test_all_sites_take_part_in_all_rounds_and_the_best_model_is_picked(plain_run):
    start, *rounds, final, end = records(plain_run[0])
    assert [record["round"] for record in rounds] == list(range(start["rounds"]))
    assert all(set(record["sites"]) == set(SITES) and not record["refused"] for record in rounds)
    judged = [record["key_metric"] for record in rounds] + [final["key_metric"]]
    defined = {i: value for i, value in enumerate(judged) if value is not None}
    assert end["best_round"] == max(defined, key=lambda i: (defined[i], -i))
    losses = [sum(figures["loss"] for figures in record["sites"].values()) for record in rounds]
    assert losses[-1] < losses[0]


def test_the_models_are_the_job_s_network_in_float32_without_counters(plain_run):
    folder = plain_run[0] / "server/simulate_job/app_server"
    for name in ("FL_global_model.pt", "best_FL_global_model.pt"):
        state = torch.load(folder / name, weights_only=True)["model"]
        assert {value.dtype for value in state.values()} == {torch.float32}
        assert any("running_var" in key for key in state)
        assert not any("num_batches_tracked" in key for key in state)


def test_what_each_site_runs_is_recorded(plain_run):
    start, first, *_ = records(plain_run[0])
    package = {"version": __version__, "sha256": package_hash()}
    assert (start["versions"]["fedimaging"], start["versions"]["fedimaging_sha256"]) == tuple(package.values())
    assert {site: record["fedimaging"] for site, record in first["sites"].items()} == dict.fromkeys(SITES, package)
    log = (plain_run[0] / "hospital-a/log.txt").read_text()
    assert f"fedimaging {__version__} ({package_hash()})" in log


def job_that_needs(version, folder, *parts):
    """A copy of the job whose server or sites need another version."""
    shutil.copytree(JOB, folder)
    for part in parts:
        config = folder / f"app/config/config_fed_{part}.json"
        text = config.read_text()
        assert f'"fedimaging": "{needed_by_jobs()}"' in text
        config.write_text(text.replace(f'"fedimaging": "{needed_by_jobs()}"', f'"fedimaging": "{version}"'))
    return folder


@pytest.mark.parametrize("part", ["client", "server"])
def test_a_job_that_needs_another_version_is_refused_before_the_first_round(hospitals, tmp_path, part):
    job, workspace = job_that_needs(">=99", tmp_path / "job", part), tmp_path / "w"
    fedimaging("workspace", workspace, "--data", hospitals)
    done = subprocess.run(
        [sys.executable, "-m", "nvflare.cli", *simulator_command(job, workspace, SITES)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    if part == "server":
        assert f"the job needs fedimaging >=99, and this is {__version__}" in done.stdout + done.stderr
        assert not (workspace / "server/simulate_job/rounds.jsonl").exists()
        return
    start, *refusals, failed = records(workspace)
    assert start["event"] == "start"
    assert {(record["event"], record["round"], record["reason"]) for record in refusals} == {
        ("refused", 0, "wrong_version")
    }
    assert (failed["event"], failed["round"]) == ("failed", 0)


def test_scalars_go_to_tensorboard(plain_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(plain_run[0] / "server/simulate_job/tb_events"))
    events.Reload()
    assert {"global/auroc", "hospital-a/train_loss"} <= set(events.Tags()["scalars"])


def test_nothing_that_names_a_case_is_in_the_server_s_workspace(plain_run, hospitals, case_names):
    files = [path for path in (plain_run[0] / "server").rglob("*") if path.is_file()]
    assert any(path.name == "rounds.jsonl" for path in files)
    assert any("log" in path.name for path in files)
    for path in files:
        content = path.read_bytes()
        found = case_names.search(content)
        assert found is None, f"{path} holds {found.group()!r}"
        assert not any(str(hospitals / site).encode() in content for site in SITES)


def test_the_site_keeps_its_cases_to_itself(plain_run):
    report = plain_run[0] / "hospital-a/simulate_job/site_report.json"
    assert oct(report.stat().st_mode & 0o777) == "0o600"
    cases = json.loads(report.read_text())["models"]["SRV_best"]["cases"]
    assert len(cases) > 10
    assert set(cases[0]["scores"]) == {"normal", "consolidation", "effusion"}


def test_the_report_of_a_run_is_written(plain_run):
    done = fedimaging("report", plain_run[0])
    assert done.returncode == 0, done.stderr
    page = (plain_run[0] / "report.html").read_text()
    assert all(site in page for site in SITES)
    assert "chest_xray_fedavg" in page


def test_without_the_workspace_the_classes_are_not_authorized(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nvflare.cli", "simulator", str(JOB), "-w", str(tmp_path / "w"), "-n", "2", "-t", "2"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert "not authorized" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.pt"))


def test_a_job_that_asks_for_an_environment_variable_is_refused_by_the_sites(hospitals, tmp_path):
    job, workspace = tmp_path / "job", tmp_path / "w"
    shutil.copytree(JOB, job)
    config = job / "app/config/config_fed_client.json"
    config.write_text(config.read_text().replace('"effusion"', '"effusion", "{$FEDIMAGING_TEST_SECRET}"'))
    fedimaging("workspace", workspace, "--data", hospitals)
    subprocess.run(
        [sys.executable, "-m", "nvflare.cli", *simulator_command(job, workspace, SITES)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "FEDIMAGING_TEST_SECRET": "ghpA1b2C3d4"},
        capture_output=True, timeout=600, check=False,
    )  # fmt: skip
    _, *refusals, failed = records(workspace)
    assert {record["reason"] for record in refusals} == {"bad_setting"}
    assert (failed["event"], failed["round"]) == ("failed", 0)
    for path in (workspace / "server").rglob("*"):
        assert not path.is_file() or b"ghpA1b2C3d4" not in path.read_bytes()


def test_a_site_that_refuses_is_told_by_code_and_the_job_goes_on_with_the_others(without_one, tmp_path):
    done = fedimaging("simulate", JOB, "--data", without_one, "--workspace", tmp_path / "w", *NEAR_ZERO)
    assert done.returncode == 1
    assert "site hospital-c refused (unreadable_images)" in done.stderr
    _, refused, first, *_, end = records(tmp_path / "w")
    assert (refused["event"], refused["site"], refused["reason"]) == ("refused", "hospital-c", "unreadable_images")
    assert set(first["sites"]) == {"hospital-a", "hospital-b"}
    assert first["refused"] == {"hospital-c": "unreadable_images"}
    assert end["event"] == "end"
    server = (tmp_path / "w/server").rglob("*")
    assert not any(b".dcm" in path.read_bytes() for path in server if path.is_file())


def test_a_refusal_ends_a_job_that_needs_every_site(without_one, tmp_path):
    workspace = tmp_path / "w"
    done = fedimaging(
        "simulate", JOB, "--data", without_one, "--workspace", workspace, *NEAR_ZERO, "--set", "min_clients=3"
    )
    assert done.returncode == 1
    assert "site hospital-c refused (unreadable_images)" in done.stderr
    assert "the job ended after 0 of 1 rounds" in done.stderr
    assert "the full log is" in done.stderr
    assert "Traceback" not in done.stderr
    start, *refusals, failed = records(workspace)
    assert start["event"] == "start"
    assert refusals == [{"event": "refused", "round": 0, "site": "hospital-c", "reason": "unreadable_images"}]
    assert (failed["event"], failed["round"]) == ("failed", 0)
    assert "2 of the 3 sites needed" in failed["reason"]
    assert "report.html" in done.stderr


def test_a_federation_starts_from_an_earlier_model_that_the_operator_names(plain_run, hospitals, tmp_path):
    earlier = plain_run[0] / "server/simulate_job/app_server/best_FL_global_model.pt"
    changes = [
        "--set",
        "rounds=1",
        "--set",
        "training.max_batches=1",
        "--set",
        "min_clients=1",
        "--sites",
        "hospital-a",
    ]
    done = fedimaging(
        "simulate", JOB, "--data", hospitals, "--workspace", tmp_path / "w", *changes, "--start-from", earlier
    )
    assert done.returncode == 0, done.stderr
    start, first, *_ = records(tmp_path / "w")
    assert start["start_from"] == "best_FL_global_model.pt"
    _, *rounds, final, _ = records(plain_run[0])
    values = [record["sites"]["hospital-a"]["metrics"].get("auroc") for record in rounds]
    values.append(final["metrics"]["hospital-a"].get("auroc"))
    best = records(plain_run[0])[-1]["best_round"]
    assert first["sites"]["hospital-a"]["metrics"]["auroc"] == pytest.approx(values[best], abs=1e-6)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_ends_every_process(hospitals, tmp_path, sent):
    process = subprocess.Popen(
        [sys.executable, "-m", "fedimaging", "simulate", str(JOB), "--data", str(hospitals)],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        # A shell ignores SIGINT for what it runs in the background, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )  # fmt: skip
    progress = tmp_path / "runs/chest_xray_fedavg/hospital-a/simulate_job/progress.jsonl"
    deadline = time.monotonic() + 120
    while not progress.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert progress.exists()
    assert len(federation_processes(tmp_path)) >= 3
    process.send_signal(sent)
    try:
        _, said = process.communicate(timeout=30)
    finally:
        stop_process_tree(process.pid)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert federation_processes(tmp_path) == []


def mistake(capsys, *arguments):
    """Runs a command in this process. Returns the one line that it says of a mistake."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.strip().count("\n") == 0
    return said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "training.epoch=2"], "training.epoch: unknown setting"),
        (["--set", "training.learning_rate=-1"], "training.learning_rate"),
        (["--sites", "hospital-x"], "no site hospital-x"),
        (["--sites", "hospital-a"], "1 sites to train at, and the job needs 2"),
        (["--set", "dataset=mammography"], "mammography"),
        (["--set", "fedimaging=>=99"], "the job needs fedimaging >=99"),
        (["--set", "task.classes=normal,pneumonia"], "'consolidation' is not one of the job's"),
        (["--start-from", "no-such.pt"], "no such model file"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(hospitals, tmp_path, arguments, words, capsys):
    said = mistake(capsys, "simulate", JOB, "--data", hospitals, "--workspace", tmp_path / "w", *arguments)
    assert words in said
    assert not (tmp_path / "w/server").exists()


def test_a_folder_that_a_run_would_delete_is_refused(hospitals, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("three years of work")
    for command in (["workspace", tmp_path], ["simulate", JOB, "--workspace", tmp_path]):
        assert "not empty" in mistake(capsys, *command, "--data", hospitals)
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"


@pytest.mark.parametrize("command", [["simulate", JOB], ["workspace", "w"]])
def test_no_data_is_one_line_that_says_what_to_do(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert "data synth" in mistake(capsys, *command, "--data", tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["manifest", "image", "class", "duplicate", "patient", "outside", "split"])
def test_a_faulty_dataset_is_one_line_that_names_it(hospitals, tmp_path, capsys, fault):
    root = tmp_path / "data"
    shutil.copytree(hospitals, root, copy_function=os.link)
    path = root / "hospital-b" / "chest_xray" / "manifest.json"
    manifest = json.loads(path.read_text())
    first, second = manifest["training"][:2]
    if fault == "image":
        (path.parent / first["image"]).unlink()
    elif fault == "class":
        first["label"] = "fracture"
    elif fault == "duplicate":
        second["image"] = first["image"]
    elif fault == "patient":
        manifest["test"][0]["patient"] = first["patient"]
    elif fault == "outside":
        first["image"] = "../../hospital-a/chest_xray/manifest.json"
    elif fault == "split":
        manifest["validation"] = []
    path.unlink()
    if fault == "manifest":
        path.write_text("{")
    else:
        path.write_text(json.dumps(manifest))
    said = mistake(capsys, "simulate", JOB, "--data", root, "--workspace", tmp_path / "w")
    assert str(path) in said
    assert not (tmp_path / "w/server").exists()
