"""The server's workflow: FLARE's FedAvg with deadlines, a quorum, model selection and a record of every round."""

import copy
import json
import platform
import threading
import time
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn, Self

import numpy as np
from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, TaskCompletionStatus
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, FLMetaKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.workflows.fedavg import FedAvg as FlareFedAvg
from pydantic import Field, StringConstraints, model_validator

from fedimaging import __version__
from fedimaging.errors import FedImagingError, Reason
from fedimaging.federation.earlier import EarlierRun, take_over
from fedimaging.federation.executor import deployed_config
from fedimaging.federation.persistor import NetworkPersistor
from fedimaging.federation.protocol import (
    COUNTED,
    EVALUATE_AT,
    PERSISTOR_ID,
    REASON_HEADER,
    REPORT,
    SELECTION,
    SERVER_CONFIG,
    STRATEGY_STATE,
    VALIDATE_LAST,
    to_parameters,
    to_state,
)
from fedimaging.federation.quorum import Quorum
from fedimaging.federation.record import RunRecord, contribution, finite_numbers
from fedimaging.federation.selection import ModelSelection
from fedimaging.federation.session import peak_memory
from fedimaging.settings import ANY_VERSION, Settings, Specifier, holds_placeholder, parse
from fedimaging.training.strategies import DEFAULT_STRATEGY, FedAvg, Strategy
from fedimaging.version import package_hash, require

_POLL_SECONDS = 0.1
_SYNC_SECONDS = 2.0
_MOST_CASES = 10**7
"""a site that says it used more in a round is not believed: its weight would drown the others"""

Seconds = Annotated[int, Field(ge=1, le=7 * 24 * 3600)]
SiteName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class WorkflowSettings(Settings):
    """Rounds, and who must take part in them."""

    num_rounds: Annotated[int, Field(ge=1, le=10_000)]
    """rounds of training"""
    min_clients: Annotated[int, Field(ge=1, le=10_000)]
    """sites that must contribute to a round, any others may miss it; with fewer the job ends"""
    required_sites: list[SiteName] = Field(default_factory=list)
    """sites that must contribute to every round, by name"""
    round_timeout: Seconds = 4 * 3600
    """seconds that a round may take; it is then closed with the sites that contributed"""
    straggler_wait: Seconds = 3600
    """seconds to wait for the other sites once enough have contributed"""
    continues: Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9][A-Za-z0-9_-]{0,63})?$")] = ""
    """id of an interrupted job of the same submitter, whose rounds this job continues"""
    fedimaging: Specifier = ANY_VERSION
    """the version of this package that the job needs"""
    strategy: Strategy = FedAvg()
    """equal to the sites' training.strategy: its server half is what becomes of their results"""
    leave_out: Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]{0,63})?$")] = ""
    """a site that does not train and has no say in which model is best; the models are evaluated there at the end"""

    @model_validator(mode="after")
    def _check_leave_out(self) -> Self:
        if self.leave_out in self.required_sites:
            raise ValueError(f"required_sites names {self.leave_out}, which leave_out keeps from training; drop one")
        if self.leave_out and self.strategy.personal:
            raise ValueError(
                f"leave_out: with {self.strategy.name} each site is judged by what it trained itself, and the one left "
                "out trains nothing; choose another strategy"
            )
        return self


