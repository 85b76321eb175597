"""A federation of real processes: each participant opens, verifies and starts its kit as the guide tells it to."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sysconfig
import venv
from pathlib import Path
from types import SimpleNamespace

import psutil

from provisioning.federation import build
from provisioning.handover import hand_over
from provisioning.project import ProjectFile
from tests.console import AdminConsole
from tests.provisioning.conftest import (
    PASSPHRASE,
    PATIENCE,
    make_federation,
    project_text,
    wait_for,
    with_participants,
)

SERVER, PROJECT_ADMIN, LEAD, MEMBER = "localhost", "project-admin@example.org", "lead@example.org", "member@example.org"

_MEMBER = f"""  - name: {MEMBER}
    type: admin
    org: consortium
    role: member
"""


class Participant:
    """One participant in a directory of its own, with what the project admin sent, its home and its environment.

    The environment holds what the package requires and not the package, which would hide the kit's.
    """

    def __init__(self, name: str, place: Path) -> None:
        self.name, self.place = name, place
        self.kit, self.pins = place / name, place / "pins.json"
        self.python = place / "venv" / "bin" / "python"
        self.variables = {"HOME": str(place / "home"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}

    def receive(self, made: SimpleNamespace) -> None:
        """Takes the kit over: the archive and its opener from the admin, the passphrase and fingerprints by phone."""
        sent, passphrase = hand_over(made.federation, self.name)
        (self.place / "home").mkdir(parents=True)
        venv.create(self.place / "venv", symlinks=True)
        (packages,) = (self.place / "venv").glob("lib/python*/site-packages")
        # Python reads no .pth file of a folder that a .pth file names: an editable install there stays unseen.
        (packages / "requirements.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        for file in sent.iterdir():
            shutil.copy(file, self.place)
        opened = self.run("open", f"{self.name}.kit", "--to", ".", KIT_PASSPHRASE=passphrase)
        assert opened.returncode == 0, opened.stderr
        known = ("--root", made.federation.record["root"], "--code", made.federation.record["code"])
        verified = self.run("verify", self.kit, "--name", self.name, *known, "--pin", self.pins)
        assert verified.returncode == 0, verified.stderr

    def run(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """The kit.py that came with the archive, which does not come from this repository's folder."""
        return subprocess.run(
            [self.python, "kit.py", *map(str, arguments)],
            cwd=self.place, env=self.variables | variables, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=PATIENCE, check=False,
        )  # fmt: skip

    def start(self) -> subprocess.CompletedProcess[str]:
        """Starts a server or a site in the background; its kit is verified first."""
        return self.run("start", self.kit, "--pins", self.pins)

    def console(self, user: str | None = None) -> AdminConsole:
        """Logs in; ``user`` is the name that is typed, this participant's if there is none."""
        command = [str(self.python), "kit.py", "start", str(self.kit), "--pins", str(self.pins)]
        return AdminConsole(self.place, user or self.name, command=command, environment=self.variables)

    def processes(self) -> list[psutil.Process]:
        return processes_below(self.place)


class RunningFederation:
    """The project admin's federation with a server, hospitals and people on free loopback ports.

    Args:
        folder: holds the admin's ``project.yml`` and ``federation/``, and one folder for each participant.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        text = project_text().replace("fed_learn_port: 443", f"fed_learn_port: {self.port}")
        text = text.replace("storage: /var/lib/fedimaging", f"storage: {folder / SERVER / 'storage'}")
        self.made = make_federation(folder / "admin", with_participants(text, _MEMBER))
        self._participants: dict[str, Participant] = {}

    def __getitem__(self, name: str) -> Participant:
        """A participant, whose kit is handed over when it is first asked for."""
        if name not in self._participants:
            participant = Participant(name, self.folder / name)
            participant.receive(self.made)
            self._participants[name] = participant
        return self._participants[name]

    def add(self, entries: str) -> list[str]:
        """The project admin adds participants to project.yml and builds their kits. Returns their names."""
        text = self.made.path.read_text()
        self.made.path.write_text(with_participants(text, entries))
        return build(ProjectFile(self.made.path), self.made.federation, lambda: PASSPHRASE)

    def start(self, *names: str) -> None:
        for name in names:
            started = self[name].start()
            assert started.returncode == 0, started.stderr

    def registered(self) -> set[str]:
        """The names of the sites that the server knows at this moment."""
        with self[PROJECT_ADMIN].console() as console:
            return _sites(console)

    def wait_for(self, *names: str) -> None:
        """Waits until these sites, and no others, are registered at the server."""
        wait_for(lambda: listens(self.port))
        with self[PROJECT_ADMIN].console() as console:
            wait_for(lambda: _sites(console) == set(names))

    def shut_down(self) -> None:
        """The project admin shuts sites and server down from the console; returns once every process has ended."""
        with self[PROJECT_ADMIN].console() as console:
            if sites := _sites(console):
                assert "Shutdown the client" in console.send("shutdown client")
                wait_for(lambda: not any(self[name].processes() for name in sites))
            assert "Flare Server has been shutdown" in console.send("shutdown server")
        wait_for(lambda: not self.processes())

    def processes(self) -> list[psutil.Process]:
        return processes_below(self.folder)

    def kill(self) -> None:
        """Ends what a failed test has left, by process ID."""
        left = self.processes()
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=30)


def processes_below(folder: Path) -> list[psutil.Process]:
    """Living processes that run something in a folder: its kits' scripts and Pythons, and the jobs of its kits."""
    mark = f"{folder}/"
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(
            mark in word for word in process.info["cmdline"] or ()
        ):
            found.append(process)
    return found


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _sites(console: AdminConsole) -> set[str]:
    rows = console.send("check_status server").partition("Registered clients")[2].splitlines()
    cells = [row.split("|")[1].strip() for row in rows if row.startswith("|")]
    return set(cells) - {"CLIENT"}
