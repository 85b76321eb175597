"""`python kit.py preflight`: what a site needs before it starts, checked in the kit's own environment, with mends.

It is run after the kit was verified. Only what is imported at the top is certain to be there: what else the checks need
may be what is missing.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from fedimaging import __version__

PYTHON = (3, 11)
"""what the lock files are for"""

_GIB = 2**30
_TIMEOUT = 10.0
_MIN_DAYS = 60
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """One check: its name, whether it passed (None: it did, but read on), what was found and what to do about it."""

    name: str
    passed: bool | None
    found: str
    mend: str = ""


def check(kit: Path) -> Iterator[Row]:
    """All checks of a hospital's or the server's kit, one after the other. A check that breaks is a failed one."""
    hospital = (kit / "startup" / "fed_client.json").exists()
    checks = [_python, _packages, _package, _own_files, _cores, _memory, _disk, _certificate, _clock]
    if hospital:
        checks += [_datasets, _grants, _gpus, _name, _connection]
    for one in [*checks, _flare]:
        name = one.__name__.strip("_").replace("_", " ")
        try:
            passed, found, *mend = one(kit)
            yield Row(name, passed, found, *mend)
        except Exception as error:
            yield Row(name, False, f"{type(error).__name__}: {error}".splitlines()[0], "mend what failed above first")


Result = tuple[bool | None, str] | tuple[bool | None, str, str]


def _python(_: Path) -> Result:
    found = ".".join(map(str, sys.version_info[:3]))
    wanted = ".".join(map(str, PYTHON))
    return sys.version_info[:2] == PYTHON, found, f"make the environment with python{wanted}: the lock files are for it"


def _packages(kit: Path) -> Result:
    """The installed packages against the lock file of this build of PyTorch."""
    torch = _installed("torch") or ""
    lock = kit / "local" / ("requirements.lock" if "+cpu" in torch or not torch else "requirements-gpu.lock")
    locked = dict(_PIN.findall(lock.read_text()))
    wrong = [f"{name} {_installed(name) or 'missing'}, not {v}" for name, v in locked.items() if _installed(name) != v]
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    found = "; ".join(wrong[:3]) + more if wrong else f"the {len(locked)} of {lock.name}"
    return not wrong, found, f"install local/{lock.name} as GUIDE.md says"


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package(kit: Path) -> Result:
    """Whether another fedimaging, which FLARE's start script would prefer, hides the kit's."""
    here, custom = list(sys.path), str(kit / "local" / "custom")
    try:
        sys.path[:] = [path for path in here if path != custom]
        hidden = any(finder.find_spec("fedimaging", None) for finder in sys.meta_path)
    finally:
        sys.path[:] = here
    if hidden:
        return False, "fedimaging is installed in the environment and hides the kit's", "pip uninstall fedimaging"
    from fedimaging.version import package_hash

    return True, f"fedimaging {__version__} ({package_hash()[:16]}), the kit's"


def _own_files(kit: Path) -> Result:
    """The site's own policies are JSON, or FLARE does not start."""
    found = []
    for name in ("resources.json", "authorization.json", "log_config.json", "privacy.json"):
        path = kit / "local" / name
        if path.exists():
            try:
                json.loads(path.read_text())
            except ValueError as error:
                return False, f"{path}: not JSON: {error}", "mend the file, or delete it to have what was delivered"
            found.append(name)
    return True, ", ".join(found) or "as delivered"


def _datasets(kit: Path) -> Result:
    """Every dataset that the site names, with the cases of each split."""
    import yaml

    from fedimaging.datasets.manifest import SPLITS
    from fedimaging.datasets.site import SITE_FILE, resolve
    from fedimaging.errors import FedImagingError

    local, counts = kit / "local", []
    named = yaml.safe_load((local / SITE_FILE).read_text()) or {}
    if not named:
        return False, f"{local / SITE_FILE} names none", "write a line for each dataset that you take part with"
    for name in named:
        try:
            manifest = resolve(str(name), _participant(kit), local).manifest
        except FedImagingError as error:
            return False, str(error), "see GUIDE.md, Your own files"
        counts.append(f"{name}: " + ", ".join(f"{len(manifest.split(split))} {split}" for split in SPLITS))
    return True, "; ".join(counts)


