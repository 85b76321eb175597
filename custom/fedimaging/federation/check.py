"""What is wrong with a job folder, told before it is submitted."""

import argparse
import contextlib
import io
import logging
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nvflare.apis.job_def import ALL_SITES, SERVER_SITE_NAME, JobMetaKey
from nvflare.apis.workspace import Workspace
from nvflare.fuel.utils.zip_utils import zip_directory_to_bytes
from nvflare.private.fed.client.client_json_config import ClientJsonConfigurator
from nvflare.private.fed.server.job_meta_validator import JobMetaValidator
from nvflare.private.fed.server.server_json_config import ServerJsonConfigurator
from nvflare.private.fed.utils.fed_utils import extract_participants

from fedimaging.errors import FedImagingError
from fedimaging.federation.job import CLIENT_FILE, META_FILE, SERVER_FILE, JobFolder
from fedimaging.training.declared import declare
from fedimaging.training.settings import JobSettings

SLOW_LINE = 10e6
"""bits a second of a slow hospital's line, by which time-outs are judged"""
_TASKS = ("train", "validate", "submit_model")


def check(folder: Path) -> list[str]:
    """What is wrong with a job folder, a line each; empty for a sound one.

    The folder must be what FLARE's own validator of submitted jobs and its readers of configurations accept, and what
    this project's sites run: classes on the allow-list, settings that are valid and equal on both sides, a quorum that
    survives a site's absence, and time-outs that leave room for sending the model.
    """
    try:
        job = JobFolder(folder)
        settings = job.settings()
    except FedImagingError as error:
        return [str(error)]
    return [*_files(folder), *_flare(job), *_metric(job, settings), *_quorum(job), *_timeouts(job, settings)]


def _files(folder: Path) -> Iterator[str]:
    expected = {META_FILE, SERVER_FILE, CLIENT_FILE}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            yield f"{path}: a symbolic link; a job holds plain files only"
        elif path.is_file() and name not in expected and not path.name.startswith(".__nvfl"):
            yield f"{path}: a job holds {', '.join(sorted(expected))} and nothing else; delete this file"


def _flare(job: JobFolder) -> Iterator[str]:
    """FLARE's own word: the validator that every submitted job passes, and the readers that build its components."""
    valid, message, _ = JobMetaValidator().validate(
        job.path.name, zip_directory_to_bytes(str(job.path.resolve().parent), job.path.name)
    )
    if not valid:
        yield f"{job.path / META_FILE}: FLARE: {message}"
    tasks = {name for executor in job.client.get("executors", []) for name in executor.get("tasks", [])}
    if "*" not in tasks and (absent := [name for name in _TASKS if name not in tasks]):
        yield f'{job.path / CLIENT_FILE}: no executor for the task {absent[0]}; write "tasks": ["*"]'
    with tempfile.TemporaryDirectory() as scratch:
        for part in ("startup", "local"):
            (Path(scratch) / part).mkdir()
        workspace = Workspace(scratch, "check")
        arguments = argparse.Namespace(
            job_id="check", workspace=scratch, set=[], client_name="check", sp_scheme="grpc", sp_target="localhost:0"
        )
        for name, configurator in ((SERVER_FILE, ServerJsonConfigurator), (CLIENT_FILE, ClientJsonConfigurator)):
            logging.disable(logging.CRITICAL)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    configurator(
                        workspace_obj=workspace,
                        config_file_name=str(job.path.resolve() / name),
                        args=arguments,
                        app_root=str(job.path.resolve() / "app"),
                    ).configure()
            except Exception as error:
                # FLARE's message holds the whole component before what is wrong with it.
                yield f"{job.path / name}: FLARE: {' '.join(str(error).rpartition('exception: ')[2].split())}"
            finally:
                logging.disable(logging.NOTSET)


def _metric(job: JobFolder, settings: JobSettings) -> Iterator[str]:
    task = settings.task
    if task.key_metric not in task.declared_metrics.model_fields:
        yield f"{job.path / SERVER_FILE}: the key metric {task.key_metric} is none that the task computes"


def _quorum(job: JobFolder) -> Iterator[str]:
    where, needed, required = job.path / META_FILE, job.workflow.min_clients, job.workflow.required_sites
    if job.meta.get(JobMetaKey.MIN_CLIENTS.value) != job.sites_needed:
        counted = f" and one more, for {job.leave_out}, which leave_out names" if job.leave_out else ""
        yield f"{where}: min_clients differs from the workflow's, {needed}{counted}; write {job.sites_needed}"
    if sorted(job.meta.get(JobMetaKey.MANDATORY_CLIENTS.value) or []) != sorted(required):
        yield f"{where}: mandatory_clients differs from the workflow's required_sites; make them equal"
    if needed < 2:
        yield f"{job.path / SERVER_FILE}: min_clients is {needed}: a round would pass on one site's model as it is"
    if len(required) > needed:
        yield f"{job.path / SERVER_FILE}: min_clients is {needed}, and required_sites names {len(required)} already"
    sites = {name for app in job.meta.get("deploy_map", {}).values() for name in extract_participants(app)}
    sites.discard(SERVER_SITE_NAME)
    if job.leave_out and job.evaluation is None:
        yield f"{job.path / SERVER_FILE}: leave_out names {job.leave_out}, and no CrossSiteEvaluation follows to ask it"
    if ALL_SITES not in sites:
        if absent := sorted(set(required) - sites):
            yield f"{where}: the job is not deployed to {absent[0]}, which must take part"
        if job.leave_out and job.leave_out not in sites:
            yield f"{where}: the job is not deployed to {job.leave_out}, which leave_out names"
        trained = sites - {job.leave_out}
        if len(trained) <= needed:
            remedy = "lower min_clients" if len(trained) > 2 else "deploy it to more sites"
            yield (
                f"{where}: the job trains at {len(trained)} sites and needs {needed} in every round: one absence ends "
                f"it; {remedy}"
            )


def _timeouts(job: JobFolder, settings: JobSettings) -> Iterator[str]:
    where = job.path / SERVER_FILE
    size = sum(4 * math.prod(shape) for shape in declare(settings).update.values())
    there = math.ceil(8 * size / SLOW_LINE)
    told = f"sending the model of {size / 1e6:.0f} MB takes {there} s on a line of {SLOW_LINE / 1e6:.0f} Mbit/s"
    if job.workflow.round_timeout < 4 * there:
        yield f"{where}: round_timeout is {job.workflow.round_timeout} s; {told}; give at least {4 * there}"
    if job.evaluation is not None and job.evaluation.timeout < 2 * there:
        yield f"{where}: the evaluation's timeout is {job.evaluation.timeout} s; {told}; give at least {2 * there}"
    if job.workflow.straggler_wait > job.workflow.round_timeout:
        yield f"{where}: straggler_wait is longer than round_timeout, and would never end"
