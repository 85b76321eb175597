"""The federation's description, ``project.yml``: read with line numbers, and checked before anything is built."""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedimaging.errors import FedImagingError

PROJECT_FILE = Path(__file__).with_name("project.yml")
ROLES = ("project_admin", "org_admin", "lead", "member")
BUILDERS = (
    "nvflare.lighter.impl.workspace.WorkspaceBuilder",
    "provisioning.builders.ManifestBuilder",
    "nvflare.lighter.impl.static_file.StaticFileBuilder",
    "provisioning.builders.CertificateBuilder",
    "provisioning.builders.SiteBuilder",
)
LASTING = ("type", "org", "role", "default_host", "host_names", "fed_learn_port", "admin_port")
"""what of a participant stands in its kit and cannot change afterwards"""

_KEYS = {"api_version", "name", "description", "participants", "builders"}
_COMMON_KEYS = {"name", "type", "org"}
_TYPE_KEYS = {
    "server": {"fed_learn_port", "admin_port", "default_host", "host_names", "storage"},
    "client": {"capacity"},
    "admin": {"role"},
}
_CAPACITY_KEYS = {"num_of_gpus", "mem_per_gpu_in_GiB"}
_RESERVED = {"server", "client", "admin", "all", "simulator_server", "startup", "local", "transfer"}
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_ORG = re.compile(r"[A-Za-z0-9_]+")
_EMAIL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._%+-]*@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}")
_COMMON_NAME_LENGTH = 63

Path_ = tuple[str | int, ...]


@dataclass(frozen=True, order=True)
class Problem:
    """Something wrong or, as a ``warning``, worth knowing, in one line of the project file."""

    line: int
    text: str
    warning: bool = False


