"""A job folder as its settings: read and checked before FLARE sees it, and copied with settings changed."""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedimaging.errors import FedImagingError, Reason
from fedimaging.federation.policy import ALLOWED_CLASSES
from fedimaging.federation.protocol import CLIENT_CONFIG, SERVER_CONFIG
from fedimaging.settings import holds_placeholder, parse
from fedimaging.training.settings import JobSettings
from fedimaging.training.strategies import DEFAULT_STRATEGY

if TYPE_CHECKING:
    from fedimaging.federation.evaluation import EvaluationSettings
    from fedimaging.federation.workflow import WorkflowSettings

META_FILE = "meta.json"
SERVER_FILE, CLIENT_FILE = f"app/config/{SERVER_CONFIG}", f"app/config/{CLIENT_CONFIG}"
_EXECUTOR = "fedimaging.federation.executor.TrainerExecutor"
_PERSISTOR = "fedimaging.federation.persistor.NetworkPersistor"
_WORKFLOW = "fedimaging.federation.workflow.FederatedAveraging"
_SHARED = ("task", "network", "seed")
_WORKFLOW_NAMES = {
    "rounds": "num_rounds",
    **{
        name: name
        for name in ("min_clients", "required_sites", "round_timeout", "straggler_wait", "continues", "leave_out")
    },
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class JobFolder:
    """A job folder: ``meta.json`` and ``app/config/*.json``.

    Raises:
        FedImagingError: the folder is not one of this project's jobs, names a class off the allow-list, or would read
            an environment variable; the message says which file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta = self._read(META_FILE)
        if not _NAME.fullmatch(str(self.meta.get("name", ""))):
            raise _bad(path / META_FILE, "name: expected letters, digits, '_', '.' and '-', 64 at most")
        self.server = self._read(SERVER_FILE)
        self.client = self._read(CLIENT_FILE)
        if (path / "app" / "custom").exists():
            raise _bad(path / "app/custom", "a job is configuration only; the sites refuse code that comes with it")
        for file, config in ((SERVER_FILE, self.server), (CLIENT_FILE, self.client)):
            for name in _class_paths(config):
                if name not in ALLOWED_CLASSES:
                    raise _bad(path / file, f"the class {name} is not on the sites' allow-list")
        self._executor = self._component(self.client, _EXECUTOR, CLIENT_FILE)
        self._persistor = self._component(self.server, _PERSISTOR, SERVER_FILE)
        self._workflow = self._component(self.server, _WORKFLOW, SERVER_FILE)

    @property
    def name(self) -> str:
        return str(self.meta["name"])

    @property
    def rounds(self) -> int:
        return int(self._workflow["num_rounds"])

    @property
    def min_clients(self) -> int:
        return int(self._workflow["min_clients"])

    @property
    def sites_needed(self) -> int:
        """Sites without which FLARE need not start the job, meta.json's ``min_clients``: it counts the one left out."""
        return self.workflow.min_clients + bool(self.leave_out)

    @property
    def leave_out(self) -> str:
        """The site that does not train; empty for none."""
        return self.workflow.leave_out

    @property
    def workflow(self) -> "WorkflowSettings":
        """The validated settings of the server's workflow. Raises FedImagingError."""
        from fedimaging.federation.workflow import WorkflowSettings

        return parse(WorkflowSettings, self._workflow, "workflow")

    @property
    def evaluation(self) -> "EvaluationSettings | None":
        """The validated settings of the cross-site evaluation, if the job has one. Raises FedImagingError."""
        from fedimaging.federation.evaluation import EvaluationSettings

        arguments = _find(self.server, "fedimaging.federation.evaluation.CrossSiteEvaluation")
        return None if arguments is None else parse(EvaluationSettings, arguments, "evaluation")

    def settings(self) -> JobSettings:
        """The validated settings of the sites' trainer and the server's workflow; both must build one network."""
        workflow, evaluation = self.workflow, self.evaluation
        if workflow.leave_out and evaluation is not None and evaluation.site_models:
            raise _bad(
                self.path / SERVER_FILE,
                f"site_models asks each site for its model, and {workflow.leave_out}, which leave_out names, has none; "
                "drop one of the two",
            )
        unequal = [name for name in _SHARED if self._executor.get(name) != self._persistor.get(name)]
        if unequal:
            raise _bad(
                self.path / SERVER_FILE, f"{unequal[0]!r} differs from the one in {CLIENT_FILE}; make them equal"
            )
        if self._executor.get("fedimaging") != self._workflow.get("fedimaging"):
            raise _bad(self.path / SERVER_FILE, f"'fedimaging' differs from the one in {CLIENT_FILE}; make them equal")
        settings = JobSettings(self._executor)
        if workflow.strategy != settings.training.strategy:
            raise _bad(
                self.path / SERVER_FILE,
                f"the workflow's strategy differs from training.strategy in {CLIENT_FILE}; make them equal",
            )
        return settings

    def override(self, changes: Mapping[str, Any]) -> None:
        """Changes settings in memory, by dotted name: ``rounds``, ``training.epochs``, ``task.image_size``, ..."""
        for name, value in changes.items():
            first, *rest = name.split(".")
            if first in _WORKFLOW_NAMES and not rest:
                self._workflow[_WORKFLOW_NAMES[first]] = value
            elif first in self._executor:
                other = self._persistor if first in _SHARED else self._workflow if first == "fedimaging" else None
                for owner in (self._executor, other) if other is not None else (self._executor,):
                    _assign(owner, [first, *rest], value, name)
                if name == "training" and isinstance(value, dict):
                    self._workflow["strategy"] = copy.deepcopy(value.get("strategy", DEFAULT_STRATEGY))
                elif (first, *rest)[:2] == ("training", "strategy"):
                    _assign(self._workflow, rest, value, name)
            else:
                known = ", ".join([*_WORKFLOW_NAMES, *self._executor])
                raise FedImagingError(f"--set {name}: no such setting; a name starts with one of {known}")
        if "required_sites" in changes:
            self.meta["mandatory_clients"] = self.workflow.required_sites
        if "min_clients" in changes or "leave_out" in changes:
            self.meta["min_clients"] = self.sites_needed

    def write(self, folder: Path) -> None:
        """Writes the job, as it is now in memory, to a folder that is new or empty."""
        for file, config in ((META_FILE, self.meta), (SERVER_FILE, self.server), (CLIENT_FILE, self.client)):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(json.dumps(config, indent=4))

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            text = path.read_text()
        except OSError:
            raise _bad(path, "no such file; give a job folder such as jobs/chest_xray_fedavg") from None
        try:
            config = json.loads(text)
        except json.JSONDecodeError as error:
            raise _bad(path, f"not JSON: line {error.lineno}: {error.msg}") from None
        if not isinstance(config, dict):
            raise _bad(path, "expected a JSON object")
        if holds_placeholder(config):
            raise _bad(path, "holds {...}, which FLARE may replace by an environment variable; write the value itself")
        return config

    def _component(self, config: dict[str, Any], class_path: str, file: str) -> dict[str, Any]:
        args = _find(config, class_path)
        if args is None:
            raise _bad(self.path / file, f"names no {class_path}")
        return args


def parse_changes(pairs: list[str]) -> dict[str, Any]:
    """Names and values of ``["rounds=3", "task.classes=a,b"]``; a value is JSON, else text, with commas a list."""
    changes: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise FedImagingError(f"--set {pair}: expected NAME=VALUE, for example --set rounds=3")
        try:
            changes[name] = json.loads(text)
        except json.JSONDecodeError:
            changes[name] = text.split(",") if "," in text else text
    return changes


def _find(config: Any, class_path: str) -> dict[str, Any] | None:
    """The arguments of the component of a class, wherever it stands."""
    if isinstance(config, dict):
        if config.get("path") == class_path:
            args: dict[str, Any] = config.setdefault("args", {})
            return args
        return next((found for value in config.values() if (found := _find(value, class_path)) is not None), None)
    if isinstance(config, list):
        return next((found for value in config if (found := _find(value, class_path)) is not None), None)
    return None


def _class_paths(config: Any) -> list[str]:
    if isinstance(config, dict):
        own = [str(config[key]) for key in ("path", "class_path") if key in config]
        return own + [name for value in config.values() for name in _class_paths(value)]
    if isinstance(config, list):
        return [name for value in config for name in _class_paths(value)]
    return []


def _assign(owner: dict[str, Any], names: list[str], value: Any, full_name: str) -> None:
    for part in names[:-1]:
        owner = owner.setdefault(part, {})
        if not isinstance(owner, dict):
            raise FedImagingError(f"--set {full_name}: {part} is a value, not a group of settings")
    owner[names[-1]] = value


def _bad(where: Path, what: str) -> FedImagingError:
    return FedImagingError(f"{where}: {what}", Reason.BAD_SETTING)
