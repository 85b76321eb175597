"""The one class that a job's client configuration names."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor, ExecutionMode
from nvflare.client.config import ExchangeFormat

from fedimaging import __version__
from fedimaging.errors import Reason
from fedimaging.federation.protocol import REASON_HEADER, SIMULATED_JOB_ID
from fedimaging.federation.session import Session
from fedimaging.settings import ANY_VERSION, holds_placeholder
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
        self._placeholder = False

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            self._session = Session.current = self._open_session(fl_ctx)
            # FLARE has replaced placeholders by now: only the deployed file still tells that a job asked for them.
            self._placeholder = holds_placeholder(deployed_config(fl_ctx, "config_fed_client.json"))
            _share_cores(fl_ctx)
            self.log_info(fl_ctx, f"fedimaging {__version__} ({package_hash()}), {torch.get_num_threads()} CPU threads")
        super().handle_event(event_type, fl_ctx)

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        session = self._session
        if session is None:
            return make_reply(ReturnCode.EXECUTION_EXCEPTION, {REASON_HEADER: Reason.INTERNAL.value})
        if self._placeholder:
            self.log_error(fl_ctx, "refused (bad_setting): the job's configuration asks for environment variables")
            return make_reply(ReturnCode.EXECUTION_EXCEPTION, {REASON_HEADER: Reason.BAD_SETTING.value})
        session.aborted, session.refusal = lambda: bool(abort_signal.triggered), None
        session.model_owner = str(shareable.get_header(AppConstants.MODEL_OWNER, ""))
        reply = super().execute(task_name, shareable, fl_ctx, abort_signal)
        if session.refusal is not None:
            return make_reply(ReturnCode.EXECUTION_EXCEPTION, {REASON_HEADER: session.refusal.value})
        return reply

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
