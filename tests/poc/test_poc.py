"""One POC of real processes: what breaks in it is survived as poc/README.md says, and nothing is left of it after."""

import json
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from fedimaging.datasets.site import resolve
from fedimaging.federation.job import CLIENT_FILE, SERVER_FILE, JobFolder
from fedimaging.governance.grants import config_hash
from fedimaging.governance.ledger import read_records
from fedimaging.training.loop import Site
from poc.cli import main
from tests.conftest import JOB, SITES
from tests.console import AdminConsole
from tests.poc.running import running_poc
from tests.rounds import assert_same_course, events, rounds

pytestmark = [pytest.mark.federation, pytest.mark.timeout(1500)]

PATIENCE = 800
"""seconds that a loaded machine may take for one step"""
SMALL = [
    "network.name=MobileNetV2", "task.image_size=32", "training.max_batches=1", "training.schedule=constant",
    "training.precision=float32", "training.optimizer=sgd", "training.learning_rate=0.01", "straggler_wait=5",
    "round_timeout=300",
]  # fmt: skip


def settings(*changes):
    return [part for change in (*SMALL, *changes) for part in ("--set", change)]


def wait_for(what, found, patience=PATIENCE):
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if result := found():
            return result
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {patience} s")


@pytest.fixture(scope="module")
def federation(tmp_path_factory, hospitals):
    """The POC, running. FLARE deems a site gone not a minute but seconds after it was reported dead."""
    folder = tmp_path_factory.mktemp("poc") / "federation"
    with running_poc(folder, hospitals, 8202, NVFLARE_DEAD_CLIENT_GRACE_PERIOD="10") as poc:
        yield poc


def run(poc, *arguments):
    return main([*arguments, "--folder", str(poc.folder)])


def job_process(poc, name, job_id):
    """The process of a job at the server or a site."""
    lines = {process: " ".join(process.cmdline()) for process in poc.processes()}
    return next(p for p, line in lines.items() if f"{poc.kits / name} " in line and job_id in line)


@pytest.fixture(scope="module")
def story(federation, hospitals):
    """A job through a killed site, a hanging one and a killed server, and the job that continues it."""
    poc = federation
    assert run(poc, "submit", str(JOB), *settings("rounds=200")) == 0
    first = poc.last_job
    log = poc.rounds_file(first).parent
    wait_for("the first round", lambda: rounds(log))

    # A site is killed in mid-round with all that it runs, so that nothing restarts it but `up`.
    seen = len(rounds(log))
    for process in poc.processes():
        if re.search(r"/hospital-b[/ ]", " ".join(process.cmdline()) + " "):
            process.send_signal(signal.SIGKILL)
    without_b = wait_for(
        "a round without b", lambda: next((r for r in rounds(log)[seen:] if "hospital-b" in r["missing"]), None)
    )
    assert run(poc, "status") == 1
    assert run(poc, "up", "--data", str(hospitals)) == 0
    back = wait_for(
        "b in a later round",
        lambda: next((r for r in rounds(log) if r["round"] > without_b["round"] and "hospital-b" in r["sites"]), None),
    )

    # A site hangs past the deadline.
    hanging = job_process(poc, "hospital-c", first)
    seen = len(rounds(log))
    hanging.send_signal(signal.SIGSTOP)
    without_c = wait_for(
        "a round without c", lambda: next((r for r in rounds(log)[seen:] if "hospital-c" in r["missing"]), None)
    )
    hanging.send_signal(signal.SIGCONT)
    again = wait_for(
        "c in a later round",
        lambda: next((r for r in rounds(log) if r["round"] > without_c["round"] and "hospital-c" in r["sites"]), None),
    )

    # The server is killed; its own script starts it again.
    server, job = poc.running()[poc.server], job_process(poc, poc.server, first)
    before = rounds(log)
    for process in (server, job):
        process.send_signal(signal.SIGKILL)
    wait_for("the server", lambda: poc.server in poc.running() and poc.running()[poc.server].pid != server.pid)
    wait_for("the sites", lambda: sites_are_back(poc))
    status = wait_for("the job's end", lambda: finished(poc, first))

    total = max(r["round"] for r in before) + 3
    assert run(poc, "submit", str(JOB), *settings(f"rounds={total}"), "--resume", first) == 0
    second = poc.last_job
    code = run(poc, "result", second)
    return {
        "first": first, "second": second, "before": before, "total": total, "code": code, "status": status,
        "without_b": without_b, "back": back, "without_c": without_c, "again": again,
        "earlier": poc.download(first), "later": poc.results / second,
    }  # fmt: skip


