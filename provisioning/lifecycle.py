"""What happens to participants after their kits were built: renewed certificates, removal, and how they stand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from nvflare.lighter.entity import Participant, participant_from_dict

from fedimaging.errors import FedImagingError
from fedimaging.federation.revocation import REVOCATION_LIST
from provisioning.builders import sign_certificate
from provisioning.federation import (
    HANDOVER,
    Federation,
    certificate_facts,
    discard,
    now,
    private_key,
    remove_private_key,
)
from provisioning.keys import Keys, Revoked
from provisioning.kit import MANIFEST, code_fingerprint, write_private
from provisioning.project import LASTING
from provisioning.requests import read_request

RENEWED = "renewed"
WARN_DAYS = 60


def renew(
    federation: Federation,
    name: str,
    passphrase: str,
    valid_days: int,
    *,
    request: Path | None = None,
    revoke: bool = False,
) -> Path | None:
    """Signs a new certificate for a participant's key; nobody else's kit changes, nor anything else in this one.

    Args:
        federation: the federation.
        name: the participant.
        passphrase: of the federation's keys.
        valid_days: from now; the root's end is the limit.
        request: of a new key, if the participant made one; without it the key stays the same.
        revoke: whether the server is to refuse all certificates so far, as it must if a key was lost or stolen.

    Returns:
        The certificate to send, or None if the kit is still here and simply holds it.
    """
    if valid_days < 1:
        raise FedImagingError("a certificate must be valid for 1 day or more")
    with federation.locked():
        entry = federation.participant(name)
        if revoke and request is None:
            raise FedImagingError("a revoked certificate needs a new key: give the participant's new --request")
        path = _certificate_path(federation, name)
        old = x509.load_pem_x509_certificate(path.read_bytes())
        key = read_request(request, name, entry) if request else old.public_key()
        keys = Keys.read(federation.folder, passphrase)
        new = sign_certificate(_participant(name, entry), key, keys.root, keys.root_key, valid_days)  # type: ignore[arg-type]
        pem = new.public_bytes(serialization.Encoding.PEM)
        if revoke:
            _revoke(federation, name, removed=False)
            _write_list(federation, keys)
        path.write_bytes(pem)
        entry.setdefault("earlier", []).append(entry["serial"])
        entry |= {**certificate_facts(new), "renewed": now()}
        if request:
            remove_private_key(federation, name)
            entry["own_key"] = code_fingerprint(key)
        federation.save()
        if "handed_over" not in entry:
            return None
        sent = federation.folder / RENEWED / f"{name}.crt"
        sent.parent.mkdir(exist_ok=True)
        sent.write_bytes(pem)
        return sent


def remove(federation: Federation, name: str, passphrase: str) -> Path:
    """Ends a participant: all its certificates and its name go onto the revocation list; its kit here is deleted.

    Returns:
        The new list, to be copied to the server.
    """
    with federation.locked():
        entry = federation.participant(name)
        if entry["type"] == "server":
            raise FedImagingError(f"{name} is the server; without it there is no federation to be removed from")
        keys = Keys.read(federation.folder, passphrase)
        _revoke(federation, name, removed=True)
        path = _write_list(federation, keys)
        entry["removed"] = now()
        federation.save()
        if (federation.kit(name) / MANIFEST).is_file():
            remove_private_key(federation, name)
        discard(federation.kit(name))
        discard(federation.folder / HANDOVER / name)
        (federation.folder / RENEWED / f"{name}.crt").unlink(missing_ok=True)
        return path


def _revoke(federation: Federation, name: str, removed: bool) -> None:
    """All certificates that a participant has, also those that were renewed: their key can be the same."""
    entry = federation.participants[name]
    for serial in (*entry.get("earlier", ()), entry["serial"]):
        federation.revoked[serial] = {"name": name, "since": now(), "removed": removed}


def _write_list(federation: Federation, keys: Keys) -> Path:
    """Signs the revocation list under the next number, and puts it into the server's kit if that is still here."""
    federation.record["revocations"] = number = federation.record.get("revocations", 0) + 1
    entries = (Revoked(serial=serial, **entry) for serial, entry in federation.revoked.items())
    signed = keys.revocation_list(number, entries)
    path = federation.folder / REVOCATION_LIST
    write_private(path, signed)
    for name, entry in federation.participants.items():
        if entry["type"] == "server" and "handed_over" not in entry:
            write_private(federation.kit(name) / "local" / REVOCATION_LIST, signed)
    return path


def _participant(name: str, entry: dict[str, object]) -> Participant:
    return participant_from_dict({"name": name, **{key: entry[key] for key in LASTING if key in entry}})


def _certificate_path(federation: Federation, name: str) -> Path:
    kit = federation.kit(name)
    try:
        return kit / json.loads((kit / MANIFEST).read_text())["certificate"]
    except OSError:
        raise FedImagingError(f"{kit}: the kit is missing; restore it from a backup") from None


def _key_is_here(federation: Federation, name: str) -> bool:
    try:
        return private_key(federation, name).exists()
    except OSError:
        return False  # the kit is gone, with whatever was in it


@dataclass(frozen=True)
class Standing:
    """How a participant stands.

    Args:
        days_left: of its certificate.
        kit: built, handed over, or removed, and when.
        key: who has the private key.
        package: version and start of the hash of the package in its kit.
    """

    name: str
    type: str
    org: str
    days_left: int
    kit: str
    key: str
    package: str
    removed: bool

    @property
    def warns(self) -> bool:
        return not self.removed and self.days_left < WARN_DAYS


def standings(federation: Federation, at: datetime | None = None) -> list[Standing]:
    """How all participants stand, those who were removed last."""
    at = at or datetime.now(UTC)
    found = []
    for name, entry in federation.participants.items():
        package = entry.get("package")
        found.append(
            Standing(
                name,
                entry.get("role") or entry["type"],
                entry["org"],
                (datetime.fromisoformat(entry["valid_until"]) - at).days,
                next(
                    f"{words} {entry[key][:10]}"
                    for key, words in (("removed", "removed"), ("handed_over", "handed over"), ("built", "built"))
                    if key in entry
                ),
                "here, until handover" if _key_is_here(federation, name) else "participant",
                f"{package['version']} {package['sha256'][:12]}" if package else "",
                "removed" in entry,
            )
        )
    return sorted(found, key=lambda standing: standing.removed)
