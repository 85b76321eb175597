"""The one class that a job's client configuration names."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FilterKey, FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.apis.utils.task_utils import get_filters
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor, ExecutionMode
from nvflare.client.config import ExchangeFormat
from nvflare.private.privacy_manager import PrivacyService, Scope

from fedimaging import __version__
from fedimaging.errors import FedImagingError, Reason
from fedimaging.federation.custody import KINDS, Custody, JobFacts, TaskInHand, unknown_task
from fedimaging.federation.gate import Gate, refusal
from fedimaging.federation.protocol import CLIENT_CONFIG, SIMULATED_JOB_ID
from fedimaging.federation.session import Session
from fedimaging.settings import ANY_VERSION, holds_placeholder
from fedimaging.training.declared import declare
from fedimaging.version import package_hash

_SCRIPT = Path(__file__).with_name("client_loop.py")


class TrainerExecutor(ClientAPIExecutor):
    """Trains and evaluates at a site by the pinned Client API loop; nothing in a job can name another script.

    The arguments are the job's settings (:class:`fedimaging.training.settings.JobSettings`). They are plain values,
    handed over in memory. A wrong one does no harm here: it is refused by name at the first task, and the server
    learns the code ``bad_setting``.
    """

    def __init__(  # noqa: PLR0917 (FLARE names them)
        self,
        dataset: str,
        task: dict[str, Any],
        network: dict[str, Any],
        training: dict[str, Any],
        seed: int,
        fedimaging: str = ANY_VERSION,
    ) -> None:
        super().__init__(
            execution_mode=ExecutionMode.IN_PROCESS,
            task_script_path=str(_SCRIPT),
            params_exchange_format=ExchangeFormat.RAW,
            server_expected_format=ExchangeFormat.RAW,
        )
        self.dataset, self.task, self.network, self.training, self.seed = dataset, task, network, training, seed
        self.fedimaging = fedimaging
        self._session: Session | None = None
        self._custody: Custody | None = None
        self._objection: str | None = None
        self._task_id: str | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            self._begin(fl_ctx)
            _share_cores(fl_ctx)
            self.log_info(fl_ctx, f"fedimaging {__version__} ({package_hash()}), {torch.get_num_threads()} CPU threads")
        elif event_type == EventType.BEFORE_SEND_TASK_RESULT and self._custody is not None:
            self._close_task(self._custody, fl_ctx)
        super().handle_event(event_type, fl_ctx)

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        session, custody = self._session, self._custody
        if session is None or custody is None:
            return refusal(Reason.INTERNAL)
        task = custody.open(task_name, shareable.get_header(AppConstants.CURRENT_ROUND))
        self._task_id = fl_ctx.get_prop(FLContextKey.TASK_ID)
        session.refusal = None
        try:
            self._admit(task_name, task, fl_ctx)
        except FedImagingError as error:
            session.refuse(error)
            task.close(f"refused: {error.reason.value}")
            return refusal(error.reason)

        def aborted() -> bool:
            task.check()
            return bool(abort_signal.triggered)

        session.aborted = aborted
        session.model_owner = str(shareable.get_header(AppConstants.MODEL_OWNER, ""))
        reply = super().execute(task_name, shareable, fl_ctx, abort_signal)
        task.entry.manifest = session.manifest_hash
        if session.refusal is not None:
            task.close(f"refused: {session.refusal.value}")
            return refusal(session.refusal)
        if abort_signal.triggered:
            task.close("aborted")
        return reply

    def _begin(self, fl_ctx: FLContext) -> None:
        """Makes ready for the job. Whatever is wrong with it, no task is worked on then."""
        self._session = Session.current = self._custody = Custody.current = None
        try:
            self._objection = _objection(deployed_config(fl_ctx, CLIENT_CONFIG))
            session = self._open_session(fl_ctx)
            workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
            self._custody = Custody.current = Custody(
                site=fl_ctx.get_identity_name(),
                folder=Path(workspace.get_root_dir()),
                local=Path(workspace.get_site_config_dir()),
                job=JobFacts.read(fl_ctx, self.dataset),
                declare=lambda: declare(session.settings),
                groups=session.groups,
            )
            self._session = Session.current = session
        except Exception as error:
            self.log_exception(fl_ctx, f"the job cannot be worked on: {error}")

    def _admit(self, task_name: str, task: TaskInHand, fl_ctx: FLContext) -> None:
        """Raises FedImagingError if this task may not be worked on: the site's word, before any data is touched."""
        if self._objection is not None:
            raise FedImagingError(self._objection, Reason.BAD_SETTING)
        if Session.current is not self._session:
            raise FedImagingError("another executor took this one's place", Reason.INTERNAL)
        if task_name not in KINDS:
            raise unknown_task()
        if not gate_is_last(task_name, fl_ctx):
            raise FedImagingError(
                "local/privacy.json: the last filter of results in the job's scope must be "
                "fedimaging.federation.gate.Gate, as delivered",
                Reason.NO_GATE,
            )
        task.ask()

    def _close_task(self, custody: Custody, fl_ctx: FLContext) -> None:
        """The ledger has a line for every task, also for one that FLARE answered before or after this executor."""
        if fl_ctx.get_prop(FLContextKey.TASK_ID) != self._task_id:
            custody.open(str(fl_ctx.get_prop(FLContextKey.TASK_NAME)), None)
        custody.close_unfinished("answered by FLARE with an error code")

    def _open_session(self, fl_ctx: FLContext) -> Session:
        workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        settings = {
            name: getattr(self, name) for name in ("dataset", "task", "network", "training", "seed", "fedimaging")
        }
        return Session(
            settings,
            site=fl_ctx.get_identity_name(),
            local=Path(workspace.get_site_config_dir()),
            run_dir=Path(workspace.get_run_dir(fl_ctx.get_job_id())),
        )


