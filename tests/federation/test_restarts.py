"""What a site keeps of a job that is deployed there anew, and what becomes of a job that failed at one site."""

import contextlib
import io
import logging
import threading
import time
import types
import zipfile
from unittest.mock import MagicMock

import pytest
from nvflare.apis.client import Client
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReservedKey, RunProcessKey, SystemComponents
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import job_from_meta
from nvflare.apis.job_launcher_spec import JobReturnCode
from nvflare.apis.workspace import Workspace
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.utils.class_utils import instantiate_class
from nvflare.private.defs import CellMessageHeaderKeys, JobFailureMsgKey, new_cell_message
from nvflare.private.fed.server.fed_server import FederatedServer
from nvflare.private.fed.server.job_runner import JobRunner

from fedimaging.federation.policy import client_resources
from fedimaging.federation.restarts import Restarts


def test_a_job_deployed_anew_finds_what_its_strategy_kept_and_nothing_else(tmp_path):
    for name in ("startup", "local"):
        (tmp_path / name).mkdir()
    workspace = Workspace(str(tmp_path), "hospital-a")
    (component,) = (c for c in client_resources()["components"] if c["id"] == SystemComponents.APP_DEPLOYER)
    deployer = instantiate_class(component["path"], component["args"])
    app = io.BytesIO()
    with zipfile.ZipFile(app, "w") as file:
        file.writestr("config/config_fed_client.json", "{}")

    def deploy(job):
        return deployer.deploy(workspace, job, {"name": "x"}, "app", app.getvalue(), FLContext())

    assert deploy("one") == ""
    run = tmp_path / "one"
    (run / "strategy.pt").write_text("kept")
    (run / "strategy.pt").chmod(0o600)
    (run / "left.txt").write_text("from before")
    assert deploy("two") == deploy("one") == ""
    assert (run / "strategy.pt").read_text() == "kept"
    assert (run / "strategy.pt").stat().st_mode & 0o777 == 0o600
    assert not (run / "left.txt").exists(), "the rest is FLARE's to empty"
    assert (run / "app_hospital-a/config/config_fed_client.json").exists()
    assert not (tmp_path / "two/strategy.pt").exists()
    assert not list(tmp_path.glob(".*"))


SITES = [Client(f"hospital-{letter}", f"token-{letter}") for letter in "abc"]


@pytest.fixture
def restarts():
    return Restarts()


@pytest.fixture
def server(monkeypatch):
    """What FLARE's own handlers need of a server, on which three sites run the job "one", which needs two of them."""
    clients = {site.token: site for site in SITES} | {"token-z": Client("hospital-z", "token-z")}
    jobs = {"one": {RunProcessKey.PARTICIPANTS: {site.token: site for site in SITES}}}
    manager = MagicMock(clients=clients, is_from_authorized_client=clients.__contains__)
    engine = MagicMock(run_processes=jobs, new_context=lambda: contextlib.nullcontext(FLContext()))
    engine.get_client_from_name = {site.name: site for site in clients.values()}.get
    engine.job_runner.running_jobs = {"one": job_from_meta({"job_id": "one", "min_clients": 2})}
    pending = {site.name for site in SITES}
    engine.job_runner.is_client_outcome_pending = lambda job_id, name: job_id == "one" and name in pending
    engine.job_runner.resolve_client_outcome.side_effect = lambda job_id, name: pending.discard(name)
    server = types.SimpleNamespace(logger=logging.getLogger("server"), client_manager=manager, engine=engine)
    server.process_job_failure = types.MethodType(FederatedServer.process_job_failure, server)
    server._job_reported_clients = {}
    # What it takes to start a job anew at a site: the site always agrees.
    monkeypatch.setattr(JobRunner, "_make_deploy_message", lambda *_: None)
    engine.check_client_resources = lambda job, needs, fl_ctx: dict.fromkeys(needs, (True, "reserved"))
    server.admin_server = MagicMock(send_requests_and_get_reply_dict=lambda *_: {})
    engine.start_client_job.return_value = []
    engine.server = server
    return server


def report(restarts, server, code, site="a"):
    """A site's report of how its process of the job ended. Returns FLARE's answer."""
    payload = {JobFailureMsgKey.JOB_ID: "one", JobFailureMsgKey.CODE: code, JobFailureMsgKey.REASON: "why"}
    message = new_cell_message({CellMessageHeaderKeys.TOKEN: f"token-{site}"}, payload)
    return restarts._on_failure_report(message, server).get_header(MessageHeaderKey.RETURN_CODE)


def heartbeat(restarts, server, name):
    peer = FLContext()
    peer.set_prop(ReservedKey.IDENTITY_NAME, name)
    fl_ctx = MagicMock(get_peer_context=lambda: peer, get_engine=lambda: server.engine)
    restarts.handle_event(EventType.CLIENT_HEARTBEAT_PROCESSED, fl_ctx)


def told(server):
    """Which sites the job was told to be dead."""
    return [call.args[1] for call in server.engine.notify_dead_job.call_args_list]


