"""The server's workflow: FLARE's FedAvg with model selection, a record of every round, and tolerance of refusals."""

import copy
import json
import math
import platform
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from nvflare.apis.controller_spec import ClientTask
from nvflare.apis.fl_constant import FLContextKey, FLMetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.workflows.fedavg import FedAvg as FlareFedAvg
from pydantic import Field

from fedimaging import __version__
from fedimaging.errors import FedImagingError, Reason
from fedimaging.federation.executor import deployed_config
from fedimaging.federation.persistor import NetworkPersistor
from fedimaging.federation.protocol import (
    PERSISTOR_ID,
    REASON_HEADER,
    REPORT,
    ROUNDS_FILE,
    VALIDATE_LAST,
    to_parameters,
    to_state,
)
from fedimaging.federation.selection import ModelSelection, vote
from fedimaging.federation.session import peak_memory
from fedimaging.settings import ANY_VERSION, Settings, Specifier, holds_placeholder, parse
from fedimaging.training.strategies import DEFAULT_STRATEGY, FedAvg, Strategy
from fedimaging.version import package_hash, require

_POLL_SECONDS = 0.1


class WorkflowSettings(Settings):
    num_rounds: Annotated[int, Field(ge=1, le=10_000)]
    min_clients: Annotated[int, Field(ge=1, le=10_000)]
    """sites that must contribute to a round; with fewer the job ends"""
    straggler_wait: Annotated[int, Field(ge=1, le=7 * 24 * 3600)] = 3600
    """seconds to wait for the other sites once so many have answered"""
    fedimaging: Specifier = ANY_VERSION
    """the version of this package that the job needs"""
    strategy: Strategy = FedAvg()
    """equal to the sites' training.strategy: its server half is what becomes of their results"""


