"""An earlier job's rounds and models at the server, for a job that continues it."""

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.workspace import Workspace
from nvflare.app_common.app_constant import DefaultCheckpointFileName

from fedimaging.errors import FedImagingError, Reason
from fedimaging.federation.protocol import ROUNDS_FILE, SELECTION, START_MODELS_FILE, STRATEGY_STATE

LAST_MODEL = f"app_server/{DefaultCheckpointFileName.GLOBAL_MODEL}"
BEST_MODEL = f"app_server/{DefaultCheckpointFileName.BEST_GLOBAL_MODEL}"
_META = "meta.json"
_OWNER = (JobMetaKey.SUBMITTER_NAME.value, JobMetaKey.SUBMITTER_ORG.value)


@dataclass
class EarlierRun:
    """What an interrupted job left: its rounds up to the last model that was saved, and that model."""

    job_id: str
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """the records of the rounds that are kept, one each, in order"""
    start: dict[str, Any] = field(default_factory=dict)
    next_round: int = 0
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    """the last global model"""
    strategy: dict[str, Any] = field(default_factory=dict)
    """what the server's half of the strategy kept"""
    best: tuple[int | None, float | None] = (None, None)
    """index and value of the best global model, of its file: the rounds can lack the line of the one that it is of"""


def take_over(job_id: str, workspace: Workspace, meta: Mapping[str, Any], run_dir: Path) -> EarlierRun:
    """Reads an earlier job at the server and copies its models into the folder of the job that continues it.

    The earlier job is looked for in the server's workspace (the server was killed), in the server's job store (the job
    ended or was aborted), and under its id in the operator's ``local/start_models.yml``, which then names the folder
    of its run.

    Args:
        job_id: of the earlier job.
        workspace: the server's.
        meta: of the job that continues; whoever submitted it must have submitted the earlier one too.
        run_dir: of the job that continues.

    Raises:
        FedImagingError: there is no such job, it is somebody else's, or it left no model.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source = _find(job_id, workspace, Path(scratch))
        if source is None:
            raise FedImagingError(f"continues: the server keeps no job {job_id}", Reason.BAD_MODEL)
        _check_owner(job_id, source, meta)
        run = _read(job_id, source)
        for name in (LAST_MODEL, BEST_MODEL):
            if (source / name).exists():
                (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, run_dir / name)
    return run


def _find(job_id: str, workspace: Workspace, scratch: Path) -> Path | None:
    """The folder of the earlier run; an archived one is unpacked into ``scratch``."""
    local = Path(workspace.get_site_config_dir())
    named = local / START_MODELS_FILE
    if named.exists() and isinstance(entry := (yaml.safe_load(named.read_text()) or {}).get(job_id), str):
        return local / entry
    left = Path(workspace.get_run_dir(job_id))
    if (left / ROUNDS_FILE).exists():
        return left
    archive = _job_store(local) / job_id / "workspace"
    if not archive.exists():
        return None
    with zipfile.ZipFile(archive) as file:
        for name in {ROUNDS_FILE, _META, LAST_MODEL, BEST_MODEL} & set(file.namelist()):
            file.extract(name, scratch)
    return scratch


def _job_store(local: Path) -> Path:
    """Where the server's job manager keeps jobs, as its ``resources.json`` says."""
    if root := os.environ.get("NVFL_JOB_STORE_ROOT"):
        return Path(root)
    path = local / "resources.json"
    resources = json.loads((path if path.exists() else path.with_name("resources.json.default")).read_text())
    managers = (c for c in resources.get("components", []) if c.get("id") == "job_manager")
    return Path(next((c.get("args", {}).get("uri_root", "") for c in managers), "") or local / "no-job-store")


def _check_owner(job_id: str, source: Path, meta: Mapping[str, Any]) -> None:
    """A job's results are its submitter's: nobody gets at a model by continuing another's job."""
    path = source / _META
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if any(earlier.get(key) != meta.get(key) for key in _OWNER):
        raise FedImagingError(f"continues: job {job_id} was submitted by somebody else", Reason.BAD_MODEL)


def _read(job_id: str, source: Path) -> EarlierRun:
    run = EarlierRun(job_id)
    try:
        saved = torch.load(source / LAST_MODEL, map_location="cpu", weights_only=True)
        run.state, last = dict(saved["model"]), int(saved["meta_props"]["current_round"])
        run.strategy = dict(saved.get(STRATEGY_STATE, {}))
    except Exception:
        raise FedImagingError(f"continues: job {job_id} ended before its first round did", Reason.BAD_MODEL) from None
    lines = (source / ROUNDS_FILE).read_text().splitlines()
    events = [event for line in lines if (event := _event(line))]
    kept = {event["round"]: event for event in events if event["event"] == "round" and event["round"] <= last}
    run.rounds = [kept[number] for number in sorted(kept)]
    run.start = next((event for event in reversed(events) if event["event"] == "start"), {})
    run.next_round = last + 1
    run.best = _read_best(job_id, source)
    return run


def _read_best(job_id: str, source: Path) -> tuple[int | None, float | None]:
    try:
        index, value = torch.load(source / BEST_MODEL, map_location="cpu", weights_only=True)[SELECTION]
    except Exception:
        raise FedImagingError(
            f"continues: job {job_id} left no best model that can be read", Reason.BAD_MODEL
        ) from None
    return index, value


def _event(line: str) -> dict[str, Any] | None:
    """A line of the rounds' file; a last line that a crash cut off is left out."""
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        return None
    return event if isinstance(event, dict) and "event" in event else None