class ProjectFile:
    """A parsed project file that knows on which line each of its values stands."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.repeated: list[Problem] = []
        self._lines: dict[Path_, int] = {}
        try:
            text = path.read_text(encoding="utf-8")
            loader = yaml.SafeLoader(text)
            node: yaml.Node | None = loader.get_single_node()
            self.content: Any = loader.construct_document(node) if node else None
        except OSError as error:
            raise FedImagingError(f"{path}: can't be read: {error.strerror}; name it with --project") from None
        except UnicodeDecodeError:
            raise FedImagingError(f"{path}: is not UTF-8 text") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise FedImagingError(
                f"{path}{line}: not YAML: {getattr(error, 'problem', None) or 'wrong syntax'}"
            ) from None
        if node is None or not isinstance(self.content, dict):
            raise FedImagingError(f"{path}: must hold the keys {', '.join(sorted(_KEYS))}")
        self._note_lines(node, ())

    def line(self, *path: str | int) -> int:
        """The line of a value, or of the nearest thing around it that is there."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)

    def participants(self) -> list[dict[str, Any]]:
        raw = self.content.get("participants")
        return [entry for entry in raw if isinstance(entry, dict)] if isinstance(raw, list) else []

    def _note_lines(self, node: yaml.Node, path: Path_) -> None:
        self._lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                inner = (*path, str(key.value))
                if inner in seen:
                    self.repeated.append(Problem(key.start_mark.line + 1, f"{key.value} stands here a second time"))
                seen.add(inner)
                self._lines[inner] = key.start_mark.line + 1
                self._note_lines(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self._note_lines(value, (*path, index))


def check(
    file: ProjectFile, built: Mapping[str, Mapping[str, Any]] | None = None, resolve: bool = True
) -> list[Problem]:
    """All that is wrong with a project file, by line.

    Args:
        file: the file.
        built: the participants of earlier builds by name, with what of them cannot change.
        resolve: whether to look up the server's host names.
    """
    problems = [*file.repeated, *_check_top(file), *_check_builders(file)]
    for index, entry in _entries(file, problems):
        problems += _check_participant(file, index, entry)
    problems += _check_names(file)
    problems += _check_organisations(file)
    problems += _check_server(file, resolve)
    problems += _check_against_last(file, built or {})
    return sorted(set(problems))


def _entries(file: ProjectFile, problems: list[Problem]) -> Iterator[tuple[int, dict[str, Any]]]:
    raw = file.content.get("participants")
    for index, entry in enumerate(raw if isinstance(raw, list) else []):
        if isinstance(entry, dict):
            yield index, entry
        else:
            problems.append(Problem(file.line("participants", index), "a participant needs name, type and org"))


def _check_top(file: ProjectFile) -> Iterator[Problem]:
    content = file.content
    for key in content:
        if key not in _KEYS:
            yield Problem(file.line(str(key)), f"unknown key {key}; known here: {', '.join(sorted(_KEYS))}")
    if content.get("api_version") not in {3, 4}:
        yield Problem(file.line("api_version"), "api_version must be 3")
    if not _ORG.fullmatch(str(content.get("name") or "")) or len(str(content.get("name"))) > _COMMON_NAME_LENGTH:
        yield Problem(file.line("name"), "name must be up to 63 letters, digits and _; it names the federation")
    if not isinstance(content.get("participants"), list):
        yield Problem(file.line("participants"), "participants must be a list: a server, hospitals and people")


def _check_builders(file: ProjectFile) -> Iterator[Problem]:
    raw = file.content.get("builders")
    paths = [entry.get("path") for entry in raw if isinstance(entry, dict)] if isinstance(raw, list) else []
    for name in BUILDERS:
        if name not in paths:
            yield Problem(file.line("builders"), f"the builder {name} is missing; take the list of the example")
    order = [path for path in paths if path in BUILDERS]
    if sorted(order) == sorted(BUILDERS) and order != list(BUILDERS):
        yield Problem(file.line("builders"), f"the builders' order must be {', '.join(BUILDERS)}")
    for index, entry in enumerate(raw if isinstance(raw, list) else []):
        for key, value in (entry.get("args") or {}).items() if isinstance(entry, dict) else ():
            if str(key).endswith("valid_days") and (type(value) is not int or not 1 <= value <= 36500):
                yield Problem(file.line("builders", index, "args", str(key)), f"{key} must be a number of days")


def _check_participant(file: ProjectFile, index: int, entry: dict[str, Any]) -> Iterator[Problem]:
    def at(*keys: str) -> int:
        return file.line("participants", index, *keys)

    kind = entry.get("type")
    if kind not in _TYPE_KEYS:
        yield Problem(at("type"), f"unknown type {kind!r}; known: {', '.join(_TYPE_KEYS)}")
        return
    known = _COMMON_KEYS | _TYPE_KEYS[kind]
    for key in entry:
        if key not in known:
            yield Problem(at(str(key)), f"unknown key {key} of a {kind}; known: {', '.join(sorted(known))}")
    if fault := _name_fault(kind, entry.get("name")):
        yield Problem(at("name"), fault)
    if not isinstance(entry.get("org"), str) or not _ORG.fullmatch(entry["org"]):
        yield Problem(at("org"), f"org must be letters, digits and _, not {entry.get('org')!r}")
    if kind == "admin" and entry.get("role") not in ROLES:
        yield Problem(at("role"), f"unknown role {entry.get('role')!r}; known: {', '.join(ROLES)}")
    if kind == "client":
        yield from _check_capacity(at, entry.get("capacity", {}))
    if kind == "server":
        yield from _check_server_entry(at, entry)


def _name_fault(kind: str, name: Any) -> str | None:
    if not isinstance(name, str) or not 1 <= len(name) <= _COMMON_NAME_LENGTH:
        return f"a {kind} needs a name of up to {_COMMON_NAME_LENGTH} characters, which is what a certificate holds"
    if kind == "server":
        return _host_fault(name)
    if name.lower() in _RESERVED:
        return f"the name {name!r} means something else to FLARE; choose another"
    if kind == "client" and not _SITE.fullmatch(name):
        return f"a site's name must be letters, digits, - and _, not {name!r}"
    if kind == "admin" and not _EMAIL.fullmatch(name):
        return f"a person's name must be an e-mail address, not {name!r}"
    return None


def _host_fault(host: Any) -> str | None:
    if not isinstance(host, str) or not host:
        return "a host name is missing here"
    if all(_LABEL.fullmatch(label) for label in host.split(".")):
        return None
    return f"{host!r} is no host name: letters, digits and - between dots, as fl.example.org"


def _check_capacity(at: Callable[..., int], capacity: Any) -> Iterator[Problem]:
    text = "capacity must be {num_of_gpus: NUMBER, mem_per_gpu_in_GiB: NUMBER}"
    if not isinstance(capacity, dict):
        yield Problem(at("capacity"), text)
        return
    for key, value in capacity.items():
        if key not in _CAPACITY_KEYS or type(value) is not int or value < 0:
            yield Problem(at("capacity", key), text)


def _check_server_entry(at: Callable[..., int], entry: dict[str, Any]) -> Iterator[Problem]:
    for key in ("fed_learn_port", "admin_port"):
        port = entry.get(key, 8002)
        if type(port) is not int or not 1 <= port <= 65535:
            yield Problem(at(key), f"{key} must be a number from 1 to 65535, not {port!r}")
    if "admin_port" in entry and entry["admin_port"] == entry.get("fed_learn_port", 8002):
        yield Problem(
            at("admin_port"),
            f"port {entry['admin_port']} is in use twice; leave admin_port out, the port is then shared",
        )
    names = entry.get("host_names", [])
    for host in [
        *(names if isinstance(names, list) else [names]),
        *([entry["default_host"]] if "default_host" in entry else []),
    ]:
        if fault := _host_fault(host):
            yield Problem(at("default_host" if host == entry.get("default_host") else "host_names"), fault)
    storage = entry.get("storage")
    if not isinstance(storage, str) or not storage.startswith("/"):
        yield Problem(at("storage"), "storage must be an absolute folder at the server, as /var/lib/fedimaging")


def _check_names(file: ProjectFile) -> Iterator[Problem]:
    first: dict[str, tuple[int, str]] = {}
    for index, entry in enumerate(file.content.get("participants") or []):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            continue
        line = file.line("participants", index, "name")
        if name.lower() in first:
            other, spelled = first[name.lower()]
            how = "again" if spelled == name else f"as {spelled!r}, which differs in capitals only,"
            yield Problem(line, f"the name {name!r} stands {how} in line {other}")
        first.setdefault(name.lower(), (line, name))


def _check_organisations(file: ProjectFile) -> Iterator[Problem]:
    entries = file.participants()
    admins = {entry.get("org") for entry in entries if entry.get("role") == "org_admin"}
    spelled: dict[str, str] = {}
    for index, entry in enumerate(file.content.get("participants") or []):
        org = entry.get("org") if isinstance(entry, dict) else None
        if not isinstance(org, str):
            continue
        line = file.line("participants", index, "org")
        if spelled.setdefault(org.lower(), org) != org:
            yield Problem(line, f"org {org!r} and {spelled[org.lower()]!r} are the same to FLARE; spell it one way")
        if entry.get("type") == "client" and org not in admins:
            yield Problem(line, f"the organisation {org} has no org_admin; add a person with that role")
    roles = Counter(entry.get("role") for entry in entries)
    top = file.line("participants")
    if not roles["project_admin"]:
        yield Problem(top, "nobody is project_admin")
    if not roles["lead"]:
        yield Problem(top, "nobody is lead, so nobody can submit a job", warning=True)


def _check_server(file: ProjectFile, resolve: bool) -> Iterator[Problem]:
    servers = [
        (index, entry)
        for index, entry in enumerate(file.content.get("participants") or [])
        if isinstance(entry, dict) and entry.get("type") == "server"
    ]
    if len(servers) != 1:
        yield Problem(file.line("participants"), f"there must be one server, not {len(servers)}")
    if not any(entry.get("type") == "client" for entry in file.participants()):
        yield Problem(file.line("participants"), "there is no hospital: no participant of the type client")
    for index, entry in servers if resolve else []:
        key = "default_host" if "default_host" in entry else "name"
        host = entry.get(key)
        if _host_fault(host) is None and not _resolves(str(host)):
            text = f"the server's name {host} does not resolve from here; hospitals must be able to look it up"
            yield Problem(file.line("participants", index, key), text, warning=True)


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def _check_against_last(file: ProjectFile, built: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    here = {}
    for index, entry in enumerate(file.content.get("participants") or []):
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            here[entry["name"]] = (index, entry)
    for name, before in built.items():
        if name not in here:
            new = [
                n for n, (_, e) in here.items() if n not in built and all(e.get(k) == before.get(k) for k in LASTING)
            ]
            line = file.line("participants", here[new[0]][0], "name") if len(new) == 1 else file.line("participants")
            hint = f"; was it renamed to {new[0]}?" if len(new) == 1 else ""
            if "removed" not in before:
                text = f"{name} is gone since the last build, and its certificate is still valid{hint}"
                yield Problem(line, f"{text}; `python -m provisioning remove {name}` ends that")
            continue
        index, entry = here[name]
        if "removed" in before:
            text = f"{name} was removed on {before['removed'][:10]} and cannot come back; delete it, or use a new name"
            yield Problem(file.line("participants", index, "name"), text)
            continue
        for key in LASTING:
            if entry.get(key) != before.get(key):
                text = (
                    f"{key} of {name} was {before.get(key)!r} when its kit was built, and cannot change; use a new name"
                )
                yield Problem(file.line("participants", index, key), text)