def server_folder(download):
    return next(download.rglob("rounds.jsonl")).parent


def sites_are_back(poc):
    try:
        return not poc._unregistered()
    except Exception:
        return False


def finished(poc, job_id):
    try:
        status = poc.status_of(job_id)
    except Exception:
        return None
    return status if status.startswith("FINISHED") else None


def test_a_killed_and_a_hanging_site_miss_their_round_and_take_part_in_a_later_one(story):
    for missed, site in ((story["without_b"], "hospital-b"), (story["without_c"], "hospital-c")):
        assert site not in missed["sites"]
        assert len(missed["sites"]) >= 2, "never fewer than min_clients are averaged"
    assert "hospital-b" in story["back"]["sites"]
    assert "hospital-c" in story["again"]["sites"]


def test_a_killed_server_s_job_is_closed_and_continued_without_losing_a_round(story):
    assert story["status"] == "FINISHED:ABNORMAL"
    assert story["code"] == 0
    log = server_folder(story["later"])
    recorded = rounds(log)
    assert [r["round"] for r in recorded] == list(range(story["total"]))
    kept = len(story["before"])
    assert recorded[:kept] == story["before"]
    start = next(event for event in events(log) if event["event"] == "start")
    assert (start["continues"], start["rounds"]) == (story["first"], story["total"])
    assert start["start_round"] >= kept
    page = (story["later"] / "report.html").read_text()
    assert story["first"] in page
    assert "missing" in page


def test_the_global_model_is_what_the_recorded_participants_average_makes_it(story, hospitals, federation, tmp_path):
    log = server_folder(story["later"])
    start = next(event for event in events(log) if event["event"] == "start")
    job = JobFolder(federation.folder / "submitted" / "chest_xray_fedavg").settings()
    entry = {"chest_xray": {"path": str(hospitals / "{site}" / "chest_xray")}}
    (tmp_path / "datasets.yml").write_text(json.dumps(entry))
    sites = {name: Site(job, resolve("chest_xray", name, tmp_path)) for name in SITES}
    model = next(story["earlier"].rglob("FL_global_model.pt"))
    state = before = torch.load(model, weights_only=True)["model"]
    for record in rounds(log)[start["start_round"] :]:
        results = {name: sites[name].train(state, record["round"], story["total"]) for name in record["sites"]}
        assert {n: r.cases for n, r in results.items()} == {n: s["cases"] for n, s in record["sites"].items()}
        whole = sum(result.cases for result in results.values())
        state = {key: sum(result.state[key] * (result.cases / whole) for result in results.values()) for key in state}
    final = torch.load(next(story["later"].rglob("FL_global_model.pt")), weights_only=True)["model"]
    assert final.keys() == state.keys()

    def distance(one, other):
        return sum(((one[key] - other[key]) ** 2).sum() for key in state) ** 0.5

    # Plain SGD, so that float32 sums in another order stay as small as they are: far below what the rounds changed.
    assert distance(final, state) < 0.01 * distance(final, before)


@pytest.fixture(scope="module")
def unchanged(story, federation):
    """The server's folder of the committed job, and the id that it ran under."""
    assert run(federation, "submit", str(JOB)) == 0
    job_id = federation.last_job
    assert run(federation, "result", job_id) == 0
    return server_folder(federation.results / job_id), job_id