class FederatedAveraging(FlareFedAvg):
    """FedAvg (McMahan et al. 2017) over all sites, weighted by the cases really used in the round, or another strategy.

    The global model that arrives is judged on the sites' validation cases before it is trained on, the last aggregate
    too; the best one is kept. A site that refuses is recorded by its reason code, and the job goes on as long as
    ``min_clients`` sites contribute. Every round is a line of ``rounds.jsonl`` in the server's job folder, and
    scalars go to TensorBoard there.
    """

    def __init__(
        self,
        num_rounds: int,
        min_clients: int,
        straggler_wait: int = 3600,
        fedimaging: str = ANY_VERSION,
        strategy: dict[str, Any] = DEFAULT_STRATEGY,
    ) -> None:
        settings = parse(
            WorkflowSettings,
            {
                "num_rounds": num_rounds,
                "min_clients": min_clients,
                "straggler_wait": straggler_wait,
                "fedimaging": fedimaging,
                "strategy": strategy,
            },
            "workflow",
        )
        self.fedimaging, self.strategy, self._strategy = settings.fedimaging, strategy, settings.strategy
        super().__init__(
            num_clients=None,
            num_rounds=settings.num_rounds,
            persistor_id=PERSISTOR_ID,
            task_check_period=_POLL_SECONDS,
        )
        self.min_clients, self.straggler_wait = settings.min_clients, settings.straggler_wait
        self._sites: dict[str, dict[str, Any]] = {}
        self._refused: dict[str, str] = {}
        self._asked: list[str] = []
        self._bytes_in = 0
        self._last: FLModel | None = None
        self._selection = ModelSelection("")

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
        if holds_placeholder(deployed_config(self.fl_ctx, "config_fed_server.json")):
            self.panic("the job's configuration asks for environment variables of the server")
            return
        self._run_dir = Path(self.engine.get_workspace().get_run_dir(self.fl_ctx.get_job_id()))
        self._selection = ModelSelection(persistor.settings()[0].key_metric)
        self._server = self._strategy.server(persistor.model)
        self._wanted = self._strategy.sent(persistor.model)
        self._peaks: dict[str, int] = {}
        super().run()
        if self._last is not None and not self.abort_signal.triggered:
            self._judge_last(self._last)
            self._record_end()

    def load_model(self) -> FLModel:
        model = super().load_model()
        if model is not None:
            self._model_bytes = sum(value.nbytes for value in model.params.values())
            self._record_start(model)
        return model

    def save_model(self, model: FLModel) -> None:
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
        self._sites, self._refused, self._bytes_in = {}, {}, 0
        if task_name == AppConstants.TASK_TRAIN and data is not None:
            data = copy.copy(data)
            data.params = to_parameters(self._server.outgoing(to_state(data.params)))
            self._sent_bytes = sum(value.nbytes for value in data.params.values())
        self.broadcast_model(
            task_name=task_name,
            data=data,
            targets=self._asked,
            min_responses=min(self.min_clients, len(self._asked)),
            wait_time_after_min_received=self.straggler_wait,
            timeout=timeout,
            blocking=False,
            callback=callback,
        )

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.BEFORE_AGGREGATION:
            self._judge_arrived(fl_ctx)

    def _process_result(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        reason = client_task.result.get_header(REASON_HEADER)
        if reason is not None:
            code = reason if reason in set(Reason) else Reason.INTERNAL.value
            self._refused[client_task.client.name] = code
            self._record(
                {"event": "refused", "round": self.current_round, "site": client_task.client.name, "reason": code}
            )
            self.error(f"site {client_task.client.name} refused: {code}")
        super()._process_result(client_task, fl_ctx)

    def _aggregate_one_result(self, result: FLModel) -> bool:
        site = str(result.meta.get("client_name"))
        if (fault := self._fault(result.params or {})) is not None:
            self._refused[site] = fault.value
            self.error(f"site {site} sent weights that cannot be used ({fault.value}); left out")
            return False
        if self._server.equal_weights:
            result.meta[FLMetaKey.NUM_STEPS_CURRENT_ROUND] = 1
        accepted = super()._aggregate_one_result(result)
        if accepted:
            self._bytes_in += sum(value.nbytes for value in result.params.values())
            self._sites[site] = _site_record(result, self._selection.key_metric)
            self._peaks[site] = self._sites[site].pop("peak_memory") or 0
        return bool(accepted)

    def _fault(self, params: dict[str, Any]) -> Reason | None:
        """Why a site's result cannot be used: other tensors than the strategy's, or numbers that are not finite."""
        if {name: tuple(np.shape(value)) for name, value in params.items()} != {
            name: tuple(shape) for name, shape in self._wanted.items()
        }:
            return Reason.BAD_MODEL
        return None if all(np.isfinite(value).all() for value in params.values()) else Reason.NOT_FINITE

    def update_model(self, model: FLModel, aggr_result: FLModel) -> FLModel:
        """The strategy's server half makes the new global weights of the old ones and the sites' mean."""
        share = self._received_count / len(self._asked)
        weights = self._server.update(to_state(model.params), to_state(aggr_result.params), share)
        aggr_result.params = to_parameters(weights)
        return super().update_model(model, aggr_result)

    def _get_aggregated_result(self) -> FLModel:
        if self._received_count < self.min_clients:
            raise RuntimeError(
                f"round {self.current_round}: {self._received_count} sites contributed, not {self.min_clients}"
            )
        return super()._get_aggregated_result()

    def _judge_arrived(self, fl_ctx: FLContext) -> None:
        metrics = {site: record["metrics"] for site, record in self._sites.items()}
        self._judged = self._selection.judge(self.current_round, metrics)
        if self._judged[1]:
            self.fire_event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE, fl_ctx)

    def _judge_last(self, model: FLModel) -> None:
        """Has the last aggregate validated, which no further round does."""
        metrics: dict[str, dict[str, Any]] = {}

        def keep(result: FLModel) -> None:
            metrics[str(result.meta.get("client_name"))] = _finite_scalars(result.metrics)

        last = FLModel(params_type=model.params_type, params=model.params, meta={VALIDATE_LAST: True})
        last.current_round, last.total_rounds = self.num_rounds, self.num_rounds
        self.send_model(task_name=AppConstants.TASK_VALIDATION, data=last, callback=keep)
        while self.get_num_standing_tasks():
            if self.abort_signal.triggered:
                return
            time.sleep(self._task_check_period)
        value, best = self._selection.judge(self.num_rounds, metrics)
        if best:
            self.event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE)
        self._record(
            {
                "event": "final",
                "metrics": metrics,
                "refused": self._refused,
                "key_metric": value,
                "best": best,
                "seconds": self._round_seconds(),
            }
        )

    def _record_start(self, model: FLModel) -> None:
        persistor = self.persistor
        task, network, seed = persistor.settings()
        meta = self.fl_ctx.get_prop(FLContextKey.JOB_META) or {}
        self._record(
            {
                "event": "start",
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "job": meta.get(JobMetaKey.JOB_NAME),
                "rounds": self.num_rounds,
                "min_clients": self.min_clients,
                "model_bytes": self._model_bytes,
                "parameters": sum(p.numel() for p in persistor.model.parameters()),
                "key_metric": task.key_metric,
                "task": task.settings.model_dump(),
                "network": network.model_dump(),
                "seed": seed,
                "strategy": self._strategy.model_dump(),
                "start_from": persistor.start_from,
                "versions": {
                    "fedimaging": __version__,
                    "fedimaging_sha256": package_hash(),
                    **{name: version(name) for name in ("nvflare", "torch", "monai")},
                    "python": platform.python_version(),
                },
            }
        )

    def _record_round(self) -> None:
        value, best = self._judged
        missing = [site for site in self._asked if site not in self._sites and site not in self._refused]
        record = {
            "event": "round",
            "round": self.current_round,
            "seconds": self._round_seconds(),
            "bytes_out": self._sent_bytes * len(self._asked),
            "bytes_in": self._bytes_in,
            "sites": self._sites,
            "refused": self._refused,
            "missing": missing,
            "key_metric": value,
            "best": best,
        }
        self._record(record)
        self._write_scalars(record)

    def _record_end(self) -> None:
        self._record(
            {
                "event": "end",
                "best_round": self._selection.best_index,
                "best_key_metric": self._selection.best_value,
                "seconds": round(time.monotonic() - self._started, 3),
                "peak_memory": {"server": peak_memory(), "sites": self._peaks},
            }
        )

    def _record(self, record: dict[str, Any]) -> None:
        with (self._run_dir / ROUNDS_FILE).open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def _write_scalars(self, record: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self._run_dir / "tb_events")) as writer:
            if record["key_metric"] is not None:
                writer.add_scalar(f"global/{self._selection.key_metric}", record["key_metric"], record["round"])
            for site, figures in record["sites"].items():
                writer.add_scalar(f"{site}/train_loss", figures["loss"], record["round"])
                for name, value in figures["metrics"].items():
                    writer.add_scalar(f"{site}/val_{name}", value, record["round"])

    def _round_seconds(self) -> float:
        return round(time.monotonic() - self._round_started, 3)


