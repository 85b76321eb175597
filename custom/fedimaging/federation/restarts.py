"""What FLARE alone does not mend: a site that came back is not in its jobs any more, a killed server's jobs run for
ever, and a job ends for all when its process at one site fails.
"""

import threading
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
_OWN_FAULT = (JobReturnCode.EXCEPTION, JobReturnCode.CONFIG_ERROR, JobReturnCode.INFRASTRUCTURE_ERROR)
"""how a site says that its process of a job ended by an error of its own, by a signal too; a class that is not on its
allow-list is the job's fault"""


class Restarts(FLComponent):
    """A component of the server's main process (``local/resources.json``), not of jobs.

    Running jobs are deployed and started anew at a participant that registered again. The site checks a job as it did
    the first time: its authorization, allow-list and resources have the same say. The job's process at the server
    learns of the new registration by asking, see ``FederatedAveraging``.

    Jobs that ran when the server was killed are marked as finished abnormally when it starts again, and what they left
    is archived, so that it can be downloaded and continued.

    A job goes on when a site says that its process of it failed, which FLARE takes for the end of the whole job: the
    site is then reported to the job as dead, and whether a round counts without it is decided by the job's quorum.
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
        own_fault = said.get(JobFailureMsgKey.CODE) in _OWN_FAULT
        if own_fault:
            report.payload = {**said, JobFailureMsgKey.CODE: JobReturnCode.UNKNOWN}
        reply: Message = server.process_job_failure(report)
        token, job_id = report.get_header(CellMessageHeaderKeys.TOKEN), str(said.get(JobFailureMsgKey.JOB_ID))
        process = server.engine.run_processes.get(job_id) or {}
        client = (process.get(RunProcessKey.PARTICIPANTS) or {}).get(token)
        if own_fault and client is not None and reply.get_header(MessageHeaderKey.RETURN_CODE) == CellReturnCode.OK:
            self.logger.error(f"the process of job {job_id} at site {client.name} failed; the job goes on without it")
            self._failed.add((job_id, token))
            server.engine.notify_dead_job(job_id, client.name, "its process failed")
        return reply

    def _welcome(self, fl_ctx: FLContext) -> None:
        peer, engine = fl_ctx.get_peer_context(), fl_ctx.get_engine()
        client = engine.get_client_from_name(peer.get_identity_name()) if peer else None
        if client is None:
            return
        for job_id, process in list(engine.run_processes.items()):
            if (job_id, client.token) in self._failed:
                # Said again with each heartbeat: before a job's first round nobody there hears it.
                engine.notify_dead_job(job_id, client.name, "its process failed")
            participants: dict[str, Client] = process.get(RunProcessKey.PARTICIPANTS) or {}
            if client.token in participants or client.name not in {c.name for c in participants.values()}:
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
        participants: dict[str, Client] = engine.run_processes[job.job_id][RunProcessKey.PARTICIPANTS]
        others = {key: other for key, other in participants.items() if other.name != name}
        participants = {**others, client.token: client}
        engine.run_processes[job.job_id][RunProcessKey.PARTICIPANTS] = participants
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
