"""The project admin's folder of one federation: its sealed keys, its kits and the record of who got what."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from nvflare.lighter.constants import CtxKey
from nvflare.lighter.entity import participant_from_dict
from nvflare.lighter.prov_utils import prepare_builders
from nvflare.lighter.provisioner import Provisioner
from nvflare.lighter.utils import serialize_cert

from fedimaging.errors import FedImagingError
from provisioning.builders import CertificateBuilder, FederationProject
from provisioning.keys import SEALED, Keys
from provisioning.kit import MANIFEST, PACKAGE_MANIFEST, code_fingerprint, write_private
from provisioning.project import LASTING, ProjectFile, check
from provisioning.requests import read_requests

RECORD = "federation.json"
KITS = "kits"
HANDOVER = "handover"

Participants = dict[str, dict[str, Any]]


def default_folder(federation: str) -> Path:
    """Where a federation is kept if nothing else is said: outside the clone, which can be thrown away."""
    base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "fedimaging" / federation


class Federation:
    """A federation's folder, owner-only.

    - ``federation.json``: participants with certificate dates, package hashes and when their kits were handed over;
    - ``keys.sealed``: the private keys of the root and of the code signer, encrypted;
    - ``kits/<participant>/``: the kits; a private key stays there only until the kit is handed over;
    - ``handover/<participant>/``: the encrypted archives;
    - ``renewed/<participant>.crt``: renewed certificates, to be sent;
    - ``revoked.crl``: the revocation list, to be copied to the server.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = self._read()

    @property
    def participants(self) -> Participants:
        participants: Participants = self.record["participants"]
        return participants

    @property
    def revoked(self) -> dict[str, dict[str, Any]]:
        """Revoked certificates by serial number (hex): whose, since when, and whether the participant was removed."""
        revoked: dict[str, dict[str, Any]] = self.record.setdefault("revoked", {})
        return revoked

    def _read(self) -> dict[str, Any]:
        path = self.folder / RECORD
        if not path.exists():
            return {"format": 1, "participants": {}}
        try:
            record: dict[str, Any] = json.loads(path.read_text())
            record["participants"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise FedImagingError(f"{path}: can't be read; restore it from a backup") from None
        return record

    def participant(self, name: str) -> dict[str, Any]:
        """A participant's entry in the record. Raises FedImagingError if there is none, or if it was removed."""
        if name not in self.participants:
            known = ", ".join(self.participants) or "nobody; run `python -m provisioning build` first"
            raise FedImagingError(f"no kit of {name!r} was built; known: {known}")
        entry = self.participants[name]
        if "removed" in entry:
            raise FedImagingError(f"{name} was removed on {entry['removed'][:10]}; a removed name does not come back")
        return entry

    def kit(self, name: str) -> Path:
        return self.folder / KITS / name

    def save(self) -> None:
        write_private(self.folder / RECORD, json.dumps(self.record, indent=2).encode() + b"\n")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One command at a time changes the folder; whatever is made in it is its owner's only."""
        umask = os.umask(0o077)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self.folder / ".lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise FedImagingError(f"{self.folder}: another command is at work here; wait for it") from None
                self.record = self._read()
                yield
        finally:
            os.umask(umask)


def build(
    file: ProjectFile, federation: Federation, passphrase: Callable[[], str], requests: Iterable[Path] = ()
) -> list[str]:
    """Builds and signs the kits of all participants that have none yet. Returns their names.

    The root and all kits that are there stay as they are, byte for byte.

    Args:
        file: the project.
        federation: where the kits go.
        passphrase: of the federation's keys, asked for if there is something to build.
        requests: certificate requests of participants whose private key stays with them, or folders of such.

    Raises:
        FedImagingError: if the project file or a request is wrong, with its first problem, or FLARE's provisioning
            fails.
        KitError: for a wrong passphrase.
    """
    with federation.locked():
        problems = [problem for problem in check(file, federation.participants, resolve=False) if not problem.warning]
        if problems:
            more = f" (and {len(problems) - 1} more; see `check`)" if len(problems) > 1 else ""
            raise FedImagingError(f"{file.path}:{problems[0].line}: {problems[0].text}{more}")
        new = {entry["name"]: entry for entry in file.participants() if entry["name"] not in federation.participants}
        requested = read_requests(requests, new)
        if not new:
            return []
        if occupied := [name for name in new if federation.kit(name).exists()]:
            raise FedImagingError(
                f"{federation.kit(occupied[0])}: left by an interrupted build; delete it and build again"
            )
        keys = _keys(file, federation, passphrase())
        with tempfile.TemporaryDirectory(dir=federation.folder, prefix=".building-") as work:
            kits = _provision(file, federation, keys, requested, Path(work))
            (federation.folder / KITS).mkdir(exist_ok=True)
            for name, entry in new.items():
                _take(federation, entry, kits / name)
                if name in requested:
                    federation.participants[name]["own_key"] = code_fingerprint(requested[name])
                    federation.save()
        return list(new)


def _keys(file: ProjectFile, federation: Federation, passphrase: str) -> Keys:
    name = file.content["name"]
    if (federation.folder / SEALED).exists():
        keys = Keys.read(federation.folder, passphrase)
        if federation.record.get("root") not in {None, keys.root_fingerprint}:
            raise FedImagingError(f"{federation.folder}: {SEALED} and {RECORD} are not of the same federation")
    elif federation.participants:
        raise FedImagingError(f"{federation.folder}: {SEALED} is missing; restore it from a backup")
    else:
        keys = Keys.make(name, certificate_builder(file).root_valid_days)
        keys.write(federation.folder, passphrase)
    federation.record |= {
        "federation": name,
        "root": keys.root_fingerprint,
        "root_valid_until": keys.root.not_valid_after_utc.isoformat(),
        "code": keys.code_fingerprint,
    }
    return keys


def certificate_builder(file: ProjectFile) -> CertificateBuilder:
    builders = prepare_builders(copy.deepcopy(file.content))
    return next(builder for builder in builders if isinstance(builder, CertificateBuilder))


def _provision(
    file: ProjectFile, federation: Federation, keys: Keys, requested: Mapping[str, rsa.RSAPublicKey], work: Path
) -> Path:
    """FLARE's provisioning in a folder of its own. Returns the folder with one kit for each participant."""
    content = copy.deepcopy(file.content)
    project = FederationProject(
        name=content["name"],
        description=content.get("description", ""),
        props=content,
        serialized_root_cert=serialize_cert(keys.root),
        root_private_key=keys.root_key,
        existing=federation.participants,
        code_key=keys.code_key,
        requested=requested,
    )
    for entry in content["participants"]:
        project.add_participant(participant_from_dict(entry))
    said = _Messages()
    # A failing builder's traceback is printed by FLARE, and then it is only said that something failed.
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        ctx = Provisioner(str(work), prepare_builders(content)).provision(project, logger=said)
    if ctx.get(CtxKey.BUILD_ERROR):
        raise FedImagingError(f"{file.path}: FLARE's provisioning failed: {'; '.join(said.errors)}")
    return Path(ctx.get_result_location())


class _Messages:
    """Keeps FLARE's errors; the rest of what it says is of no use to anybody."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def error(self, message: str) -> None:
        self.errors.append(message.removesuffix("  Incomplete prod_n folder removed."))

    def debug(self, message: str) -> None: ...

    info = warning = debug


def _take(federation: Federation, entry: dict[str, Any], made: Path) -> None:
    """Moves a kit to its place and enters it into the record."""
    name = entry["name"]
    made.rename(federation.kit(name))
    federation.participants[name] = {
        **{key: entry[key] for key in LASTING if key in entry},
        **kit_facts(federation.kit(name)),
        "built": now(),
    }
    federation.save()


def kit_facts(kit: Path) -> dict[str, Any]:
    """What the record keeps of a kit: its package, and its certificate's serial number and dates."""
    manifest = json.loads((kit / MANIFEST).read_text())
    package = json.loads((kit / PACKAGE_MANIFEST).read_text()) if manifest["settings"] is not None else None
    certificate = x509.load_pem_x509_certificate((kit / manifest["certificate"]).read_bytes())
    return {
        "package": package and {key: package[key] for key in ("name", "version", "sha256")},
        **certificate_facts(certificate),
    }


def certificate_facts(certificate: x509.Certificate) -> dict[str, str]:
    return {
        "serial": f"{certificate.serial_number:x}",
        "valid_from": certificate.not_valid_before_utc.isoformat(),
        "valid_until": certificate.not_valid_after_utc.isoformat(),
    }


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def private_key(federation: Federation, name: str) -> Path:
    """Where a participant's private key is, as long as it is here."""
    kit = federation.kit(name)
    return kit / str(json.loads((kit / MANIFEST).read_text())["key"])


def remove_private_key(federation: Federation, name: str) -> None:
    """Deletes a participant's private key here; from now on the participant alone has it."""
    key = private_key(federation, name)
    if key.exists():
        with key.open("r+b") as file:
            file.write(b"\0" * key.stat().st_size)
            file.flush()
            os.fsync(file.fileno())
        key.unlink()


def discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
