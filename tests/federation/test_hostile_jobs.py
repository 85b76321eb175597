"""Nothing that a job puts into an argument of our components runs, reads, writes or is echoed."""

import builtins
import inspect
import io
import os
import socket
import subprocess
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer

from fedimaging.errors import FedImagingError
from fedimaging.federation.policy import ALLOWED_CLASSES, write_policies
from fedimaging.federation.session import Session
from fedimaging.settings import Settings

TASK = {"name": "classification", "classes": ["normal", "pneumonia"], "image_size": 32}
NETWORK = {"name": "ResNet18"}
GOOD: dict[str, dict[str, object]] = {
    "fedimaging.federation.evaluation.CrossSiteEvaluation": {"timeout": 60, "site_models": False},
    "fedimaging.federation.workflow.FederatedAveraging": {
        "num_rounds": 1, "min_clients": 1, "required_sites": [], "round_timeout": 60, "straggler_wait": 60,
        "continues": "", "fedimaging": "~=0.1.0",
        "strategy": {"name": "fedprox"}, "leave_out": "hospital-a",
    },
    "fedimaging.federation.persistor.NetworkPersistor": {"task": TASK, "network": NETWORK, "seed": 0},
    "fedimaging.federation.executor.TrainerExecutor": {
        "dataset": "chest_xray", "task": TASK, "network": NETWORK, "training": {"strategy": {"name": "fedprox"}},
        "seed": 0, "fedimaging": "~=0.1.0"
    },
}  # fmt: skip
COMMAND = "touch /tmp/fedimaging-was-here"
HOSTILE = {
    "class": {"path": "subprocess.Popen", "args": {"args": COMMAND, "shell": True}},
    "class as dict": {"config_type": "dict", "path": "subprocess.Popen", "args": {"args": COMMAND, "shell": True}},
    "class by name": {"name": "subprocess.Popen", "args": [COMMAND]},
    "class attributes": {"class_attributes": {"__class__": "subprocess.Popen"}},
    "path": "../../../../etc/passwd",
    "absolute path": "/etc/passwd",
    "url": "https://203.0.113.9/model.pt",
    "command": f"; {COMMAND} #",
    "python": f"__import__('os').system('{COMMAND}')",
    "environment": "{$FEDIMAGING_TEST_SECRET}",
    "secret": "${secret:FEDIMAGING_TEST_SECRET}",
    "list": [{"path": "subprocess.Popen"}],
    "huge": 10**40,
    "negative": -1,
    "nan": float("nan"),
    "none": None,
}
ARGUMENTS = [(path, name) for path, good in GOOD.items() for name in good]


@pytest.fixture(autouse=True)
def no_way_out(monkeypatch):
    """Any process, connection or unusual file fails the test."""
    monkeypatch.setenv("FEDIMAGING_TEST_SECRET", "SECRET-VALUE")

    def forbid(what):
        return lambda *arguments, **_: pytest.fail(f"{what} was called: {arguments}")

    for owner, names in (
        (subprocess, ["Popen", "run"]), (os, ["system", "popen", "execv", "fork"]), (socket, ["create_connection"])
    ):  # fmt: skip
        for name in names:
            monkeypatch.setattr(owner, name, forbid(name))
    opened = builtins.open

    def guarded(file, *arguments, **named):
        if any(part in str(file) for part in ("passwd", "fedimaging-was-here")):
            pytest.fail(f"opened {file}")
        return opened(file, *arguments, **named)

    monkeypatch.setattr(builtins, "open", guarded)
    monkeypatch.setattr(io, "open", guarded)


def context(tmp_path):
    fl_ctx = FLContext()
    workspace = SimpleNamespace(get_site_config_dir=lambda: str(tmp_path), get_run_dir=lambda _: str(tmp_path))
    fl_ctx.set_prop(FLContextKey.WORKSPACE_OBJECT, workspace)
    fl_ctx.set_prop(FLContextKey.APP_ROOT, str(tmp_path))
    return fl_ctx


def build(path, arguments):
    module, name = path.rsplit(".", 1)
    return getattr(import_module(module), name)(**arguments)


def use(component, tmp_path):
    """What the component does with its settings when a job starts. Returns the message of the refusal."""
    if hasattr(component, "dataset"):
        settings = {
            name: getattr(component, name) for name in ("dataset", "task", "network", "training", "seed", "fedimaging")
        }
        with pytest.raises(FedImagingError) as caught:
            Session(settings, "hospital-a", tmp_path, tmp_path).site  # noqa: B018
        return str(caught.value)
    panics = []
    component.system_panic = lambda reason, fl_ctx: panics.append(reason)
    component.handle_event(EventType.START_RUN, context(tmp_path))
    return panics[0]


def test_every_allowed_class_is_covered_and_takes_no_other_argument():
    assert set(GOOD) == set(ALLOWED_CLASSES)
    for path, good in GOOD.items():
        module, name = path.rsplit(".", 1)
        parameters = inspect.signature(getattr(import_module(module), name).__init__).parameters.values()
        assert {p.name for p in parameters} - {"self"} == set(good)
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters), "no *args or **kwargs may pass things on"


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize(("path", "name"), ARGUMENTS)
def test_a_hostile_argument_is_refused_and_does_nothing(path, name, kind, tmp_path):
    try:
        component = build(path, {**GOOD[path], name: HOSTILE[kind]})
        message = use(component, tmp_path)
    except FedImagingError as error:
        message = str(error)
    assert "SECRET-VALUE" not in message
    assert COMMAND not in message
    assert name.replace("num_", "") in message
    assert not Path("/tmp/fedimaging-was-here").exists()


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("group", ["task", "network", "training"])
def test_a_hostile_setting_inside_a_group_is_refused(group, kind, tmp_path):
    path = "fedimaging.federation.executor.TrainerExecutor"
    for name in (*GOOD[path][group], "path", "checkpoint"):
        settings = {**GOOD[path][group], name: HOSTILE[kind]}
        if settings == {**GOOD[path][group], "path": None, "checkpoint": None}:
            continue
        message = use(build(path, {**GOOD[path], group: settings}), tmp_path)
        assert group in message
        assert "SECRET-VALUE" not in message


def test_the_allow_list_refuses_everything_else(tmp_path):
    write_policies(tmp_path)
    authorizer = ComponentPathAuthorizer()
    authorizer._get_resources_file_path = lambda **_: str(tmp_path / "resources.json")
    for path in ALLOWED_CLASSES:
        authorizer.authorize_component_config({"path": path})
    for path in (
        "subprocess.Popen",
        "nvflare.app_opt.pt.file_model_persistor.PTFileModelPersistor",
        "nvflare.app_common.workflows.fedavg.FedAvg",
        "nvflare.app_common.executors.client_api_executor.ClientAPIExecutor",
        "fedimaging.federation.session.Session",
        "fedimaging.federation.executor.TrainerExecutorX",
    ):
        with pytest.raises(Exception, match="not in allow_list"):
            authorizer.authorize_component_config({"path": path})


def test_every_settings_class_forbids_what_it_does_not_know():
    def subclasses(cls):
        return [cls, *(deeper for direct in cls.__subclasses__() for deeper in subclasses(direct))]

    for settings in subclasses(Settings):
        assert settings.model_config["extra"] == "forbid"
        assert settings.model_config["strict"]