@pytest.mark.parametrize("name", ["EXCEPTION", "CONFIG_ERROR", "INFRASTRUCTURE_ERROR"])
def test_a_job_that_failed_at_one_site_goes_on_without_it(restarts, server, name):
    assert report(restarts, server, getattr(JobReturnCode, name)) == ReturnCode.OK
    runner = server.engine.job_runner
    runner.fail_run.assert_not_called()
    runner.stop_run.assert_not_called()
    runner.resolve_client_outcome.assert_called_once_with("one", "hospital-a")
    assert told(server) == ["hospital-a"]


@pytest.mark.parametrize(
    ("needs", "failed"),
    [
        ({"min_clients": 2}, "ba"),
        ({"min_clients": 3}, "a"),
        ({"min_clients": 2, "mandatory_clients": ["hospital-a"]}, "a"),
    ],
    ids=["two sites", "all sites", "this site"],
)
def test_a_job_that_needs_more_sites_than_are_left_ends_at_once(restarts, server, needs, failed, caplog):
    server.engine.job_runner.running_jobs["one"] = job_from_meta({"job_id": "one", **needs})
    for site in failed:
        server.engine.job_runner.fail_run.assert_not_called()
        report(restarts, server, JobReturnCode.CONFIG_ERROR, site)
    assert server.engine.job_runner.fail_run.call_args.args[:2] == ("one", JobReturnCode.EXCEPTION)
    assert "at site hospital-a failed; the job needs more sites than are left" in caplog.text


@pytest.mark.parametrize("said_by", ["b", "new"])
def test_a_site_whose_job_is_started_anew_counts_as_one_that_is_left(restarts, server, said_by):
    back = Client("hospital-b", "token-new")
    server.client_manager.clients[back.token] = back
    report(restarts, server, JobReturnCode.EXCEPTION, said_by)
    start_anew(restarts, server, back)
    report(restarts, server, JobReturnCode.EXCEPTION, "a")
    server.engine.job_runner.fail_run.assert_not_called()


@pytest.mark.parametrize(
    ("code", "site"),
    [(JobReturnCode.EXCEPTION, "unknown"), (JobReturnCode.EXCEPTION, "z"), (JobReturnCode.SUCCESS, "a")],
    ids=["a token that nobody has", "a site that is not in the job", "a process that ended well"],
)
def test_what_is_no_failure_of_a_site_of_the_job_changes_nothing(restarts, server, code, site):
    assert report(restarts, server, code, site) == (ReturnCode.UNAUTHENTICATED if site == "unknown" else ReturnCode.OK)
    server.engine.job_runner.fail_run.assert_not_called()
    assert told(server) == []


def test_a_class_that_a_site_does_not_allow_still_ends_the_job(restarts, server):
    assert report(restarts, server, JobReturnCode.UNSAFE_COMPONENT) == ReturnCode.OK
    assert server.engine.job_runner.stop_run.call_args.args[0] == "one"
    assert told(server) == []


def test_a_process_started_anew_that_fails_again_is_told_to_the_job(restarts, server):
    """FLARE waits for one outcome of a site, and drops what comes after it."""
    server.engine.job_runner.resolve_client_outcome("one", "hospital-a")
    assert report(restarts, server, JobReturnCode.EXCEPTION) == ReturnCode.OK
    server.engine.job_runner.fail_run.assert_not_called()
    assert told(server) == ["hospital-a"]


def test_a_failed_process_is_told_again_until_flare_does_so(restarts, server):
    report(restarts, server, JobReturnCode.EXCEPTION)
    server.engine.notify_dead_job.reset_mock()
    for _ in range(2):
        heartbeat(restarts, server, "hospital-a")
        heartbeat(restarts, server, "hospital-b")
    assert told(server) == ["hospital-a"] * 2
    server._job_reported_clients["one"] = {"token-a"}
    heartbeat(restarts, server, "hospital-a")
    assert told(server) == ["hospital-a"] * 2


def test_a_failed_site_that_registered_again_takes_part_again(restarts, server, monkeypatch):
    report(restarts, server, JobReturnCode.EXCEPTION)
    server.engine.notify_dead_job.reset_mock()
    back = Client("hospital-a", "new")
    server.engine.get_client_from_name = {"hospital-a": back}.get
    started = []
    monkeypatch.setattr(restarts, "_restart", lambda engine, job_id, client: started.append((job_id, client)))
    monkeypatch.setattr("threading.Thread.start", lambda thread: thread.run())
    for _ in range(2):
        heartbeat(restarts, server, "hospital-a")
    assert started == [("one", back)]
    assert told(server) == []


def start_anew(restarts, server, client):
    """Has a site's job deployed and started anew, as it is when the site came back under a new token."""
    job = MagicMock(job_id="one", meta={}, get_deployment=lambda: {"app": ["@ALL"]})
    restarts._start(server.engine, job, client, FLContext())


def test_sites_that_come_back_at_once_are_all_taken_over(restarts, server):
    back = [Client(site.name, f"new-{site.name}") for site in SITES]

    class Slow(dict):
        """Participants that are read slowly, so that a change between reading and writing them would be lost."""

        def items(self):
            time.sleep(0.05)
            return super().items()

    server.engine.run_processes["one"][RunProcessKey.PARTICIPANTS] = Slow({site.token: site for site in SITES})
    threads = [threading.Thread(target=start_anew, args=(restarts, server, client)) for client in back]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(server.engine.run_processes["one"][RunProcessKey.PARTICIPANTS]) == {site.token for site in back}