def gate_is_last(task_name: str, fl_ctx: FLContext) -> bool:
    """Whether the gate is the last filter of all that FLARE will run on the result of a task.

    FLARE's simulator reads ``local/privacy.json`` and does not apply it; here its scope is put where FLARE looks.
    """
    if fl_ctx.get_prop(FLContextKey.SIMULATE_MODE):
        fl_ctx.set_prop(FLContextKey.SCOPE_OBJECT, PrivacyService.get_scope(None), private=True, sticky=False)
    runner = fl_ctx.get_prop(FLContextKey.RUNNER)
    filters = get_filters(Scope.TASK_RESULT_FILTERS_NAME, fl_ctx, runner.task_result_filters, task_name, FilterKey.OUT)
    return bool(filters) and type(filters[-1]) is Gate


def _objection(config: Any) -> str | None:
    """What forbids to work on a job with this client configuration; None if nothing does.

    FLARE has replaced placeholders by now: only the deployed file still tells that a job asked for them.
    """
    if holds_placeholder(config):
        return "the job's configuration asks for environment variables"
    if config.get("components") or len(config.get("executors") or []) != 1:
        return "the job's configuration for sites holds more than one TrainerExecutor"
    if config.get("task_result_filters") or config.get("task_data_filters"):
        return "the job's configuration for sites declares filters of its own"
    return None


def deployed_config(fl_ctx: FLContext, name: str) -> Any:
    """A configuration file of the running job as it was deployed, before FLARE replaced anything in it."""
    workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
    return json.loads((Path(workspace.get_app_config_dir(fl_ctx.get_job_id())) / name).read_text())


def _share_cores(fl_ctx: FLContext) -> None:
    """Simulated sites are processes of one machine: each takes its share, unless OMP_NUM_THREADS says otherwise."""
    if fl_ctx.get_job_id() == SIMULATED_JOB_ID and "OMP_NUM_THREADS" not in os.environ:
        meta = fl_ctx.get_prop(FLContextKey.JOB_META) or {}
        sites = len(meta.get(JobMetaKey.JOB_CLIENTS) or []) or 1
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // sites))