def _grants(kit: Path) -> Result:
    """What the data owner allows; without a grant the site runs and refuses every job."""
    from fedimaging.errors import FedImagingError
    from fedimaging.governance.grants import GRANTS_FILE, read_grants

    file = kit / "local" / GRANTS_FILE
    try:
        valid = [grant for grant in read_grants(file) if not grant.expired(datetime.now(UTC))]
    except FedImagingError as error:
        return False, str(error), "mend the file; until then every job is refused"
    if not valid:
        return None, "nothing is granted: every job is refused", "the data owner grants with `grant give`, see GUIDE.md"
    return True, "; ".join(f"{grant.job} on {grant.dataset} for {grant.who}" for grant in valid)


def _participant(kit: Path) -> str:
    return str(json.loads((kit / "kit_manifest.json").read_text())["participant"])


def _cores(_: Path) -> Result:
    cores = len(os.sched_getaffinity(0))
    return True if cores > 1 else None, str(cores), "training is slow with one core"


def _memory(_: Path) -> Result:
    import psutil

    free = psutil.virtual_memory().available
    return True if free >= 8 * _GIB else free >= 2 * _GIB and None, f"{free / _GIB:.1f} GiB free", "8 GiB are advisable"


def _disk(kit: Path) -> Result:
    free = shutil.disk_usage(kit).free
    return True if free >= 10 * _GIB else free >= _GIB and None, f"{free / _GIB:.1f} GiB free", "10 GiB are advisable"


def _gpus(kit: Path) -> Result:
    import torch

    local = kit / "local"
    own = local / "resources.json"
    resources = json.loads((own if own.exists() else local / "resources.json.default").read_text())
    managers = [part for part in resources.get("components", []) if part.get("id") == "resource_manager"]
    wanted = int(managers[0]["args"].get("num_of_gpus", 0)) if managers else 0
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mend = f"set num_of_gpus in {own}, or mend the driver, or install local/requirements-gpu.lock"
    return there >= wanted, f"{there} usable, {wanted} promised to jobs", mend


def _certificate(kit: Path) -> Result:
    from cryptography import x509

    base = "client" if (kit / "startup" / "client.crt").exists() else "server"
    until = x509.load_pem_x509_certificate((kit / "startup" / f"{base}.crt").read_bytes()).not_valid_after_utc
    days = (until - datetime.now(UTC)).days
    return True if days >= _MIN_DAYS else days >= 0 and None, f"{days} days left", "ask the project admin for a renewal"


def _clock(_: Path) -> Result:
    """Whether the machine keeps its clock by NTP; certificates are refused by a wrong one."""
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    mend = "compare with a watch; switch time synchronisation on (timedatectl set-ntp true)"
    try:
        command = ["timedatectl", "show", "--property", "NTPSynchronized", "--value"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None, f"{now}; nobody says whether it is synchronised", mend
    return True if said.stdout.strip() == "yes" else None, f"{now}, synchronised: {said.stdout.strip() or '?'}", mend


def _server(kit: Path) -> tuple[str, int]:
    config = json.loads((kit / "startup" / "fed_client.json").read_text())
    host, _, port = config["servers"][0]["service"]["target"].rpartition(":")
    return host, int(port)


def proxy_for(host: str) -> SplitResult | None:
    """The forward proxy that gRPC takes: of grpc_proxy, https_proxy and http_proxy, in small letters, the first."""
    names = next((os.environ[name] for name in ("no_grpc_proxy", "no_proxy") if os.environ.get(name)), "")
    if any(name.strip() and host.endswith(name.strip().lstrip("*")) for name in names.split(",")):
        return None
    url = next((os.environ[name] for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)), "")
    return urlsplit(url) if url else None


def _name(kit: Path) -> Result:
    host, port = _server(kit)
    if proxy := proxy_for(host):
        return True, f"{host} is resolved by the proxy {proxy.hostname}"
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except OSError as error:
        return False, f"{host}: {error.strerror}", "mend DNS, or write the server's address into /etc/hosts"
    return True, f"{host} is {', '.join(found)}"


