"""What FLARE alone does not mend: a site that came back is not in its jobs any more, a killed server's jobs run for
ever, and a job ends for all when its process at one site fails.
"""

import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import RunProcessKey, SystemComponents
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import ALL_SITES, Job, JobMetaKey, RunStatus
from nvflare.apis.job_launcher_spec import JobReturnCode
from nvflare.apis.job_scheduler_spec import DispatchInfo
from nvflare.apis.workspace import Workspace
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.cellnet.defs import ReturnCode as CellReturnCode
from nvflare.fuel.f3.message import Message
from nvflare.private.admin_defs import MsgHeader, ReturnCode
from nvflare.private.defs import CellChannel, CellChannelTopic, CellMessageHeaderKeys, JobFailureMsgKey
from nvflare.private.fed.server.job_runner import JobRunner
from nvflare.private.fed.utils.app_deployer import AppDeployer
from nvflare.private.fed.utils.fed_utils import extract_participants
from nvflare.security.logging import secure_format_exception
from nvflare.utils.job_launcher_utils import get_resource_manager_spec

from fedimaging.federation.protocol import STRATEGY_FILE

_REPLY_SECONDS = 60.0
_FAILED = "its process failed"
_OWN_FAULT = (JobReturnCode.EXCEPTION, JobReturnCode.CONFIG_ERROR, JobReturnCode.INFRASTRUCTURE_ERROR)
"""how a site says that its process of a job ended by an error of its own, by a signal too where FLARE starts jobs as
processes (its Kubernetes launcher calls a killed pod aborted); a class off its allow-list is the job's fault"""


class Restarts(FLComponent):
    """A component of the server's main process (``local/resources.json``), not of jobs.

    Running jobs are deployed and started anew at a participant that registered again. The site checks a job as it did
    the first time: its authorization, allow-list and resources have the same say. The job's process at the server
    learns of the new registration by asking, see ``FederatedAveraging``.

    Jobs that ran when the server was killed are marked as finished abnormally when it starts again, and what they left
    is archived, so that it can be downloaded and continued.

    A job goes on when a site says that its process of it failed, which FLARE takes for the end of the whole job: the
    site is then reported to the job as dead. Where the job needs more sites than are left it ends at once, as FLARE has
    it: a fault of the job itself fails at every site.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._handled: set[tuple[str, str]] = set()
        self._failed: set[tuple[str, str]] = set()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.SYSTEM_START:
            self._close_killed_jobs(fl_ctx)
            server = fl_ctx.get_engine().server
            server.cell.register_request_cb(
                channel=CellChannel.SERVER_MAIN,
                topic=CellChannelTopic.REPORT_JOB_FAILURE,
                cb=self._on_failure_report,
                server=server,
            )
        elif event_type == EventType.CLIENT_HEARTBEAT_PROCESSED:
            # A site's first heartbeat says that it listens; at its registration it does not yet.
            self._welcome(fl_ctx)

    def _close_killed_jobs(self, fl_ctx: FLContext) -> None:
        engine = fl_ctx.get_engine()
        jobs = engine.get_component(SystemComponents.JOB_MANAGER)
        for job in jobs.get_jobs_by_status([RunStatus.RUNNING, RunStatus.DISPATCHED], fl_ctx):
            try:
                engine.job_runner._save_workspace(fl_ctx, job_id=job.job_id)
            except Exception as error:
                self.log_error(fl_ctx, f"job {job.job_id} is not archived: {secure_format_exception(error)}")
            jobs.set_status(job.job_id, RunStatus.FINISHED_ABNORMAL, fl_ctx)
            self.log_warning(fl_ctx, f"job {job.job_id} was running when the server stopped; another can continue it")

    def _on_failure_report(self, report: Message, server: Any) -> Message:
        """In place of FLARE's ``FederatedServer.process_job_failure``, which still checks who reports, and answers."""
        said: dict[str, Any] = report.payload if isinstance(report.payload, dict) else {}
        job_id, token = str(said.get(JobFailureMsgKey.JOB_ID)), report.get_header(CellMessageHeaderKeys.TOKEN)
        client, names = server.client_manager.clients.get(token), _names(server.engine, job_id)
        # By name: under a new registration it is a participant only when the job was started anew there.
        own_fault = said.get(JobFailureMsgKey.CODE) in _OWN_FAULT and client is not None and client.name in names
        goes_on = own_fault and self._goes_on_without(client, job_id, server.engine)
        if goes_on:
            report.payload = {**said, JobFailureMsgKey.CODE: JobReturnCode.UNKNOWN}
        reply: Message = server.process_job_failure(report)
        if own_fault and reply.get_header(MessageHeaderKey.RETURN_CODE) == CellReturnCode.OK:
            then = "the job goes on without it" if goes_on else "the job needs more sites than are left"
            self.logger.error(f"the process of job {job_id} at site {client.name} failed; {then}")
            server.engine.notify_dead_job(job_id, client.name, _FAILED)
        return reply

    def _goes_on_without(self, client: Client, job_id: str, engine: Any) -> bool:
        """Notes that the job's process at a site failed. Returns whether the job has as many others as it needs."""
        with self._lock:
            self._failed.add((job_id, client.token))
            failed = {token for failed_id, token in self._failed if failed_id == job_id}
            left = _names(engine, job_id, without=failed) - {client.name}
        job = engine.job_runner.running_jobs.get(job_id)
        return job is not None and len(left) >= job.min_sites and left >= set(job.required_sites)

    def _welcome(self, fl_ctx: FLContext) -> None:
        peer, engine = fl_ctx.get_peer_context(), fl_ctx.get_engine()
        client = engine.get_client_from_name(peer.get_identity_name()) if peer else None
        if client is None:
            return
        for job_id, process in list(engine.run_processes.items()):
            heard_of = engine.server._job_reported_clients.get(job_id, ())
            if (job_id, client.token) in self._failed and client.token not in heard_of:
                # With each heartbeat, as FLARE does it for a site that it once saw running the job: before a job's
                # first round nobody there hears it.
                engine.notify_dead_job(job_id, client.name, _FAILED)
            participants: dict[str, Client] = process.get(RunProcessKey.PARTICIPANTS) or {}
            if client.token in participants or client.name not in _names(engine, job_id):
                continue
            with self._lock:
                fresh = (job_id, client.token) not in self._handled
                self._handled.add((job_id, client.token))
            if fresh:
                threading.Thread(target=self._restart, args=(engine, job_id, client), daemon=True).start()

    def _restart(self, engine: Any, job_id: str, client: Client) -> None:
        with engine.new_context() as fl_ctx:
            try:
                self._start(engine, engine.job_runner.running_jobs[job_id], client, fl_ctx)
                self.log_info(fl_ctx, f"site {client.name} came back and takes part in job {job_id} again")
            except Exception as error:
                reason = secure_format_exception(error)
                self.log_error(fl_ctx, f"site {client.name} came back but not to job {job_id}: {reason}")

    def _start(self, engine: Any, job: Job, client: Client, fl_ctx: FLContext) -> None:
        name, app = client.name, _app_of(job, client.name)
        needs = get_resource_manager_spec(job.meta, name)
        enough, token = engine.check_client_resources(job, {name: needs}, fl_ctx).get(name, (False, "no reply"))
        if not enough:
            raise RuntimeError(f"no resources: {token}")
        message = JobRunner._make_deploy_message(job, job.get_application(app, fl_ctx), app, fl_ctx)
        _check(engine.server.admin_server.send_requests_and_get_reply_dict({client.token: message}, _REPLY_SECONDS))
        # Before the start: the site's job asks the server's for a task at once.
        with self._lock:
            participants: dict[str, Client] = engine.run_processes[job.job_id][RunProcessKey.PARTICIPANTS]
            others = {key: other for key, other in participants.items() if other.name != name}
            participants = {**others, client.token: client}
            engine.run_processes[job.job_id][RunProcessKey.PARTICIPANTS] = participants
            self._failed.discard((job.job_id, client.token))
            job.meta[JobMetaKey.JOB_CLIENTS] = [participant.to_dict() for participant in participants.values()]
        replies = engine.start_client_job(job, {name: DispatchInfo(app, needs, token)}, fl_ctx)
        _check({reply.client_token: reply.reply for reply in replies})


