"""One federation of three hospitals, built and handed over once."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from provisioning import kit as kit_file
from provisioning.federation import Federation, build
from provisioning.handover import hand_over
from provisioning.keys import Keys
from provisioning.kit import Pins, open_archive, processes, stop
from provisioning.project import PROJECT_FILE, ProjectFile

PASSPHRASE = "correct horse battery staple"
PATIENCE = 300
"""seconds that a process of FLARE's has to do what is waited for"""
FOURTH = """  - name: hospital-d
    type: client
    org: hospital_d
  - name: admin@hospital-d.example.org
    type: admin
    org: hospital_d
    role: org_admin
"""
"""one more hospital, as entries of a project.yml"""
_PEOPLE = "  # The people."


@pytest.fixture(scope="session", autouse=True)
def cheap_scrypt():
    """scrypt as weak as it gets: these tests encrypt often, and nothing worth keeping."""
    saved, kit_file._SCRYPT_N = kit_file._SCRYPT_N, 2**4
    yield
    kit_file._SCRYPT_N = saved


def project_text() -> str:
    return PROJECT_FILE.read_text().replace("fl.example.org", "localhost")


def with_participants(project: str, entries: str) -> str:
    """The text of a project.yml with more participants."""
    return project.replace(_PEOPLE, f"{entries}\n{_PEOPLE}")


def make_federation(folder: Path, text: str) -> SimpleNamespace:
    """Builds a federation and opens its kits where participants would have them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "project.yml"
    path.write_text(text)
    federation = Federation(folder / "federation")
    built = build(ProjectFile(path), federation, lambda: PASSPHRASE)
    return SimpleNamespace(path=path, federation=federation, built=built, folder=federation.folder)


def pins(made: SimpleNamespace, name: str) -> Pins:
    return Pins(name, made.federation.record["root"], made.federation.record["code"])


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): f"{path.stat().st_mode:o} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def handed_over(tmp_path_factory):
    """Two hospitals' and the lead's kits as they arrive, with the federation they come from."""
    made = make_federation(tmp_path_factory.mktemp("federation"), project_text())
    made.kits = tmp_path_factory.mktemp("kits")
    made.passphrases, made.archives = {}, {}
    for name in ("hospital-a", "hospital-b", "lead@example.org", "localhost"):
        folder, passphrase = hand_over(made.federation, name)
        made.archives[name], made.passphrases[name] = folder / f"{name}.kit", passphrase
        open_archive(made.archives[name], passphrase, made.kits)
    return made


def said(kit, words):
    path = kit / "log.txt"
    return path.exists() and words in path.read_text()


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """The Python of an environment with the requirements and without the package, which the kits bring."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    packages = next((folder / "lib").glob("python*/site-packages"))
    # What is named in a .pth is searched, but no .pth in it is obeyed: an editable install is not there.
    (packages / "requirements.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "bin/python"
    tried = subprocess.run([python, "-c", "import fedimaging"], cwd="/", env={}, capture_output=True, check=False)
    assert b"No module named 'fedimaging'" in tried.stderr
    return python


@pytest.fixture(scope="session")
def running(tmp_path_factory, python):
    """A server that runs, and a hospital's kit that does not yet; all is stopped in the end, whatever happens.

    ``site(name)`` is the kit of another participant, in a folder of its own as it has it; ``kit_py`` runs kit.py.
    """
    folder = tmp_path_factory.mktemp("running")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    text = project_text().replace("fed_learn_port: 443", f"fed_learn_port: {port}")
    made = make_federation(folder, text.replace("/var/lib/fedimaging", str(folder / "storage")))

    def site(name):
        pins(made, name).write(folder / f"{name}.json")
        return shutil.copytree(made.folder / "kits" / name, folder / "sites" / name)

    def kit_py(command, kit, *more):
        needs = ["--pins", str(folder / f"{kit.name}.json")] if command not in {"stop", "logs"} else []
        return subprocess.run(
            [python, "-I", kit_file.__file__, command, kit, *more, *needs],
            env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HOME": str(folder)},
            capture_output=True, text=True, timeout=2 * PATIENCE, check=False,
        )  # fmt: skip

    server, hospital = site("localhost"), site("hospital-a")
    try:
        done = kit_py("start", server)
        assert done.returncode == 0, done.stderr
        wait_for(lambda: said(server, "Server started"))
        yield SimpleNamespace(
            server=server, hospital=hospital, site=site, kit_py=kit_py, folder=folder, python=python,
            made=made, code_key=Keys.read(made.folder, PASSPHRASE).code_key,
        )  # fmt: skip
    finally:
        kits = [*(path for path in (folder / "sites").iterdir() if path != server), server]
        for kit in kits:
            stop(kit, PATIENCE)
    assert not [number for kit in kits for number in processes(kit)]