def _connection(kit: Path) -> Result:
    """TLS with the kit's own certificate to the server's one port, up to the first bytes that the server answers."""
    host, port = _server(kit)
    where = f"{host}:{port}"
    if os.environ.get("HTTPS_PROXY") and not proxy_for(host):
        return False, "HTTPS_PROXY is set, which gRPC does not read", "name it https_proxy, in small letters"
    startup = kit / "startup"
    context = ssl.create_default_context(cafile=str(startup / "rootCA.pem"))
    context.load_cert_chain(startup / "client.crt", startup / "client.key")
    context.set_alpn_protocols(["h2"])
    try:
        with _connected(host, port) as plain, context.wrap_socket(plain, server_hostname=host) as tls:
            answer = tls.recv(9)
    except ssl.SSLCertVerificationError as error:
        mend = "somebody between here and the server opens TLS, or it is another server; tell the project admin"
        return False, f"{where}: not the server's certificate: {error.verify_message}", mend
    except ssl.SSLError as error:
        return False, f"{where}: the server refused this certificate: {error.reason}", "ask the project admin"
    except OSError as error:
        mend = f"open the firewall for outgoing TCP to {where}, or set https_proxy; is the server up?"
        return False, f"{where}: {error.strerror or error}", mend
    return (
        bool(answer),
        f"{where} answers to this certificate",
        "the server closed the connection; ask the project admin",
    )


def _connected(host: str, port: int) -> socket.socket:
    """A connection to the server, by HTTP CONNECT (RFC 9110, 9.3.6) through the site's proxy if it has one."""
    proxy = proxy_for(host)
    if proxy is None:
        return socket.create_connection((host, port), timeout=_TIMEOUT)
    connection = socket.create_connection((proxy.hostname or "", proxy.port or 80), timeout=_TIMEOUT)
    head = f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n"
    if proxy.username:
        word = base64.b64encode(f"{proxy.username}:{proxy.password or ''}".encode()).decode()
        head += f"Proxy-Authorization: Basic {word}\r\n"
    connection.sendall(f"{head}\r\n".encode())
    answer = b""
    while b"\r\n\r\n" not in answer and (part := connection.recv(1)):
        answer += part
    if b" 200 " not in answer.split(b"\r\n")[0] + b" ":
        connection.close()
        raise OSError(f"the proxy {proxy.hostname} says {answer.splitlines()[:1]}")
    return connection


def _flare(kit: Path) -> Result:
    """The rules of FLARE's own preflight check, without its dry run, which would end a kit that runs."""
    from nvflare.tool.package_checker import ClientPackageChecker, ServerPackageChecker

    if any((kit / name).exists() for name in ("pid.fl", "daemon_pid.fl")):
        return None, "not asked: the kit seems to run", "stop it first"
    for checker in (ClientPackageChecker(), ServerPackageChecker()):
        checker.init(str(kit))
        if checker.should_be_checked():
            for rule in checker.rules:
                result = (rule[0] if isinstance(rule, list) else rule)(str(kit), None)
                if result.problem != "PASSED":
                    return False, result.problem, result.solution
    return True, "FLARE's own rules are met"


def show(rows: list[Row]) -> None:
    words: dict[bool | None, str] = {True: "ok", None: "note", False: "FAILED"}
    lines = [(row.name, words[row.passed], row.found, "" if row.passed else row.mend) for row in rows]
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Column, Table
    except ImportError:
        print("\n".join("  ".join(part for part in line if part) for line in lines))
        return
    table = Table("check", "result", Column("found", overflow="fold"), Column("what to do", overflow="fold"))
    for line in lines:
        table.add_row(*map(escape, line), style={"FAILED": "red", "note": "yellow"}.get(line[1]))
    Console().print(table)


def main(kit: Path) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    rows = list(check(kit))
    show(rows)
    failed = [row.name for row in rows if row.passed is False]
    print(f"failed: {', '.join(failed)}" if failed else "this kit can be started")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
