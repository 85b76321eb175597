"""What a site keeps of a job that is deployed there anew, and what becomes of a job that failed at one site."""

import contextlib
import io
import logging
import types
import zipfile
from unittest.mock import MagicMock

import pytest
from nvflare.apis.client import Client
from nvflare.apis.fl_constant import RunProcessKey, SystemComponents
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobReturnCode
from nvflare.apis.workspace import Workspace
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.utils.class_utils import instantiate_class
from nvflare.private.defs import CellMessageHeaderKeys, JobFailureMsgKey, new_cell_message
from nvflare.private.fed.server.fed_server import FederatedServer

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


@pytest.fixture
def server():
    """What FLARE's own handler of failure reports needs of a server, on which one site runs the job "one"."""
    site = Client("hospital-a", "token")
    jobs = {"one": {RunProcessKey.PARTICIPANTS: {site.token: site}}}
    clients = MagicMock(clients={site.token: site}, is_from_authorized_client=lambda token: token == site.token)
    engine = MagicMock(run_processes=jobs, new_context=lambda: contextlib.nullcontext(FLContext()))
    server = types.SimpleNamespace(logger=logging.getLogger("server"), client_manager=clients, engine=engine)
    server.process_job_failure = types.MethodType(FederatedServer.process_job_failure, server)
    return server


def report(server, code, token="token"):
    payload = {JobFailureMsgKey.JOB_ID: "one", JobFailureMsgKey.CODE: code, JobFailureMsgKey.REASON: "why"}
    message = new_cell_message({CellMessageHeaderKeys.TOKEN: token}, payload)
    return Restarts()._on_failure_report(message, server).get_header(MessageHeaderKey.RETURN_CODE)


@pytest.mark.parametrize("name", ["EXCEPTION", "CONFIG_ERROR", "INFRASTRUCTURE_ERROR"])
def test_a_job_that_failed_at_one_site_goes_on_without_it(server, name):
    assert report(server, getattr(JobReturnCode, name)) == ReturnCode.OK
    runner = server.engine.job_runner
    runner.fail_run.assert_not_called()
    runner.stop_run.assert_not_called()
    runner.resolve_client_outcome.assert_called_once_with("one", "hospital-a")
    assert server.engine.notify_dead_job.call_args.args[:2] == ("one", "hospital-a")


def test_a_class_that_a_site_does_not_allow_still_ends_the_job(server):
    assert report(server, JobReturnCode.UNSAFE_COMPONENT) == ReturnCode.OK
    assert server.engine.job_runner.stop_run.call_args.args[0] == "one"
    server.engine.notify_dead_job.assert_not_called()


def test_nobody_else_can_say_that_a_site_failed(server):
    assert report(server, JobReturnCode.EXCEPTION, token="other") == ReturnCode.UNAUTHENTICATED
    server.engine.notify_dead_job.assert_not_called()


def test_a_job_that_ended_well_is_nobody_s_failure(server):
    assert report(server, JobReturnCode.SUCCESS) == ReturnCode.OK
    server.engine.job_runner.fail_run.assert_not_called()
    server.engine.notify_dead_job.assert_not_called()
