"""One POC in one folder: FLARE's workspace, the sites' data, and the processes that run."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console

from fedimaging.datasets.site import DATA_ROOT_VARIABLE, SITE_FILE
from fedimaging.errors import FedImagingError
from fedimaging.governance.grants import grant_everything
from fedimaging.simulator import find_sites, stop_process_tree
from fedimaging.version import package_hash

console = Console(stderr=True)

REPOSITORY = Path(__file__).parents[1]
PROJECT = REPOSITORY / "provisioning" / "project.yml"
DEFAULT_FOLDER = Path("runs/poc")
DEFAULT_PORT = 8102
START_SECONDS, STOP_SECONDS = 300, 60

_MAIN_MODULES = ("server_train", "client_train")


class Poc:
    """A POC federation below ``folder``.

    ``project.yml`` is the real federation's with the server on localhost; ``flare`` is what ``nvflare poc`` keeps;
    ``home`` is where the ``nvflare`` commands look for their own configuration, so that the user's is left alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.project_file, self.workspace = self.folder / "project.yml", self.folder / "flare"
        self.home, self.results = self.folder / "home", self.folder / "results"
        self._stamp, self._last_job = self.folder / "prepared", self.folder / "last_job"

    @property
    def prepared(self) -> bool:
        return self._stamp.exists()

    @property
    def project(self) -> dict[str, Any]:
        if not self.project_file.exists():
            raise FedImagingError(f"{self.folder}: no POC here; start one with `python -m poc up`")
        content: dict[str, Any] = yaml.safe_load(self.project_file.read_text())
        return content

    @property
    def kits(self) -> Path:
        return self.workspace / str(self.project["name"]) / "prod_00"

    def participants(self, kind: str) -> list[str]:
        """Names of the participants of a type or, of people, a role."""
        return [p["name"] for p in self.project["participants"] if kind in (p["type"], p.get("role"))]

    @property
    def server(self) -> str:
        return self.participants("server")[0]

    @property
    def sites(self) -> list[str]:
        return self.participants("client")

    @property
    def port(self) -> int:
        return int(next(p["fed_learn_port"] for p in self.project["participants"] if p["type"] == "server"))

    def kit(self, role: str) -> Path:
        """The startup kit of the first person of a role."""
        return self.kits / self.participants(role)[0]

    @property
    def last_job(self) -> str:
        if not self._last_job.exists():
            raise FedImagingError("no job was submitted to this POC yet; do with `python -m poc submit JOB`")
        return self._last_job.read_text().strip()

    # --- FLARE's command ---

    def nvflare(self, *arguments: str, needs_home: bool = False) -> str:
        """Shows and runs an ``nvflare`` command. Returns what it says.

        Raises:
            FedImagingError: the command failed; the message is its last line.
        """
        shown = shlex.join(["nvflare", *arguments])
        if needs_home:
            shown = f"HOME={self.home} NVFLARE_POC_WORKSPACE={self.workspace} {shown}"
        console.print(f"[dim]$ {shown}[/dim]", highlight=False, soft_wrap=True)
        # A file, not a pipe: services that the command starts inherit its output.
        log = self.folder / "nvflare.log"
        with log.open("wb") as file:
            code = subprocess.run(  # noqa: S603
                [sys.executable, "-m", "nvflare.cli", *arguments],
                stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                cwd=REPOSITORY, env=self.environment(), check=False,
            ).returncode  # fmt: skip
        said = log.read_text(errors="replace")
        if code:
            lines = [line for line in said.splitlines() if line.strip()] or ["it said nothing"]
            raise FedImagingError(f"nvflare {arguments[0]} {arguments[1]} failed ({code}): {' '.join(lines[-3:])}")
        return said

    def environment(self) -> dict[str, str]:
        """Of nvflare's commands, and so of the server and the sites that they start."""
        environment = {name: value for name, value in os.environ.items() if name != DATA_ROOT_VARIABLE}
        # FLARE's scripts call python3, which is another one where the virtual environment is not activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
        environment |= {"HOME": str(self.home), "NVFLARE_POC_WORKSPACE": str(self.workspace), "PATH": path}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, len(self.sites)))))
        return environment

    # --- making it ---

    def prepare(self, data: Path, port: int) -> None:
        """Makes kits for the sites of a data root, each with its datasets, and the grants to use them."""
        sites = find_sites(data)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.home.mkdir(exist_ok=True)
        self._stamp.unlink(missing_ok=True)
        project = yaml.safe_load(PROJECT.read_text())
        project["participants"] = _participants(project["participants"], list(sites), port)
        self.project_file.write_text(yaml.safe_dump(project, sort_keys=False))
        self.nvflare("poc", "prepare", "-i", str(self.project_file), "--force", needs_home=True)
        if not self.kits.is_dir():
            raise FedImagingError(f"nvflare poc prepare made no kits; what it said is in {self.folder / 'nvflare.log'}")
        for site, datasets in sites.items():
            local = self.kits / site / "local"
            entries = {name: {"path": str(data.resolve() / site / name)} for name in datasets}
            (local / SITE_FILE).write_text(yaml.safe_dump(entries))
            grant_everything(local, datasets)
        self._stamp.write_text(self._state(data, port))

    def fits(self, data: Path, port: int | None) -> bool:
        """Whether what was prepared is of this package, data root and port, so that it can just be started."""
        return self.prepared and self._stamp.read_text() == self._state(data, port or self.port)

    def _state(self, data: Path, port: int) -> str:
        return f"{package_hash()} {data.resolve()} {port}\n"

    # --- processes ---

    def processes(self) -> list[psutil.Process]:
        """Every process of this POC: those whose command line names a kit of it."""
        mine = f"{self.workspace}{os.sep}"
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                if process.pid != os.getpid() and any(mine in f"{part}{os.sep}" for part in process.cmdline()):
                    found.append(process)
        return found

    def running(self) -> dict[str, psutil.Process]:
        """The main process of the server and of each site that runs."""
        mains: dict[str, psutil.Process] = {}
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                line = " ".join(process.cmdline())
                if any(module in line for module in _MAIN_MODULES):
                    mains |= {name: process for name in (self.server, *self.sites) if f"{self.kits / name} " in line}
        return mains

    def start(self, names: list[str]) -> None:
        """Starts the server and the sites, or those of them that are down, and waits until all are registered."""
        whole = set(names) == {self.server, *self.sites}
        chosen = [] if whole else [part for name in names for part in ("-p", name)]
        # With the server down its sites start over: they would wait for it for long.
        self.nvflare("poc", "start", *chosen, "--timeout", str(START_SECONDS), needs_home=True)
        deadline = time.monotonic() + START_SECONDS
        while absent := self._unregistered():
            if time.monotonic() > deadline:
                raise FedImagingError(
                    f"{', '.join(absent)} did not register within {START_SECONDS} s; see "
                    f"{self.kits / absent[0] / 'poc_console.log'}"
                )
            time.sleep(2)

    def _unregistered(self) -> list[str]:
        said = self.nvflare("system", "status", "--startup-kit", str(self.kit("project_admin")))
        return [site for site in self.sites if not re.search(rf"(?<![\w-]){re.escape(site)}(?![\w-])", said)]

    def stop(self) -> list[int]:
        """Stops everything. Returns the ids of processes that had to be killed."""
        if self.running():
            everything = [] if self.server in self.running() else [p for s in self.running() for p in ("-p", s)]
            with contextlib.suppress(FedImagingError):
                self.nvflare("poc", "stop", "--no-wait", *everything, needs_home=True)
        deadline = time.monotonic() + STOP_SECONDS
        while self.processes() and time.monotonic() < deadline:
            if any(process.status() == psutil.STATUS_STOPPED for process in _alive(self.processes())):
                break  # a process that was suspended cannot stop by itself
            time.sleep(0.5)
        killed = []
        for process in self.processes():
            killed.append(process.pid)
            stop_process_tree(process.pid)
        return killed

    # --- jobs ---

    def submit(self, job: Path) -> str:
        """Submits a job folder as the lead. Returns the job's id."""
        said = self.nvflare("job", "submit", "-j", str(job), "--startup-kit", str(self.kit("lead")))
        found = re.search(r"job_id: (\S+)", said)
        if not found:
            raise FedImagingError(f"nvflare job submit gave no job id: {said.strip().splitlines()[-1:]}")
        self._last_job.write_text(found[1])
        return found[1]

    @contextlib.contextmanager
    def waiting(self, job_id: str) -> Iterator[subprocess.Popen[bytes]]:
        """``nvflare job wait`` as a child process, which ends when the job does."""
        command = ["job", "wait", job_id, "--timeout", "0", "--interval", "2", "--startup-kit", str(self.kit("lead"))]
        console.print(f"[dim]$ {shlex.join(['nvflare', *command])}[/dim]", highlight=False, soft_wrap=True)
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "nvflare.cli", *command],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
            cwd=REPOSITORY, env=self.environment(),
        )  # fmt: skip
        try:
            yield process
        finally:
            stop_process_tree(process.pid)
            process.wait()

    def status_of(self, job_id: str) -> str:
        """The job's status as FLARE lists it, such as FINISHED:COMPLETED; "" for a job that it does not know."""
        said = self.nvflare("job", "list", "-i", job_id, "--startup-kit", str(self.kit("lead")))
        found = re.search(rf"{re.escape(job_id)}\s+\S+\s+(\S+)", said)
        return found[1] if found else ""

    def download(self, job_id: str) -> Path:
        target = self.results / job_id
        shutil.rmtree(target, ignore_errors=True)
        self.results.mkdir(exist_ok=True)
        lead = str(self.kit("lead"))
        self.nvflare("job", "download", job_id, "-o", str(target), "--force", "--startup-kit", lead)
        return target

    def rounds_file(self, job_id: str) -> Path:
        """Where the server writes a running job's rounds; on one machine one can look."""
        return self.kits / self.server / job_id / "rounds.jsonl"


def free_port(port: int) -> int:
    """``port``, or the first free one after it."""
    return next(candidate for candidate in range(port, port + 1000) if port_is_free(candidate))


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running()]


def _participants(known: list[dict[str, Any]], sites: list[str], port: int) -> list[dict[str, Any]]:
    """The real federation's participants with the sites of the data and another port for the server.

    Sites that the real federation has keep their organisation; org admins of absent organisations are left out.
    """
    clients = {p["name"]: p for p in known if p["type"] == "client"}
    chosen = [clients.get(site) or {"name": site, "type": "client", "org": re.sub(r"\W", "_", site)} for site in sites]
    orgs = {site["org"] for site in chosen}
    servers = [{**p, "fed_learn_port": port, "admin_port": port} for p in known if p["type"] == "server"]
    people = [p for p in known if p["type"] == "admin" and (p["role"] != "org_admin" or p["org"] in orgs)]
    return [*servers, *chosen, *people]