class FederatedAveraging(FlareFedAvg):
    """FedAvg (McMahan et al. 2017) over all sites, weighted by the cases really used in the round, or another strategy.

    The global model that arrives is judged on the sites' validation cases before it is trained on, the last aggregate
    too; the best one is kept.

    A round is closed when every site has answered, ``straggler_wait`` seconds after enough have contributed, or
    ``round_timeout`` seconds after it began. It counts if ``min_clients`` sites contributed, all ``required_sites``
    among them; as soon as that cannot happen any more the job ends, and another can continue it. What comes after its
    round was closed is recorded and not averaged. A site that refuses is recorded by its reason code. Every round is a
    line of ``rounds.jsonl`` in the server's job folder, and scalars go to TensorBoard there.

    The site ``leave_out`` gets no task of this workflow: neither its training nor its validation cases have a part in
    the models. :class:`CrossSiteEvaluation` asks it like the others.
    """

    def __init__(  # noqa: PLR0917 (FLARE gives them by name)
        self,
        num_rounds: int,
        min_clients: int,
        required_sites: Sequence[str] = (),
        round_timeout: int = 4 * 3600,
        straggler_wait: int = 3600,
        continues: str = "",
        fedimaging: str = ANY_VERSION,
        strategy: dict[str, Any] = DEFAULT_STRATEGY,
        leave_out: str = "",
    ) -> None:
        settings = parse(
            WorkflowSettings,
            {
                "num_rounds": num_rounds,
                "min_clients": min_clients,
                "required_sites": list(required_sites) if isinstance(required_sites, tuple) else required_sites,
                "round_timeout": round_timeout,
                "straggler_wait": straggler_wait,
                "continues": continues,
                "fedimaging": fedimaging,
                "strategy": strategy,
                "leave_out": leave_out,
            },
            "workflow",
        )
        self.fedimaging, self.strategy, self._strategy = settings.fedimaging, strategy, settings.strategy
        super().__init__(
            num_clients=None,
            num_rounds=settings.num_rounds,
            persistor_id=PERSISTOR_ID,
            task_check_period=_POLL_SECONDS,
            # Which errors a round survives is decided by its quorum.
            ignore_result_error=True,
        )
        self.min_clients, self.required_sites = settings.min_clients, required_sites
        self.round_timeout, self.straggler_wait = settings.round_timeout, settings.straggler_wait
        self.continues, self.leave_out = settings.continues, settings.leave_out
        self._total_rounds = settings.num_rounds
        self._quorum = Quorum(settings.min_clients, frozenset(settings.required_sites))
        self._earlier: EarlierRun | None = None
        self._asked: list[str] = []
        self._members: set[str] = set()
        self._answered: set[str] = set()
        self._sites: dict[str, dict[str, Any]] = {}
        self._refused: dict[str, str] = {}
        self._counted: dict[str, int] = {}
        self._bytes_in = 0
        self._training = False
        self._met_at: float | None = None
        self._synced_at = 0.0
        self._last: FLModel | None = None
        self._selection = ModelSelection("")
        self._ending, self._running = threading.Lock(), False

    def run(self) -> None:
        self._started = self._round_started = time.monotonic()
        try:
            require(self.fedimaging)
        except FedImagingError as error:
            self.panic(str(error))
            return
        persistor = self.persistor
        if not isinstance(persistor, NetworkPersistor):
            self.panic(f"the job's component {PERSISTOR_ID!r} must be a NetworkPersistor")
            return
        if holds_placeholder(deployed_config(self.fl_ctx, SERVER_CONFIG)):
            self.panic("the job's configuration asks for environment variables of the server")
            return
        self._record = RunRecord(Path(self.engine.get_workspace().get_run_dir(self.fl_ctx.get_job_id())))
        self._selection = ModelSelection(persistor.settings()[0].key_metric)
        self._server = self._strategy.server(persistor.model)
        self._wanted = self._strategy.sent(persistor.model)
        self._peaks: dict[str, int] = {}
        self._running = True
        if self.continues:
            self._continue_earlier()
        super().run()
        if self._last is not None and not self.abort_signal.triggered:
            self._judge_last(self._last)
            self._record_end()

    def load_model(self) -> FLModel:
        model = super().load_model()
        if model is not None:
            if self._earlier is not None:
                _replace_weights(model, self._earlier)
                self._last = model
            self._model_bytes = sum(value.nbytes for value in model.params.values())
            self._record_start()
            if self.leave_out:
                self._check_leave_out()
        return model

    def sample_clients(self, num_clients: int | None = None) -> list[str]:
        """The job's sites that train, without those that FLARE deems dead; one that came back is asked again."""
        self._meet_returned_sites()
        names = [name for name in super().sample_clients(num_clients) if name != self.leave_out]
        self._members.update(names)
        return [name for name in names if not self.get_client_disconnect_time(name)]

    def save_model(self, model: FLModel) -> None:
        self.persistor.persistence_manager.other_props[STRATEGY_STATE] = self._server.state()
        super().save_model(model)
        self._last = model
        self._record_round()

    def send_model(  # noqa: PLR0917 (FLARE's signature)
        self,
        task_name: str = AppConstants.TASK_TRAIN,
        data: FLModel | None = None,
        targets: list[str] | None = None,
        min_responses: int | None = None,
        timeout: int = 0,
        callback: Callable[[FLModel], None] | None = None,
    ) -> None:
        self._round_started = time.monotonic()
        self._asked = [getattr(target, "name", target) for target in targets or self.sample_clients(None)]
        self._answered, self._sites, self._refused, self._bytes_in = set(), {}, {}, 0
        self._training, self._met_at = task_name == AppConstants.TASK_TRAIN, None
        self._give_up_without_quorum(outstanding=self._asked)
        if data is not None:
            data = copy.copy(data)
            data.total_rounds = self._total_rounds
            if self._training:
                data.params = to_parameters(self._server.outgoing(to_state(data.params)))
                self._sent_bytes = sum(value.nbytes for value in data.params.values())
                if self._server.acknowledges:
                    data.meta = {**data.meta, COUNTED: dict(self._counted)}
        self.broadcast_model(
            task_name=task_name,
            data=data,
            targets=self._asked,
            min_responses=len(self._asked),
            timeout=timeout or self.round_timeout,
            blocking=False,
            callback=callback,
        )

    def get_num_standing_tasks(self) -> int:
        """The number of open tasks. FLARE asks this while a round is open, which is when the round is watched."""
        self._meet_returned_sites()
        silent = set(self._asked) - self._answered
        outstanding = {site for site in silent if not self.get_client_disconnect_time(site)}
        self._give_up_without_quorum(outstanding)
        if silent and self._quorum.met(set(self._sites) if self._training else self._answered):
            self._met_at = self._met_at or time.monotonic()
            if not outstanding or time.monotonic() - self._met_at >= self.straggler_wait:
                self.cancel_all_tasks(TaskCompletionStatus.OK)
        return int(super().get_num_standing_tasks())

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """Records a reply that came after its round was closed; it is not averaged."""
        number = result.get_cookie(AppConstants.CONTRIBUTION_ROUND)
        late = number if isinstance(number, int) and not isinstance(number, bool) else None
        self._record.add("late", round=late, site=client.name)
        self.warning(f"site {client.name} answered after its round was closed; left out")

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.BEFORE_AGGREGATION:
            self._judge_arrived(fl_ctx)
        elif event_type == EventType.CLIENT_DISCONNECTED:
            self._end_without_sites(fl_ctx)

    def _process_result(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        site, result = client_task.client.name, client_task.result
        reason = result.get_header(REASON_HEADER)
        if reason is not None or result.get_return_code() != ReturnCode.OK:
            code = reason if reason in set(Reason) else Reason.INTERNAL.value
            self._refused[site] = code
            self._record.add("refused", round=self.current_round, site=site, reason=code)
            self.error(f"site {site} refused: {code}")
        super()._process_result(client_task, fl_ctx)
        self._answered.add(site)

    def _aggregate_one_result(self, result: FLModel) -> bool:
        site = str(result.meta.get("client_name"))
        if (fault := self._fault(result)) is not None:
            self._refused[site] = fault.value
            self.error(f"site {site} sent a result that cannot be used ({fault.value}); left out")
            return False
        if self._server.equal_weights:
            result.meta[FLMetaKey.NUM_STEPS_CURRENT_ROUND] = 1
        params = result.params or {}
        received = sum(value.nbytes for value in params.values())
        # Summed in float64, a mean hardly depends on who arrives first, and a run can be repeated.
        result.params = {name: value.astype(np.float64) for name, value in params.items()}
        # FLARE takes a result without tensors for none; with some strategies nothing but metrics leaves a site.
        accepted = super()._aggregate_one_result(result) if self._wanted else True
        if accepted:
            self._bytes_in += received
            self._sites[site] = contribution(result, self._selection.key_metric)
            self._peaks[site] = self._sites[site].pop("peak_memory") or 0
        return bool(accepted)

    def _fault(self, result: FLModel) -> Reason | None:
        """Why a site's result cannot be used: other tensors than the strategy's, or a weight or numbers unfit."""
        params, weight = result.params or {}, result.meta.get(FLMetaKey.NUM_STEPS_CURRENT_ROUND)
        cases = (result.meta.get(REPORT) or {}).get("cases")
        if type(weight) is not int or weight != cases or not 0 < weight <= _MOST_CASES:
            return Reason.BAD_MODEL
        shapes = {name: value.shape for name, value in params.items() if _holds_floats(value)}
        if set(shapes) != set(params) or shapes != {name: tuple(shape) for name, shape in self._wanted.items()}:
            return Reason.BAD_MODEL
        return None if all(np.isfinite(value).all() for value in params.values()) else Reason.NOT_FINITE

    def update_model(self, model: FLModel, aggr_result: FLModel) -> FLModel:
        """The strategy's server half makes the new global weights of the old ones and the sites' mean."""
        share = self._received_count / len(self._members)
        mean = {name: np.asarray(value, np.float32) for name, value in aggr_result.params.items()}
        weights = self._server.update(to_state(model.params), to_state(mean), share)
        aggr_result.params = to_parameters(weights)
        self._counted |= dict.fromkeys(self._sites, int(self.current_round or 0))
        return super().update_model(model, aggr_result)

    def _get_aggregated_result(self) -> FLModel:
        self._give_up_without_quorum()
        return super()._get_aggregated_result()

    def _continue_earlier(self) -> None:
        """Takes over an interrupted job's rounds, its best and its last model."""
        workspace = self.engine.get_workspace()
        meta = self.fl_ctx.get_prop(FLContextKey.JOB_META) or {}
        earlier = take_over(self.continues, workspace, meta, self._record.folder)
        task, network, _ = self.persistor.settings()
        if self._strategy.personal or self._strategy.local(self.persistor.model).memory:
            raise FedImagingError(
                f"continues: what {self._strategy.name} keeps at the sites is lost with the earlier job"
            )
        same = {
            "task": task.settings.model_dump(),
            "network": network.model_dump(),
            "strategy": self._strategy.model_dump(),
            "leave_out": self.leave_out,
        }
        start = {"leave_out": ""} | earlier.start
        if unequal := [name for name, value in same.items() if start.get(name) != _as_json(value)]:
            raise FedImagingError(f"continues: job {self.continues} had another {unequal[0]}", Reason.BAD_MODEL)
        self._earlier = earlier
        self._server.load_state(earlier.strategy)
        self.start_round = min(earlier.next_round, self._total_rounds)
        self.num_rounds = self._total_rounds - self.start_round
        for record in earlier.rounds:
            self._record.add(**record)
        self._selection.best_index, self._selection.best_value = earlier.best

    def _check_leave_out(self) -> None:
        """Ends the job where its model could not be said to have never seen the site left out."""
        if self.leave_out not in {client.name for client in self.engine.get_clients()}:
            self._give_up(f"leave_out: no site {self.leave_out} takes part in this job")
        if self.persistor.start_from:
            self._give_up(
                f"leave_out: the job starts from a model, and nobody can tell whether {self.leave_out} had a part in "
                "it; take the job out of the server's start_models.yml"
            )

    def _meet_returned_sites(self) -> None:
        """Learns from the server's main process which of the job's sites came back under a new registration."""
        if time.monotonic() - self._synced_at >= _SYNC_SECONDS:
            self._synced_at = time.monotonic()
            self.engine.sync_clients_from_main_process()

    def _give_up_without_quorum(self, outstanding: Collection[str] = ()) -> None:
        """Ends the job if this round of training cannot count any more."""
        lack = self._quorum.shortfall(set(self._sites), outstanding) if self._training else None
        if lack is not None:
            self._give_up(lack)

    def _give_up(self, why: str) -> NoReturn:
        self.cancel_all_tasks(TaskCompletionStatus.CANCELLED)
        raise RuntimeError(f"round {self._record_failure(why)}: {why}")

    def _end_without_sites(self, fl_ctx: FLContext) -> None:
        """Ends the job if fewer sites are left than it needs, whatever they contributed to this round.

        FLARE would do so next, before the round is watched again, and would leave no reason in the record.
        """
        names = {client.name for client in self.engine.get_clients()}
        gone = {name for name in names if self.get_client_disconnect_time(name)}
        there, needed = names - gone, self.min_clients + bool(self.leave_out)
        if self._running and (len(there) < needed or not self._quorum.met(there - {self.leave_out})):
            required = ", ".join(sorted(self._quorum.required_sites))
            needs = f"{needed} sites" + (f", {required} among them" if required else "")
            why = f"no sign of {', '.join(sorted(gone))}; the job needs {needs}"
            self._record_failure(why)
            self.system_panic(why, fl_ctx)

    def _record_failure(self, why: str) -> int:
        """Records once why the job ends. Returns the round."""
        number = self.start_round if self.current_round is None else self.current_round
        with self._ending:
            if self._running:
                self._running = False
                self._record.add("failed", round=number, reason=why, **self._participants())
        return int(number)

    def _participants(self) -> dict[str, Any]:
        """Who contributed to the round, who refused, and from whom nothing came; nobody before the first round."""
        names = self._members | set(self._asked)
        return {
            "sites": self._sites,
            "refused": self._refused,
            "missing": sorted(names - set(self._sites) - set(self._refused)),
        }

    def _judge_arrived(self, fl_ctx: FLContext) -> None:
        metrics = {site: record["metrics"] for site, record in self._sites.items()}
        self._judged = self._selection.judge(self.current_round, metrics)
        if self._judged[1]:
            self._label_best()
            self.fire_event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE, fl_ctx)

    def _label_best(self) -> None:
        """Has the file of the best model, which the next event writes, say which one it is."""
        best = (self._selection.best_index, self._selection.best_value)
        self.persistor.persistence_manager.other_props[SELECTION] = best

    def _judge_last(self, model: FLModel) -> None:
        """Has the last aggregate validated, which no further round does."""
        metrics: dict[str, dict[str, Any]] = {}

        def keep(result: FLModel) -> None:
            metrics[str(result.meta.get("client_name"))] = finite_numbers(result.metrics)

        last = FLModel(params_type=model.params_type, params=model.params, meta={VALIDATE_LAST: True})
        last.current_round = self._total_rounds
        self.send_model(task_name=AppConstants.TASK_VALIDATION, data=last, callback=keep)
        while self.get_num_standing_tasks():
            if self.abort_signal.triggered:
                return
            time.sleep(self._task_check_period)
        self.fl_ctx.set_prop(EVALUATE_AT, self._to_evaluate_at(), private=True, sticky=True)
        value, best = self._selection.judge(self._total_rounds, metrics)
        if best:
            self._label_best()
            self.event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE)
        self._record.add(
            "final",
            metrics=metrics,
            refused=self._refused,
            key_metric=value,
            best=best,
            seconds=self._round_seconds(),
        )

    def _to_evaluate_at(self) -> list[str]:
        """The sites that answered last: others would be waited for in vain. The one left out was not asked yet."""
        there = self.leave_out and not self.get_client_disconnect_time(self.leave_out)
        return sorted(self._answered | ({self.leave_out} if there else set()))

    def _record_start(self) -> None:
        persistor = self.persistor
        task, network, seed = persistor.settings()
        meta = self.fl_ctx.get_prop(FLContextKey.JOB_META) or {}
        self._record.add(
            "start",
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            job=meta.get(JobMetaKey.JOB_NAME),
            rounds=self._total_rounds,
            start_round=self.start_round,
            continues=self.continues,
            min_clients=self.min_clients,
            required_sites=sorted(self._quorum.required_sites),
            leave_out=self.leave_out,
            round_timeout=self.round_timeout,
            straggler_wait=self.straggler_wait,
            model_bytes=self._model_bytes,
            parameters=sum(p.numel() for p in persistor.model.parameters()),
            key_metric=task.key_metric,
            task=task.settings.model_dump(),
            network=network.model_dump(),
            seed=seed,
            strategy=self._strategy.model_dump(),
            start_from=persistor.start_from,
            versions={
                "fedimaging": __version__,
                "fedimaging_sha256": package_hash(),
                **{name: version(name) for name in ("nvflare", "torch", "monai")},
                "python": platform.python_version(),
            },
        )

    def _record_round(self) -> None:
        value, best = self._judged
        figures: dict[str, Any] = {
            "round": self.current_round,
            "seconds": self._round_seconds(),
            "bytes_out": self._sent_bytes * len(self._asked),
            "bytes_in": self._bytes_in,
            **self._participants(),
            "key_metric": value,
            "best": best,
        }
        self._record.add("round", **figures)
        self._record.add_scalars(self._selection.key_metric, figures)

    def _record_end(self) -> None:
        self._running = False
        self._record.add(
            "end",
            best_round=self._selection.best_index,
            best_key_metric=self._selection.best_value,
            seconds=round(time.monotonic() - self._started, 3),
            peak_memory={"server": peak_memory(), "sites": self._peaks},
        )

    def _round_seconds(self) -> float:
        return round(time.monotonic() - self._round_started, 3)


def _replace_weights(model: FLModel, earlier: EarlierRun) -> None:
    """Puts an earlier job's weights into a model of the same network."""
    state = {name: value.numpy() for name, value in earlier.state.items()}
    if {name: value.shape for name, value in state.items()} != {n: v.shape for n, v in model.params.items()}:
        raise FedImagingError(f"continues: job {earlier.job_id} had another network", Reason.BAD_MODEL)
    model.params = state


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _holds_floats(value: Any) -> bool:
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating)