def _site_record(result: FLModel, key_metric: str) -> dict[str, Any]:
    """A site's contribution as it is recorded; what is no finite number is left out."""
    report = result.meta.get(REPORT) or {}
    metrics = _finite_scalars(result.metrics)
    figures = _finite_scalars(report)
    ballot = vote(metrics, key_metric)
    return {
        "cases": int(figures.get("cases", 0)),
        "seconds": figures.get("seconds"),
        "loss": figures.get("loss", 0.0),
        "epoch_losses": [float(v) for v in report.get("epoch_losses", []) if _is_finite(v)],
        "metrics": metrics,
        "votes": ballot[1] if ballot else 0,
        "skipped": int(figures.get("skipped", 0)),
        "peak_memory": int(figures.get("peak_memory", 0)),
        "fedimaging": _package(report.get("fedimaging")),
    }


def _package(said: Any) -> dict[str, str] | None:
    """The version and hash of the package that a site says it runs; None where it says nothing of that form."""
    patterns = {"version": r"[0-9A-Za-z.+-]{1,64}", "sha256": r"[0-9a-f]{64}"}
    known = isinstance(said, dict) and all(re.fullmatch(p, str(said.get(name))) for name, p in patterns.items())
    return {name: str(said[name]) for name in patterns} if known else None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite_scalars(values: Any) -> dict[str, Any]:
    items = values.items() if isinstance(values, dict) else ()
    return {str(name): value for name, value in items if _is_finite(value)}
