"""The global model at the server: built from the job's settings, kept as a PyTorch file."""

from pathlib import Path
from typing import Any

import torch
import yaml
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.app_common.abstract.model import ModelLearnable
from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor

from fedimaging.errors import FedImagingError, Reason
from fedimaging.federation.protocol import START_MODELS_FILE
from fedimaging.networks import NetworkSettings, build_network, network_settings
from fedimaging.settings import parse
from fedimaging.tasks import Task, make_task
from fedimaging.training.loop import exchanged
from fedimaging.training.settings import SeedSettings


class NetworkPersistor(PTFileModelPersistor):
    """Builds the job's registered network with its seed, and keeps the last and the best global model.

    A federation can start from an earlier model, which the server's operator names: :func:`start_model`. No setting
    of a job is a path, a class or a checkpoint.

    Args:
        task: the job's task settings, from which the network's input and output follow.
        network: the job's network settings.
        seed: of the initial weights.
    """

    def __init__(self, task: dict[str, Any], network: dict[str, Any], seed: int) -> None:
        super().__init__(load_device="cpu")
        self.task, self.network, self.seed = task, network, seed
        self.start_from: str | None = None

    def handle_event(self, event: str, fl_ctx: FLContext) -> None:
        if event == EventType.START_RUN:
            try:
                self.model = self._initial_network(fl_ctx)
            except FedImagingError as error:
                self.system_panic(reason=str(error), fl_ctx=fl_ctx)
                return
        super().handle_event(event, fl_ctx)

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        learnable = super().load_model(fl_ctx)
        if learnable is not None:
            # The persistence manager would write the counters back into every checkpoint.
            self.persistence_manager.var_dict = exchanged(self.persistence_manager.var_dict)
            learnable = self.persistence_manager.to_model_learnable(self.exclude_vars)
        return learnable

    def settings(self) -> tuple[Task, NetworkSettings, int]:
        """The validated settings. Raises FedImagingError by name."""
        seed = parse(SeedSettings, {"seed": self.seed}, "job").seed
        return make_task(self.task), network_settings(self.network), seed

    def _initial_network(self, fl_ctx: FLContext) -> torch.nn.Module:
        task, network, seed = self.settings()
        module = build_network(
            network,
            spatial_dims=task.spatial_dims,
            in_channels=task.in_channels,
            out_channels=task.out_channels,
            seed=seed,
        )
        start = self._start_model(fl_ctx)
        if start is not None:
            load_weights(module, start)
            self.start_from = start.name
        return module

    def _start_model(self, fl_ctx: FLContext) -> Path | None:
        local = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_site_config_dir())
        meta = fl_ctx.get_prop(FLContextKey.JOB_META) or {}
        return start_model(local, str(meta.get(JobMetaKey.JOB_NAME)), meta.get(JobMetaKey.SUBMITTER_NAME))


def start_model(local: Path, job: str, submitter: str | None) -> Path | None:
    """The file that the operator named for a job in ``local/start_models.yml``, relative to it; None for none.

    A line is ``<job name>: {file: <model file>, submitter: <who submits it>}``: a job of that name by anybody else
    starts from new weights, as its result would tell of the model. Simulated jobs have no submitter.
    """
    path = local / START_MODELS_FILE
    if not path.exists():
        return None
    try:
        entries = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise FedImagingError(f"{path}: not YAML: {str(error).splitlines()[0]}", Reason.BAD_MODEL) from None
    entry = entries.get(job) if isinstance(entries, dict) else entries
    if entry is None:
        return None
    if not isinstance(entry, dict) or set(entry) != {"file", "submitter"} or not isinstance(entry["file"], str):
        raise FedImagingError(
            f"{path}: expected lines of the form `<job name>: {{file: <model file>, submitter: <name>}}`",
            Reason.BAD_MODEL,
        )
    return local / entry["file"] if entry["submitter"] == submitter else None


def load_weights(network: torch.nn.Module, path: Path) -> None:
    """Loads a model file that a job left (``{"model": state_dict}`` or a state_dict) into the same network.

    Raises:
        FedImagingError: BAD_MODEL if the file is missing, not a model, or another network's.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        state = data.get("model", data)
        missing = set(exchanged(network.state_dict())) - set(state)
        unexpected = set(state) - set(network.state_dict())
        network.load_state_dict(state, strict=False)
    except Exception as error:
        raise FedImagingError(
            f"{path}: cannot start from this model: {type(error).__name__}; it must be the model file of a job "
            "with the same network and classes",
            Reason.BAD_MODEL,
        ) from None
    if missing or unexpected:
        raise FedImagingError(f"{path}: the model is of another network than the job's", Reason.BAD_MODEL)
