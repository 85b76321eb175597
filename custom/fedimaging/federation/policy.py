"""What a site lets a job do: the one source of the allow-list and the site policies, for simulator, POC and kits."""

import json
from pathlib import Path
from typing import Any

ALLOWED_CLASSES = (
    "fedimaging.federation.evaluation.CrossSiteEvaluation",
    "fedimaging.federation.executor.TrainerExecutor",
    "fedimaging.federation.persistor.NetworkPersistor",
    "fedimaging.federation.workflow.FederatedAveraging",
)

_LONG_LIVED = {"id": "long_lived_process", "path": "fedimaging.federation.process.LongLivedProcess", "args": {}}
_LOG_BYTES, _LOG_FILES = 20 * 2**20, 10


def resources() -> dict[str, Any]:
    """The allow-list, enforced: what every FLARE ``resources.json`` of this project holds."""
    return {
        "format_version": 2,
        "class_allow_list": list(ALLOWED_CLASSES),
        "class_list_enforcement_mode": "enforce",
    }


def client_resources(gpus: int | str = 0, gpu_memory: int | str = 0) -> dict[str, Any]:
    """A site's ``resources.json``: the allow-list, no log streaming, and what jobs may use.

    Args:
        gpus: how many GPUs jobs may use; or the name that stands for it in a template.
        gpu_memory: memory of each, in GiB; or its name.
    """
    manager = {"num_of_gpus": gpus, "mem_per_gpu_in_GiB": gpu_memory, "expiration_period": 300}
    return resources() | {
        "allow_log_streaming": False,
        "client": {"retry_timeout": 30, "compression": "Gzip"},
        "components": [
            _component("resource_manager", "resource_managers.gpu_resource_manager.GPUResourceManager", manager),
            _component("resource_consumer", "resource_consumers.gpu_resource_consumer.GPUResourceConsumer"),
            _component("process_launcher", "job_launcher.client_process_launcher.ClientProcessJobLauncher"),
            _LONG_LIVED,
            {"id": "app_deployer", "path": "fedimaging.federation.restarts.KeepingDeployer", "args": {}},
        ],
    }


def server_resources(storage: str) -> dict[str, Any]:
    """The server's ``resources.json``. Jobs and snapshots are kept below ``storage``, a folder or its name."""
    files = "nvflare.app_common.storages.filesystem_storage.FilesystemStorage"
    return resources() | {
        "servers": [
            {"admin_storage": "transfer", "max_num_clients": 100, "heart_beat_timeout": 600, "admin_timeout": 10.0}
        ],
        "snapshot_persistor": {
            "path": "nvflare.app_common.state_persistors.storage_state_persistor.StorageStatePersistor",
            "args": {
                "uri_root": "/",
                "storage": {"path": files, "args": {"root_dir": f"{storage}/snapshots", "uri_root": "/"}},
            },
        },
        "components": [
            _component("job_scheduler", "job_schedulers.job_scheduler.DefaultJobScheduler", {"max_jobs": 4}),
            {
                "id": "job_manager",
                "path": "nvflare.apis.impl.job_def_manager.SimpleJobDefManager",
                "args": {"uri_root": f"{storage}/jobs", "job_store_id": "job_store"},
            },
            {"id": "job_store", "path": files},
            _component("process_launcher", "job_launcher.server_process_launcher.ServerProcessJobLauncher"),
            _LONG_LIVED,
            {"id": "restarts", "path": "fedimaging.federation.restarts.Restarts", "args": {}},
        ],
    }


def server_parent_resources(storage: str) -> dict[str, Any]:
    """What only the server's long-lived process loads, besides ``resources.json``: the check of the revocation list."""
    path = "fedimaging.federation.revocation.RevocationCheck"
    return {
        "format_version": 2,
        "components": [{"id": "revocation_check", "path": path, "args": {"storage": storage}}],
    }


def authorization() -> dict[str, Any]:
    """Who may do what at a site or the server. What is not named here is denied.

    Nobody brings code. Leads submit and manage their own jobs, org admins operate the sites of their own organisation,
    the project admin stops and starts all, members look. Shell commands and the error texts of a site are for the
    admins of its own organisation.
    """
    nobody = dict.fromkeys(("byoc", "server-predeployed-flwr", "call", "submit_job", "clone_job", "operate"), "none")
    no_shell = dict.fromkeys(("shell_commands", "show_errors", "configure_site_log"), "none")
    looks = {**nobody, **no_shell, "view": "any"}
    runs_site = {**looks, **dict.fromkeys(no_shell, "o:site")}
    own_jobs = dict.fromkeys(("clone_job", "manage_job", "download_job"), "n:submitter")
    return {
        "format_version": "1.0",
        "permissions": {
            "project_admin": {**runs_site, "manage_job": "any", "download_job": "any", "operate": "any"},
            "org_admin": {**runs_site, "manage_job": "o:submitter", "download_job": "o:submitter", "operate": "o:site"},
            "lead": {**looks, **own_jobs, "submit_job": "any"},
            "member": looks,
        },
    }


def privacy() -> dict[str, Any]:
    """A site's ``privacy.json``: one scope, the default, with the gate as the last filter of results."""
    # The simulator gives its server this file too; the direction says that the gate is for sites.
    gate = {"path": "fedimaging.federation.gate.Gate", "args": {}, "direction": "out"}
    scope = {"name": "default", "properties": {}, "task_data_filters": [], "task_result_filters": [gate]}
    return {"scopes": [scope], "default_scope": "default"}


def log_config() -> dict[str, Any]:
    """Python logging for a site or the server: rotating files, see :func:`logs.redact`."""
    text = "%(asctime)s - %(name)s - %(levelname)s - %(fl_ctx)s - %(message)s"
    full = "%(asctime)s - %(name)s - %(fullName)s - %(levelname)s - %(fl_ctx)s - %(message)s"
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "baseFormatter": {"()": "fedimaging.federation.logs.TextFormatter", "fmt": text},
            "jsonFormatter": {"()": "fedimaging.federation.logs.JsonLinesFormatter", "fmt": full},
        },
        "handlers": {
            "consoleHandler": {
                "class": "logging.StreamHandler",
                "level": "INFO",
                "formatter": "baseFormatter",
                "stream": "ext://sys.stdout",
            },
            "logFileHandler": _log_file("log.txt"),
            "errorFileHandler": _log_file("error_log.txt", level="ERROR"),
            "jsonFileHandler": _log_file("log.json", formatter="jsonFormatter"),
        },
        "loggers": {
            "root": {
                "level": "INFO",
                "handlers": ["consoleHandler", "logFileHandler", "errorFileHandler", "jsonFileHandler"],
            }
        },
    }


def write_policies(local: Path) -> None:
    """Writes a simulator workspace's ``local/resources.json``, the enforced allow-list, and ``privacy.json``."""
    write_json(local / "resources.json", resources())
    write_json(local / "privacy.json", privacy())


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_bytes(to_json(content))


def to_json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"


def _component(name: str, path: str, args: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"id": name, "path": f"nvflare.app_common.{path}", "args": args or {}}


def _log_file(name: str, level: str = "DEBUG", formatter: str = "baseFormatter") -> dict[str, Any]:
    return {
        "class": "logging.handlers.RotatingFileHandler",
        "level": level,
        "formatter": formatter,
        "filename": name,
        "mode": "a",
        "maxBytes": _LOG_BYTES,
        "backupCount": _LOG_FILES,
    }