class KeepingDeployer(AppDeployer):
    """A component of a site's main process: deploys jobs as FLARE does, which empties the job's run directory first.

    A job that is deployed anew, because the site came back, finds again what its strategy keeps at the site.
    """

    def deploy(  # noqa: PLR0917 (FLARE's signature)
        self,
        workspace: Workspace,
        job_id: str,
        job_meta: dict[str, Any],
        app_name: str,
        app_data: bytes,
        fl_ctx: FLContext,
    ) -> str:
        run_dir = Path(workspace.get_run_dir(job_id))
        kept, aside = run_dir / STRATEGY_FILE, run_dir.with_name(f".{job_id}.{STRATEGY_FILE}")
        if kept.exists():
            kept.replace(aside)
        fault = str(super().deploy(workspace, job_id, job_meta, app_name, app_data, fl_ctx) or "")
        if aside.exists() and not fault:
            aside.replace(kept)
        return fault


def _names(engine: Any, job_id: str, without: Collection[str] = ()) -> set[str]:
    """The sites of a running job by name, without those of some tokens; none if it does not run."""
    participants = (engine.run_processes.get(job_id) or {}).get(RunProcessKey.PARTICIPANTS) or {}
    return {client.name for token, client in participants.items() if token not in without}


def _app_of(job: Job, site: str) -> str:
    for app, deployments in job.get_deployment().items():
        sites = extract_participants(deployments)
        if site in sites or ALL_SITES in (name.upper() for name in sites):
            return str(app)
    raise RuntimeError("the job is not deployed to this site")


def _check(replies: dict[str, Any]) -> None:
    for reply in replies.values():
        if reply is None:
            raise RuntimeError("no reply")
        if reply.get_header(MsgHeader.RETURN_CODE, ReturnCode.OK) != ReturnCode.OK:
            raise RuntimeError(str(reply.body))