def test_the_committed_job_learns_what_it_learns_in_the_simulator(unchanged, plain_run):
    assert_same_course(unchanged[0], plain_run[0] / "server/simulate_job")


def test_what_ran_has_the_hash_of_the_committed_configuration(unchanged, federation):
    folder, job_id = unchanged
    deployed = folder / "app_server" / Path(SERVER_FILE).relative_to("app")
    assert config_hash(deployed.read_bytes()) == config_hash((JOB / SERVER_FILE).read_bytes())
    for site in SITES:
        worked_on = [line for line in read_records(federation.kits / site) if line["job_id"] == job_id]
        assert {line["config"] for line in worked_on} == {config_hash((JOB / CLIENT_FILE).read_bytes())}


def test_the_admin_console_drives_a_job_that_goes_on_when_its_process_at_a_site_fails(story, federation):
    poc = federation
    job = poc.folder / "submitted" / "chest_xray_fedavg"
    folder = JobFolder(job)
    # No round ends by waiting: one without c ends because c is deemed gone, and later ones do not ask it.
    folder.override({"rounds": 200, "continues": "", "straggler_wait": 3600, "round_timeout": 3600})
    folder.write(poc.folder / "by_console")
    with AdminConsole(poc.kit("lead"), poc.kit("lead").name, environment=poc.environment()) as console:
        said = console.send(f"submit_job {poc.folder / 'by_console'}")
        job_id = next(word.strip(".") for word in said.split() if word.count("-") == 4)
        log = poc.rounds_file(job_id).parent
        wait_for("the first round", lambda: rounds(log))
        # What the kernel does where memory runs out. The site itself goes on, and says that the process failed.
        job_process(poc, "hospital-c", job_id).send_signal(signal.SIGKILL)
        wait_for("two rounds without c", lambda: [r["missing"] for r in rounds(log)[-2:]] == [["hospital-c"]] * 2)
        assert re.search(rf"{job_id}.*RUNNING", console.send("list_jobs"))
        console.send(f"abort_job {job_id}")
        assert wait_for("the abort", lambda: finished(poc, job_id)) == "FINISHED:ABORTED"
        assert job_id in console.send(f"download_job {job_id}")
    downloaded = poc.kit("lead") / "transfer" / job_id
    assert rounds(server_folder(downloaded))
    assert run(poc, "result", job_id) == 1, "an aborted job is no success"


def test_what_is_wrong_is_told_in_one_line(story, federation, hospitals, tmp_path, capfd):
    def said(*arguments):
        capfd.readouterr()
        assert main(list(arguments)) == 2
        return capfd.readouterr().err.strip().splitlines()[-1]

    here = ["--folder", str(federation.folder)]
    assert "no POC runs" in said("submit", str(JOB), "--folder", str(tmp_path / "none"))
    assert "knows no job" in said("result", "5f0c1b0e-6a2f-4f0c-9f39-000000000001", *here)
    assert "no such file" in said("submit", str(tmp_path), *here)
    assert "min_clients" in said("submit", str(JOB), "--set", "min_clients=1", *here)
    assert "other data" in said("up", "--data", str(tmp_path), *here)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        elsewhere = ["--folder", str(tmp_path / "b"), "--data", str(hospitals), "--port", port]
        assert f"port {port} is taken" in said("up", *elsewhere)


def test_the_console_s_shutdown_and_down_leave_no_process(story, federation):
    poc = federation
    admin = poc.kit("project_admin")
    with AdminConsole(admin, admin.name, environment=poc.environment()) as console:
        console.send("shutdown client", timeout=PATIENCE)
        wait_for("the sites' end", lambda: set(poc.running()) == {poc.server})
    assert run(poc, "down") == 0
    assert poc.processes() == []
    own = Path.home() / ".nvflare" / "config.conf"
    assert not own.exists() or str(poc.folder) not in own.read_text(), "the user's own configuration is left alone"
