"""One federation of three hospitals, built and handed over once."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from provisioning import kit as kit_file
from provisioning.federation import Federation, build
from provisioning.handover import hand_over
from provisioning.kit import Pins, open_archive
from provisioning.project import PROJECT_FILE, ProjectFile

PASSPHRASE = "correct horse battery staple"


@pytest.fixture(scope="session", autouse=True)
def cheap_scrypt():
    """scrypt as weak as it gets: these tests encrypt often, and nothing worth keeping."""
    saved, kit_file._SCRYPT_N = kit_file._SCRYPT_N, 2**4
    yield
    kit_file._SCRYPT_N = saved


def project_text() -> str:
    return PROJECT_FILE.read_text().replace("fl.example.org", "localhost")


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
