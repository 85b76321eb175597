#!/usr/bin/env python3
"""Opens, verifies and starts a startup kit. This one file needs Python 3.11 or newer and `cryptography`, nothing else.

It trusts nothing in the kit. What it trusts are the two fingerprints that the project admin read out over the phone,
and the name of the participant. Nothing of the kit is run or imported before everything is verified.

    python kit.py request hospital-a --org hospital_a
    python kit.py open hospital-a.kit --to /srv/fedimaging --key hospital-a.key
    python kit.py verify /srv/fedimaging/hospital-a --name hospital-a --root '3f2a ...' --code '91bc ...' --pin p.json
    python kit.py start /srv/fedimaging/hospital-a --pins p.json
    python kit.py install-certificate /srv/fedimaging/hospital-a hospital-a.crt --pins p.json
"""

from __future__ import annotations

import argparse
import getpass
import gzip
import hashlib
import io
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.x509.oid import NameOID

MANIFEST, SIGNATURE, CODE_KEY = "kit_manifest.json", "kit_manifest.sig", "code_signing.pem"
PACKAGE_MANIFEST, PACKAGE_SIGNATURE = "package_manifest.json", "package_manifest.sig"
PREVIOUS = "previous.package"
RESOURCES = "local/resources.json.default"
UNIT, CONSOLE_LOG = "fedimaging.service", "console.log"
PYTHON = (3, 11)
"""what the lock files are for"""
RESTART = 75
"""the exit code that asks the service manager for a restart (EX_TEMPFAIL)"""
ROOT = "startup/rootCA.pem"
ARCHIVE = "fedimaging-kit-1"
PASSPHRASE_VARIABLE = "KIT_PASSPHRASE"  # noqa: S105 (the name of a variable)
FORMAT = 1

_RSA_BITS = 3072
_ROLES = ("client", "server", "project_admin", "org_admin", "lead", "member")
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 2**17, 8, 1
_MAX_SCRYPT_N = 2**20
_NONCE_BYTES = 12
_HEADER_BYTES = 4096
_CODE_SUFFIXES = (".py", ".pyc", ".pyo", ".pyd", ".so", ".pth", ".sh", ".egg")
_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_RUNTIME = re.compile(
    r"(?:error_log|log|log_fl)\.txt(?:\.\d+)?|log\.json(?:\.\d+)?|audit\.log(?:\.\d+)?|"
    rf"(?:pid|daemon_pid|restart|shutdown)\.fl|\.admin_cli_history|study_registry\.json|{_UUID}(?:/.*)?|transfer/.*|"
    r"ledger\.(?:jsonl|head)|console\.log|\.install(?:ing|ed)/.*"
)
"""what FLARE, the ledger, and an installation that is cut short, write beside startup/ and local/"""
_STAGING, _STAGED = ".installing", ".installed"
_NEVER_RUN = ("transfer/", f"{_STAGING}/", f"{_STAGED}/")
_CONNECTION = re.compile(r"registered client|client_name|shutdown|disconnect|connect to server", re.IGNORECASE)
_MAX_PACKAGE = 256 * 2**20
_PACKAGED = re.compile(
    r"local/custom/fedimaging/[\w./-]+|local/[\w-]+\.(?:lock|cdx\.json)|"
    r"local/(?:authorization|log_config|privacy)\.json\.default|GUIDE\.md|fedimaging\.service"
)
"""what a package may put into a kit: nothing of startup/, and none of the site's own files"""


class KitError(Exception):
    """A mistake or a refusal, in one line."""


@dataclass(frozen=True)
class Pins:
    """What a participant was told by phone: whom to trust and who it is. Fingerprints are SHA-256 in hex.

    Args:
        participant: the name that the kit must be made for.
        root: of the root certificate's DER, as ``openssl x509 -fingerprint -sha256`` says it.
        code: of the code-signing key's DER (SubjectPublicKeyInfo).
        versions: of the package that are accepted; empty for any.
    """

    participant: str
    root: str
    code: str
    versions: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Pins:
        try:
            raw = json.loads(path.read_text())
            return cls(raw["participant"], fingerprint(raw["root"]), fingerprint(raw["code"]), tuple(raw["versions"]))
        except OSError as error:
            raise KitError(f"{path}: can't read the pins: {error.strerror}; `verify --pin` writes them") from None
        except (ValueError, KeyError, TypeError):
            raise KitError(f"{path}: no pins file; `verify --pin` writes one") from None

    def write(self, path: Path) -> None:
        content = {
            "participant": self.participant,
            "root": self.root,
            "code": self.code,
            "versions": list(self.versions),
        }
        write_private(path, json.dumps(content, indent=2).encode() + b"\n")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: ``kind`` (changed, missing, extra, root, code key ...), the file, and why."""

    kind: str
    where: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.kind:<12} {self.where}" + (f": {self.why}" if self.why else "")


@dataclass
class Report:
    """What verification found. The kit may be used only if there are no findings."""

    findings: list[Finding] = field(default_factory=list)
    site_changes: list[str] = field(default_factory=list)
    """files of the site's own that differ from what was delivered"""
    manifest: dict[str, Any] = field(default_factory=dict)
    package: dict[str, Any] = field(default_factory=dict)
    """the manifest of the installed package; a person's kit has none"""
    days_left: int | None = None

    def add(self, kind: str, where: str, why: str = "") -> None:
        self.findings.append(Finding(kind, where, why))


def fingerprint(text: str) -> str:
    """A SHA-256 fingerprint as people write it (colons, spaces, capitals) as 64 hex digits."""
    digits = re.sub(r"[\s:-]", "", text).lower()
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise KitError("a fingerprint has 64 hexadecimal digits; read it again from the sheet or the phone")
    return digits


def spoken(digits: str) -> str:
    """A fingerprint in groups of four, to be read out."""
    return " ".join(digits[i : i + 4] for i in range(0, len(digits), 4))


def root_fingerprint(certificate: x509.Certificate) -> str:
    return certificate.fingerprint(hashes.SHA256()).hex()


def code_fingerprint(key: Any) -> str:
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


# -- verification ------------------------------------------------------------------------------------------------------


def verify(kit: Path, pins: Pins, now: datetime | None = None) -> Report:
    """Compares a kit with its signed manifest and the manifest, the certificates and the name with the pins.

    Nothing of the kit is run. Of a kit whose manifest cannot be trusted, no file list is believed.
    """
    report = Report()
    if kit.is_symlink() or not kit.is_dir():
        raise KitError(f"{kit}: no such kit folder")
    if not (kit / "startup").is_dir() or not (kit / "local").is_dir():
        raise KitError(f"{kit}: no startup kit: it has no startup/ and local/")
    if (kit / _STAGED).exists():
        report.add("interrupted", _STAGED, "an installation was cut short; `finish` or `start` ends it")
    manifest = _trusted_manifest(_signed_files(kit, MANIFEST, SIGNATURE, report), "kit", pins, report)
    if manifest is not None:
        report.manifest = manifest
        if manifest["settings"] is not None:
            signed = _signed_files(kit, PACKAGE_MANIFEST, PACKAGE_SIGNATURE, report)
            report.package = _trusted_manifest(signed, "package", pins, report) or {}
        if report.package or manifest["settings"] is None:
            _check_files(kit, manifest, report)
        _check_names(manifest, report.package, pins, report)
    _check_certificates(kit, pins, manifest, report, now or datetime.now(UTC))
    return report


def _signed_files(kit: Path, manifest: str, signature: str, report: Report) -> dict[str, bytes | None]:
    return {name: _read(kit, name, report) for name in (manifest, signature, CODE_KEY)}


def _trusted_manifest(
    files: Mapping[str, bytes | None], kind: str, pins: Pins, report: Report
) -> dict[str, Any] | None:
    """A manifest that the pinned key signed, of ``files``: the manifest, its signature and the key, in this order."""
    name, (raw, signature, key_pem) = next(iter(files)), files.values()
    if key_pem is None or signature is None or raw is None:
        return None
    try:
        key = serialization.load_pem_public_key(key_pem)
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or code_fingerprint(key) != pins.code:
        finding = Finding("code key", CODE_KEY, "signed by another key than the pinned one")
        if finding not in report.findings:
            report.findings.append(finding)
        return None
    try:
        key.verify(signature, raw, ec.ECDSA(hashes.SHA256()))
        manifest = json.loads(raw)
    except InvalidSignature:
        report.add("changed", name, "the signature does not fit")
        return None
    if (manifest.get("format"), manifest.get("kind")) != (FORMAT, kind):
        report.add("version", name, f"no {kind} of this format; use the kit.py of the version that made it")
        return None
    return dict(manifest)


def _check_files(kit: Path, manifest: Mapping[str, Any], report: Report) -> None:
    signed: dict[str, str] = manifest["files"] | report.package.get("files", {})
    if report.package:
        signed[RESOURCES] = hash_bytes(resources_file(report.package, manifest))
    site: dict[str, dict[str, Any]] = manifest["site_files"]
    known = {*signed, *site, manifest["key"], manifest["certificate"], MANIFEST, SIGNATURE, CODE_KEY}
    if report.package:
        known |= {PACKAGE_MANIFEST, PACKAGE_SIGNATURE, PREVIOUS}
    seen = set()
    for name, info in _walk(kit):
        seen.add(name)
        if not stat.S_ISREG(info.st_mode):
            report.add("extra", name, "a symbolic link or special file")
        elif name in signed:
            if hash_file(kit / name) != signed[name]:
                report.add("changed", name)
        elif name in site:
            if site[name]["sha256"] and hash_file(kit / name) != site[name]["sha256"]:
                report.site_changes.append(name)
        elif name not in known and not _is_runtime(name):
            report.add("extra", name)
        if info.st_mode & stat.S_IWOTH and stat.S_ISREG(info.st_mode):
            report.add("permissions", name, "everybody may write it; chmod o-w")
    required = {name for name, entry in site.items() if entry["required"]}
    for name in sorted(({*signed, *required}) - seen):
        report.add("missing", name)


def _is_runtime(name: str) -> bool:
    """Whether FLARE writes such a file while it runs. Code is none, but where nothing is run from."""
    return bool(_RUNTIME.fullmatch(name)) and (name.startswith(_NEVER_RUN) or not name.lower().endswith(_CODE_SUFFIXES))


def resources_file(package: Mapping[str, Any], manifest: Mapping[str, Any]) -> bytes:
    """``local/resources.json.default``: the package's template for this type of participant with its own settings."""
    resources = _filled(package["resources"][manifest["type"]], manifest["settings"])
    return json.dumps(resources, indent=2).encode() + b"\n"


def _filled(value: Any, settings: Mapping[str, Any]) -> Any:
    """A template with the values of its ``<names>``."""
    if isinstance(value, dict):
        return {key: _filled(inner, settings) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, settings) for inner in value]
    if not isinstance(value, str):
        return value
    whole = re.fullmatch(r"<(\w+)>", value)
    return settings[whole[1]] if whole else re.sub(r"<(\w+)>", lambda name: str(settings[name[1]]), value)


def _check_names(manifest: Mapping[str, Any], package: Mapping[str, Any], pins: Pins, report: Report) -> None:
    if manifest["participant"] != pins.participant:
        report.add("name", MANIFEST, f"this is the kit of {manifest['participant']}, not of {pins.participant}")
    if package and (why := _unaccepted(package, pins)):
        report.add("version", PACKAGE_MANIFEST, why)


def _unaccepted(package: Mapping[str, Any], pins: Pins) -> str:
    """Why a package's version is not one of those that the pins name; empty if it is, or if they name none."""
    if not pins.versions or package["version"] in pins.versions:
        return ""
    return f"fedimaging {package['version']}; accepted are {', '.join(pins.versions)}"


def _check_certificates(
    kit: Path, pins: Pins, manifest: Mapping[str, Any] | None, report: Report, now: datetime
) -> None:
    root = _certificate(kit, ROOT, report)
    name = manifest["certificate"] if manifest else _own_certificate(kit)
    own = _certificate(kit, name, report)
    if root is not None:
        if root_fingerprint(root) != pins.root:
            report.add("root", ROOT, "another root than the pinned one")
        report.findings += _check_dates(root, ROOT, now)
    if own is None:
        return
    report.days_left = (own.not_valid_after_utc - now).days
    report.findings += _check_own(own, name, root, pins, now)
    _check_key(kit, _key_name(name), own, report)


def _check_own(
    own: x509.Certificate, name: str, root: x509.Certificate | None, pins: Pins, now: datetime
) -> Iterator[Finding]:
    yield from _check_dates(own, name, now)
    common_name = own.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if not common_name or common_name[0].value != pins.participant:
        whose = common_name[0].value if common_name else "nobody"
        yield Finding("name", name, f"the certificate is {whose!r}'s, not {pins.participant!r}'s")
    if root is not None:
        try:
            own.verify_directly_issued_by(root)
        except (ValueError, TypeError, InvalidSignature):
            yield Finding("certificate", name, "not issued by the kit's root")


def _check_dates(certificate: x509.Certificate, name: str, now: datetime) -> Iterator[Finding]:
    if now < certificate.not_valid_before_utc:
        yield Finding("certificate", name, f"not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")
    if now > certificate.not_valid_after_utc:
        yield Finding("certificate", name, f"expired on {certificate.not_valid_after_utc:%Y-%m-%d}; ask for a renewal")


def _check_key(kit: Path, name: str, certificate: x509.Certificate, report: Report) -> None:
    pem = _read(kit, name, report)
    if pem is None:
        return
    if (kit / name).stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        report.add("permissions", name, "others may read the private key; chmod 600")
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        report.add("changed", name, "no private key")
        return
    if code_fingerprint(key.public_key()) != code_fingerprint(certificate.public_key()):
        report.add("changed", name, "the private key does not belong to the certificate")


def _own_certificate(kit: Path) -> str:
    return "startup/server.crt" if (kit / "startup/fed_server.json").is_file() else "startup/client.crt"


def _key_name(certificate: str) -> str:
    return certificate.removesuffix(".crt") + ".key"


def _certificate(kit: Path, name: str, report: Report) -> x509.Certificate | None:
    pem = _read(kit, name, report)
    if pem is None:
        return None
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError:
        report.add("changed", name, "no certificate")
        return None
    if certificate.public_bytes(serialization.Encoding.PEM) != pem:
        report.add("changed", name, "more than one certificate")
    return certificate


def _read(kit: Path, name: str, report: Report) -> bytes | None:
    """A regular file of the kit; None, with a finding, if there is none. Links are not followed."""
    try:
        with os.fdopen(os.open(kit / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read()
            raise OSError
    except OSError:
        finding = Finding("missing", name)
        if finding not in report.findings:
            report.findings.append(finding)
        return None


def _walk(kit: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below the kit as relative POSIX path, sorted; folders are walked, links are not followed."""
    for folder, folders, files in os.walk(kit):
        folders.sort()
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in sorted([*files, *links]):
            path = Path(folder) / name
            yield path.relative_to(kit).as_posix(), path.lstat()


def hash_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- encryption under a passphrase -------------------------------------------------------------------------------------


def seal(plain: bytes, passphrase: str, kind: str, **says: str) -> bytes:
    """Encrypts: one line of JSON that says how, and the AES-256-GCM ciphertext with that line as associated data.

    The key comes from the passphrase by scrypt. ``says`` is readable by all, and authentic once opened.
    """
    salt, nonce = os.urandom(16), os.urandom(_NONCE_BYTES)
    header = {
        "format": kind,
        **says,
        "cipher": "AES-256-GCM",
        "nonce": nonce.hex(),
        "kdf": "scrypt",
        "n": _SCRYPT_N,
        "r": _SCRYPT_R,
        "p": _SCRYPT_P,
        "salt": salt.hex(),
    }
    line = json.dumps(header).encode() + b"\n"
    key = Scrypt(salt=salt, length=32, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P).derive(passphrase.encode())
    return line + AESGCM(key).encrypt(nonce, plain, line)


def unseal(sealed: bytes, passphrase: str, kind: str, where: str) -> tuple[bytes, dict[str, Any]]:
    """What :func:`seal` encrypted, and its header. Raises KitError for a wrong passphrase or a changed file."""
    end = sealed[:_HEADER_BYTES].find(b"\n") + 1
    try:
        header = json.loads(sealed[:end])
        salt, nonce = bytes.fromhex(header["salt"]), bytes.fromhex(header["nonce"])
        n, r, p = int(header["n"]), int(header["r"]), int(header["p"])
        bounded = 2 <= n <= _MAX_SCRYPT_N and n.bit_count() == 1 and (r, p) == (_SCRYPT_R, _SCRYPT_P)
        known = header["format"] == kind and bounded and len(nonce) == _NONCE_BYTES
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        known = False
    if not known:
        raise KitError(f"{where}: not a file of the format {kind}")
    key = Scrypt(salt=salt, length=32, n=n, r=r, p=p).derive(passphrase.encode())
    try:
        return AESGCM(key).decrypt(nonce, sealed[end:], sealed[:end]), header
    except InvalidTag:
        raise KitError(f"{where}: wrong passphrase, or the file was changed on its way") from None


def open_archive(archive: Path, passphrase: str, to: Path) -> Path:
    """Unpacks an encrypted kit into ``to/<participant>``, whole or not at all; that must not exist. Returns it."""
    try:
        sealed = archive.read_bytes()
    except OSError as error:
        raise KitError(f"{archive}: can't read the archive: {error.strerror}") from None
    plain, header = unseal(sealed, passphrase, ARCHIVE, str(archive))
    folder = to / str(header.get("participant", ""))
    if folder.parent != to or folder.name in {"", ".", ".."}:
        raise KitError(f"{archive}: the participant's name is no folder name")
    if folder.exists():
        raise KitError(f"{folder}: is there already; move it away first, a kit is not unpacked over another")
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=to) as work:
        unpacked = Path(work) / folder.name
        unpacked.mkdir(mode=0o700)
        try:
            with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
                for member in tar:
                    _extract(tar, member, unpacked)
        except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, FileExistsError, ValueError) as error:
            raise KitError(f"{archive}: holds no kit: {error}") from None
        unpacked.rename(folder)
    return folder


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    parts = PurePosixPath(member.name).parts
    inside = not PurePosixPath(member.name).is_absolute() and ".." not in parts
    if not inside or parts[:1] in {(_STAGING,), (_STAGED,)} or not (member.isreg() or member.isdir()):
        raise KitError(f"{member.name}: not a plain file inside the kit")
    path = folder.joinpath(*parts)
    if member.isdir():
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        return
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    content = tar.extractfile(member)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, member.mode & 0o755)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(file.fileno(), member.mode & 0o755)
        file.write(content.read() if content else b"")


def write_private(path: Path, content: bytes) -> None:
    """Writes a file that only its owner may read, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


# -- a private key that stays at the participant, and renewed certificates ---------------------------------------------


def make_request(name: str, org: str, role: str, to: Path) -> tuple[Path, Path, str]:
    """Makes a private key and a request for a certificate, as ``nvflare cert request`` words it: PKCS #10, RSA.

    Args:
        name: the participant's.
        org: its organisation.
        role: client, server, or what a person is.
        to: the folder for both files.

    Returns:
        The key's file, which only its owner may read, the request's, and the SHA-256 of the public key.
    """
    key_file, request_file = to / f"{name}.key", to / f"{name}.csr"
    if Path(name).name != name:
        raise KitError(f"{name!r}: a participant's name holds no /")
    for path in (key_file, request_file):
        if path.exists():
            raise KitError(f"{path}: is there already; a key is not made over another; move it away first")
    try:
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, name),
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, org),
                x509.NameAttribute(NameOID.UNSTRUCTURED_NAME, role),
            ]
        )
    except ValueError as error:
        raise KitError(f"no certificate can hold this name or organisation: {error}") from None
    key = rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS)
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    pkcs8, clear = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    to.mkdir(parents=True, exist_ok=True)
    write_private(key_file, key.private_bytes(serialization.Encoding.PEM, pkcs8, clear))
    request_file.write_bytes(request.public_bytes(serialization.Encoding.PEM))
    return key_file, request_file, code_fingerprint(key.public_key())


def place_key(kit: Path, key_file: Path) -> None:
    """Puts a participant's own private key into a kit that came without one."""
    name = _own_certificate(kit)
    certificate = _certificate(kit, name, Report())
    if certificate is None:
        raise KitError(f"{kit / name}: no certificate")
    write_private(kit / _key_name(name), _matching_key(key_file, certificate))


def install_certificate(kit: Path, certificate_file: Path, pins: Pins, key_file: Path | None = None) -> datetime:
    """Puts a renewed certificate, and its key if that is new, in place of a kit's. All else stays as it is.

    It must be issued by the pinned root, for the same name, organisation and role, later than the one in place, and
    for the kit's key or the new one. Returns until when it is valid.
    """
    report = Report()
    root, name = _certificate(kit, ROOT, report), _own_certificate(kit)
    new = _certificate(certificate_file.parent, certificate_file.name, report)
    old = _certificate(kit, name, report)
    if root is None or new is None or old is None:
        raise _not_renewed(report.findings[0])
    if root_fingerprint(root) != pins.root:
        raise KitError(f"not renewed: {kit / ROOT} is another root than the pinned one")
    report.findings += _check_own(new, certificate_file.name, root, pins, datetime.now(UTC))
    if report.findings:
        raise _not_renewed(report.findings[0])
    if new.subject != old.subject:
        raise KitError(f"not renewed: {certificate_file} is for another organisation or role")
    if new.not_valid_before_utc < old.not_valid_before_utc:
        raise KitError(f"not renewed: {certificate_file} is older than the certificate in place")
    key = _matching_key(key_file or kit / _key_name(name), new)
    if key_file is not None:
        _replace(kit / _key_name(name), key)
    _replace(kit / name, new.public_bytes(serialization.Encoding.PEM))
    return new.not_valid_after_utc


def _not_renewed(finding: Finding) -> KitError:
    return KitError(f"not renewed: {finding.where}: {finding.why or finding.kind}")


def _matching_key(path: Path, certificate: x509.Certificate) -> bytes:
    try:
        pem = path.read_bytes()
        key = serialization.load_pem_private_key(pem, password=None)
    except OSError as error:
        raise KitError(f"{path}: can't read the private key: {error.strerror}") from None
    except (ValueError, TypeError):
        raise KitError(f"{path}: no private key in PEM without a passphrase") from None
    if code_fingerprint(key.public_key()) != code_fingerprint(certificate.public_key()):
        raise KitError(f"{path}: this private key does not belong to the certificate")
    return pem


def _replace(path: Path, content: bytes) -> None:
    """Replaces a file; who owns and may read it stays the same."""
    before = path.stat()
    write_private(path, content)
    os.chown(path, before.st_uid, before.st_gid)
    path.chmod(stat.S_IMODE(before.st_mode))


# -- another version of the package ------------------------------------------------------------------------------------


def install(kit: Path, archive: Path, pins: Pins, *, downgrade: bool = False) -> dict[str, Any]:
    """Installs a site package into a stopped kit that verifies, and keeps the one it replaces for :func:`rollback`.

    An older version is signed as well as a newer one, and may have faults that the newer one mended: it is refused
    unless ``downgrade`` asks for it.

    Everything is checked and written beside the old files first. From then on an interruption is no harm: the next
    call, or the next start, ends what was begun. The site's own files are not touched.

    Returns:
        The manifest of the package.
    """
    finish_installation(kit, pins)
    if running := processes(kit):
        raise KitError(f"{kit}: runs (process {running[0]}); stop it first")
    report = verify(kit, pins)
    if not report.package or any(finding.kind not in {"version", "certificate"} for finding in report.findings):
        raise KitError(f"{kit}: does not verify; mend that before another package is installed")
    new = read_package(archive, pins)
    package: dict[str, Any] = json.loads(new[PACKAGE_MANIFEST])
    if new[PACKAGE_MANIFEST] == (kit / PACKAGE_MANIFEST).read_bytes():
        raise KitError(f"{archive}: fedimaging {package['version']} ({package['sha256'][:16]}) is installed already")
    if not downgrade and _release(package) < _release(report.package):
        raise KitError(
            f"{archive}: refused: fedimaging {package['version']} is older than {report.package['version']}, which is "
            "installed; `rollback` goes back to the version before, `install --downgrade` to any"
        )
    old_names = [*report.package["files"], PACKAGE_MANIFEST, PACKAGE_SIGNATURE]
    old = {name: (kit / name).read_bytes() for name in [*old_names, CODE_KEY]}
    staged = new | {RESOURCES: resources_file(package, report.manifest), PREVIOUS: pack_files(old)}
    work = kit / _STAGING
    shutil.rmtree(work, ignore_errors=True)
    for name, content in staged.items():
        _write_whole(work / name, content)
    work.rename(kit / _STAGED)
    finish_installation(kit, pins)
    return package


def rollback(kit: Path, pins: Pins) -> dict[str, Any]:
    """Installs the package that was in place before; a second rollback undoes the first."""
    finish_installation(kit, pins)
    if not (kit / PREVIOUS).is_file():
        raise KitError(f"{kit}: no other package was installed before")
    return install(kit, kit / PREVIOUS, pins, downgrade=True)


def _release(package: Mapping[str, Any]) -> list[int]:
    """The release number of a package's version (PEP 440, without epochs), to be compared."""
    release = re.match(r"\d+(?:\.\d+)*", package["version"])
    numbers = [int(number) for number in release[0].split(".")] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


def finish_installation(kit: Path, pins: Pins) -> None:
    """Moves the files of a staged package to their places, if one is staged; can be interrupted and repeated.

    What is staged is not trusted: nothing is moved or deleted unless all of it is of a package that the pinned key
    signed. Raises KitError.
    """
    if not (kit / _STAGED).is_dir():
        return
    staged, removed = _check_staged(kit, pins)
    for name in staged:
        target = kit / name
        for folder in reversed([folder for folder in target.parents if not folder.exists()]):
            folder.mkdir()
            folder.chmod(0o755)
        (kit / _STAGED / name).replace(target)
    for name in removed:
        (kit / name).unlink(missing_ok=True)
    for folder in sorted((kit / "local" / "custom").rglob("*"), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    shutil.rmtree(kit / _STAGED)


def _check_staged(kit: Path, pins: Pins) -> tuple[list[str], list[str]]:
    """What is staged to be moved into a kit, and what of the package before is to be deleted then.

    Both are named by manifests that the pinned key signed. The first of them to be moved may be in place already.
    """
    staged = []
    for name, info in _walk(kit):
        if not stat.S_ISREG(info.st_mode):
            raise _not_staged(kit, name, "a symbolic link or special file")
        if name.startswith(f"{_STAGED}/"):
            staged.append(name.removeprefix(f"{_STAGED}/"))

    def read(name: str) -> bytes | None:
        path = kit / _STAGED / name if name in staged else kit / name
        return path.read_bytes() if path.is_file() else None

    report = Report()
    own = _trusted_manifest({name: read(name) for name in (MANIFEST, SIGNATURE, CODE_KEY)}, "kit", pins, report)
    new = _trusted_manifest(
        {name: read(name) for name in (PACKAGE_MANIFEST, PACKAGE_SIGNATURE, CODE_KEY)}, "package", pins, report
    )
    if own is None or new is None or own["settings"] is None:
        where, why = (report.findings[0].where, report.findings[0].why) if report.findings else (_STAGED, "not signed")
        raise _not_staged(kit, where, why)
    signed = new["files"] | {RESOURCES: hash_bytes(resources_file(new, own))}
    for name in staged:
        if name in {PACKAGE_MANIFEST, PACKAGE_SIGNATURE, PREVIOUS}:
            continue
        if not (_is_packaged(name) or name == RESOURCES) or hash_file(kit / _STAGED / name) != signed.get(name):
            raise _not_staged(kit, f"{_STAGED}/{name}", "was changed, or is no file of a package")
    previous = kit / _STAGED / PREVIOUS if PREVIOUS in staged else kit / PREVIOUS
    before = json.loads(read_package(previous, Pins(pins.participant, pins.root, pins.code))[PACKAGE_MANIFEST])
    return staged, sorted(before["files"].keys() - new["files"].keys())


def _not_staged(kit: Path, name: str, why: str) -> KitError:
    return KitError(
        f"{kit}: refused: an installation was begun, but {name}: {why}; nothing was moved; "
        f"fetch the kit again, or look who wrote {_STAGED}"
    )


def _is_packaged(name: str) -> bool:
    return bool(_PACKAGED.fullmatch(name)) and ".." not in name


def read_package(archive: Path, pins: Pins) -> dict[str, bytes]:
    """The files of a site package, which the pinned code key signed, by their place in a kit."""
    try:
        with tarfile.open(archive, mode="r:gz") as tar:
            files = {member.name: _content(tar, member) for member in _limited(tar)}
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise KitError(f"{archive}: can't read the package: {error}") from None
    signed = {name: files.get(name) for name in (PACKAGE_MANIFEST, PACKAGE_SIGNATURE, CODE_KEY)}
    report = Report()
    package = _trusted_manifest(signed, "package", pins, report)
    if package is None:
        why = report.findings[0].why if report.findings else "it is not signed"
        raise KitError(f"{archive}: refused: {why}")
    if why := _unaccepted(package, pins):
        raise KitError(f"{archive}: refused: {why}; `verify --version ... --pin` changes them")
    named = package["files"]
    for name in sorted(set(files) ^ {*named, *signed}):
        raise KitError(f"{archive}: refused: {name} is {'not signed' if name in files else 'missing'}")
    for name, sha256 in named.items():
        if not _is_packaged(name) or hash_bytes(files[name]) != sha256:
            raise KitError(f"{archive}: refused: {name} was changed, or is no file of a package")
    return {name: content for name, content in files.items() if name != CODE_KEY}


def _limited(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    size = 0
    for member in tar:
        size += member.size
        if size > _MAX_PACKAGE:
            raise KitError("refused: larger than any package")
        yield member


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member) if member.isreg() else None
    if content is None:
        raise KitError(f"refused: {member.name} is no plain file")
    return content.read()


def pack_files(files: Mapping[str, bytes]) -> bytes:
    """A gzipped tar of nobody's files, the same bytes for the same files."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name in sorted(files):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(files[name]), 0o644
            tar.addfile(info, io.BytesIO(files[name]))
    return packed.getvalue()


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


# -- the packages that the kit needs ---------------------------------------------------------------------------------


def make_wheelhouse(locks: Sequence[Path], to: Path) -> int:
    """Downloads what the lock files name, for a machine without internet. pip refuses a file with another hash.

    Returns:
        How many files there are.
    """
    if sys.version_info[:2] != PYTHON:
        raise KitError(f"the lock files are for Python {PYTHON[0]}.{PYTHON[1]}; run this with it")
    for lock in locks:
        if not lock.is_file():
            raise KitError(f"{lock}: no such lock file; they are in the kit's local/ and in the public repository")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--dest", str(to)]
        print(f"{lock.name} into {to}", flush=True)
        if subprocess.run([*command, "--requirement", str(lock)], check=False).returncode:  # noqa: S603 (this Python)
            raise KitError(f"{lock}: not all was downloaded; see above")
    return sum(1 for _ in to.iterdir())


# -- start -------------------------------------------------------------------------------------------------------------


def start_environment(kit: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment that a kit runs in: the kit's code and nobody else's, and no bytecode written into it.

    Without PYTHONSAFEPATH and PYTHONPATH, FLARE's processes import from the folder they are started in.
    """
    clean = {name: value for name, value in environment.items() if not name.startswith(("PYTHON", "LD_"))}
    clean["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    return clean | {
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(kit / "local" / "custom"),
    }


def start(kit: Path) -> int:
    """Runs the kit's own start script in the background; its first words go to ``console.log``. :func:`verify` first.

    Returns:
        The process that keeps the kit running.
    """
    if running := processes(kit):
        raise KitError(f"{kit}: runs already (process {running[0]})")
    handle = os.open(kit / CONSOLE_LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "w") as log:
        _script(kit, "start.sh", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True).wait()
    deadline = time.monotonic() + 10
    while not (running := processes(kit)):
        if time.monotonic() > deadline:
            raise KitError(f"{kit}: did not start; see {kit / CONSOLE_LOG}")
        time.sleep(0.1)
    return running[0]


def run(kit: Path) -> int:
    """Runs the kit in the foreground, as a service manager wants it, and passes SIGTERM on. :func:`verify` first.

    Returns:
        The exit code; that of a failure also where an admin asked for a restart, so that the manager starts it anew.
    """
    if (kit / "startup" / "fl_admin.sh").exists():
        return _script(kit, "fl_admin.sh").wait()
    process = _script(kit, "sub_start.sh", "--once")
    asked = []

    def stop_it(number: int, _: object) -> None:
        asked.append(number)
        process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop_it)
    code = process.wait()
    if asked:
        return 0
    return RESTART if (kit / "restart.fl").exists() else abs(code)


def _script(kit: Path, name: str, *arguments: str, **named: Any) -> subprocess.Popen[bytes]:
    script = kit / "startup" / name
    return subprocess.Popen(  # noqa: S603 (call `verify` first)
        ["/bin/bash", str(script), *arguments], cwd=kit, env=start_environment(kit, os.environ), umask=0o077, **named
    )


def stop(kit: Path, seconds: float) -> list[int]:
    """Stops a kit that runs: FLARE says good-bye to the server first. Returns what had to be killed.

    The script that would start FLARE anew is ended before FLARE; jobs end with FLARE.
    """
    keeper = str(kit / "startup" / "sub_start.sh")
    keepers = [number for number in processes(kit) if keeper in _command_line(number)]
    for number in [*keepers, *_parents([number for number in processes(kit) if number not in keepers])]:
        _signal(number, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while (running := processes(kit)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for number in running:
        _signal(number, signal.SIGKILL)
    for name in ("pid.fl", "daemon_pid.fl", "shutdown.fl", "restart.fl"):
        (kit / name).unlink(missing_ok=True)
    return running


def processes(kit: Path) -> list[int]:
    """The running processes of a kit, the first started first: FLARE's script that keeps it running, FLARE, jobs."""
    numbers = sorted(int(entry.name) for entry in Path("/proc").glob("[0-9]*"))
    return [number for number in numbers if _is_of(kit, _command_line(number))]


def _is_of(kit: Path, line: Sequence[str]) -> bool:
    flare = any(part.startswith("nvflare.private.fed.app.") for part in line)
    return str(kit / "startup" / "sub_start.sh") in line or (flare and str(kit) in line)


def _parents(numbers: Sequence[int]) -> list[int]:
    """Those that none of the others started."""
    return [number for number in numbers if _parent(number) not in numbers]


def _parent(number: int) -> int:
    try:
        return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _command_line(number: int) -> list[str]:
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _signal(number: int, what: signal.Signals) -> None:
    try:
        os.kill(number, what)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise KitError(f"process {number} belongs to another user; stop the kit as that user") from None


def service_unit(kit: Path, pins: Path, user: str, data: Sequence[Path], allow: Sequence[str]) -> str:
    """The kit's systemd unit for this machine: images are only read, and only the server and name servers reached.

    Args:
        kit: its folder.
        pins: the file that `verify --pin` wrote.
        user: who runs it.
        data: folders of images.
        allow: further addresses or networks, such as a forward proxy's.
    """
    host, port = server_address(kit)
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        found |= {str(ipaddress.ip_network(text, strict=False)) for text in [*allow, *_name_servers()]}
    except ValueError as error:
        raise KitError(f"--allow: {error}") from None
    except OSError as error:
        raise KitError(
            f"{host}: can't be resolved ({error.strerror}); the unit lets the kit reach its addresses only"
        ) from None
    paths = {"kit": kit, "pins": pins, "kit_py": Path(__file__).resolve(), "python": Path(sys.executable)}
    for path in [*paths.values(), *data]:
        if not re.fullmatch(r"[\w./@+-]+", str(path)):
            raise KitError(f"{path}: systemd needs a path without spaces and special characters")
    values = {name: str(path) for name, path in paths.items()} | {
        "user": user,
        "server": " ".join(sorted(found)),
        "data": " ".join(str(path) for path in data) or "-/nonexistent",
    }
    return re.sub(r"@(\w+)@", lambda name: values[name[1]], (kit / UNIT).read_text())


def _name_servers() -> list[str]:
    try:
        lines = [line.split() for line in Path("/etc/resolv.conf").read_text().splitlines()]
    except OSError:
        return []
    return [words[1].partition("%")[0] for words in lines if words[:1] == ["nameserver"] and len(words) > 1]


def server_address(kit: Path) -> tuple[str, int]:
    """The one host and port that a hospital's kit connects to."""
    file = kit / "startup" / "fed_client.json"
    try:
        host, _, port = json.loads(file.read_text())["servers"][0]["service"]["target"].rpartition(":")
        return host, int(port)
    except OSError:
        raise KitError(f"{kit}: no hospital's kit") from None


# -- commands ----------------------------------------------------------------------------------------------------------


def add_commands(subparsers: Any, status: bool = True) -> None:
    """Registers the commands of this file; without ``status`` where that means another thing."""
    parser = _command(
        subparsers, "request", "make a private key and a request for its kit", "request hospital-a --org hospital_a"
    )
    parser.add_argument("name", help="the participant's name that you agreed on")
    parser.add_argument("--org", required=True, help="its organisation, as in project.yml")
    parser.add_argument("--role", choices=_ROLES, default="client", help="a hospital is a client, which is the default")
    parser.add_argument("--to", type=Path, default=Path(), help="folder for both files (default: here)")
    parser.set_defaults(run=_run_request)
    parser = _command(subparsers, "open", "unpack an encrypted kit", "open hospital-a.kit --to /srv/fedimaging")
    parser.add_argument("archive", type=Path, help="the encrypted archive")
    parser.add_argument("--to", type=Path, default=Path(), help="folder to make <participant>/ in (default: here)")
    parser.add_argument("--key", type=Path, metavar="FILE", help="your private key, if the kit was built on a request")
    add_passphrase_file(parser, PASSPHRASE_VARIABLE)
    parser.set_defaults(run=_run_open)
    parser = _command(
        subparsers,
        "verify",
        "check a kit against the fingerprints from the phone",
        "verify /srv/fedimaging/hospital-a --name hospital-a --root '3f2a ...' --code '91bc ...' --pin pins.json",
    )
    parser.add_argument("kit", type=Path, help="the kit's folder")
    parser.add_argument("--name", help="the participant's name that you agreed on")
    parser.add_argument("--root", metavar="FINGERPRINT", help="SHA-256 of the root certificate, from the phone")
    parser.add_argument("--code", metavar="FINGERPRINT", help="SHA-256 of the code-signing key, from the phone")
    parser.add_argument("--version", action="append", default=[], dest="versions", help="accept this package version")
    parser.add_argument("--pins", type=Path, help="take name and fingerprints from this file")
    parser.add_argument("--pin", type=Path, metavar="FILE", help="if all is well, keep them in this file for `start`")
    parser.set_defaults(run=_run_verify)
    parser = _command(
        subparsers,
        "wheelhouse",
        "download what a kit needs, for a machine without internet",
        "wheelhouse requirements-build.lock requirements.lock --to wheelhouse",
    )
    parser.add_argument("locks", type=Path, nargs="+", help="lock files, of the kit's local/ or the public repository")
    parser.add_argument("--to", type=Path, required=True, help="the folder to fill")
    parser.set_defaults(run=_run_wheelhouse)
    _add_operations(subparsers, status)


def _add_operations(subparsers: Any, status: bool) -> None:
    """The commands for a kit that was verified once and is pinned."""
    where, pins = "/srv/fedimaging/hospital-a", "--pins /etc/fedimaging/pins.json"

    def add(name: str, says: str, options: str, run: Callable[[argparse.Namespace], int | None]) -> Any:
        parser = _command(subparsers, name, says, f"{name} {options}")
        parser.add_argument("kit", type=Path, help="the kit's folder")
        if pins in options:
            parser.add_argument("--pins", type=Path, required=True, help="the file that `verify --pin` wrote")
        parser.set_defaults(run=run)
        return parser

    add("preflight", "check what a kit needs and say how to mend what fails", f"{where} {pins}", _run_preflight)
    parser = add("start", "verify a kit and start it", f"{where} {pins}", _run_start)
    parser.add_argument("--foreground", action="store_true", help="stay in the foreground, for systemd")
    for name, says, options, run in (
        ("stop", "stop a kit; the server is told", where, _run_stop),
        ("restart", "verify a kit, stop it and start it again", f"{where} {pins}", _run_restart),
    ):
        parser = add(name, says, options, run)
        parser.add_argument("--seconds", type=float, default=60, help="then it is ended by force (default: 60)")
        parser.set_defaults(foreground=False)
    if status:
        add("status", "say what a kit holds, whether it runs and reached the server", f"{where} {pins}", _run_status)
    parser = add("logs", "show the end of a kit's log", f"{where} --follow", _run_logs)
    parser.add_argument("--lines", type=int, default=50, help="how many (default: 50)")
    parser.add_argument("--follow", action="store_true", help="wait for more")
    parser = add("fedimaging", "run a command of the kit's package", f"{pins} {where} data index --help", _run_package)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command and its options")
    parser = add("install", "install a site package into a stopped kit", f"{where} new.package {pins}", _run_install)
    parser.add_argument("package", type=Path, help="the package that the project admin issued")
    parser.add_argument("--downgrade", action="store_true", help="also if it is older than the one in place")
    add("finish", "end an installation that a power cut interrupted, if there is one", f"{where} {pins}", _run_finish)
    add("rollback", "install the package that was in place before", f"{where} {pins}", _run_rollback)
    example = f"{where} hospital-a.crt {pins}"
    parser = add("install-certificate", "put a renewed certificate into a kit", example, _run_install_certificate)
    parser.add_argument("certificate", type=Path, help="the renewed certificate")
    parser.add_argument("--key", type=Path, metavar="FILE", help="the new private key, if you made another request")
    example = f"{where} {pins} --user fedimaging --data /srv/xray"
    parser = add("unit", "print a systemd unit that runs a kit", example, _run_unit)
    parser.add_argument("--user", required=True, help="the ordinary user that runs the kit")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="folders of images, to be read only")
    parser.add_argument("--allow", nargs="*", default=[], help="further addresses to reach, such as a proxy's")


def _command(subparsers: Any, name: str, says: str, example: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=says,
        description=says[0].upper() + says[1:] + ".",
        epilog=f"example:\n  {subparsers._prog_prefix} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return command


def add_passphrase_file(parser: argparse.ArgumentParser, variable: str) -> None:
    parser.add_argument(
        "--passphrase-file", type=Path, metavar="FILE", help=f"holds the passphrase (default: ${variable}, else asked)"
    )


def read_passphrase(file: Path | None, variable: str, prompt: str) -> str:
    """A passphrase from an owner-only file, the environment or the terminal; never from the command line."""
    if file is not None:
        try:
            if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise KitError(f"{file}: others may read this passphrase file; chmod 600")
            return file.read_text().rstrip("\r\n")
        except OSError as error:
            raise KitError(f"{file}: can't read the passphrase: {error.strerror}") from None
    if variable in os.environ:
        return os.environ[variable]
    if not sys.stdin.isatty():
        raise KitError(f"no terminal to ask for the passphrase; use --passphrase-file or ${variable}")
    return getpass.getpass(prompt)


def _run_request(arguments: argparse.Namespace) -> None:
    key, request, digits = make_request(arguments.name, arguments.org, arguments.role, arguments.to)
    print(f"{request}: send this to the project admin, and read this fingerprint of its key out over the phone:")
    print(f"  {spoken(digits)}")
    print(f"{key}: your private key; it goes nowhere; `open --key` puts it into the kit")


def _run_install_certificate(arguments: argparse.Namespace) -> None:
    until = install_certificate(arguments.kit, arguments.certificate, Pins.read(arguments.pins), arguments.key)
    print(f"renewed: valid until {until:%Y-%m-%d}; restart to use it")


def _run_open(arguments: argparse.Namespace) -> None:
    passphrase = read_passphrase(arguments.passphrase_file, PASSPHRASE_VARIABLE, "passphrase of the kit: ")
    folder = open_archive(arguments.archive, passphrase.strip(), arguments.to)
    if arguments.key:
        try:
            place_key(folder, arguments.key)
        except KitError:
            shutil.rmtree(folder)
            raise
    print(f"unpacked into {folder}; nothing of it is verified yet")


def _run_verify(arguments: argparse.Namespace) -> int:
    report = verify(arguments.kit, _pins(arguments))
    if _say(arguments.kit, report) and arguments.pin:
        if arguments.pin.resolve().is_relative_to(arguments.kit.resolve()):
            raise KitError(f"{arguments.pin}: keep the pins outside the kit")
        _pins(arguments).write(arguments.pin)
        print(f"pinned in {arguments.pin}")
    return 1 if report.findings else 0


def _run_wheelhouse(arguments: argparse.Namespace) -> None:
    count = make_wheelhouse(arguments.locks, arguments.to)
    print(f"{arguments.to}: {count} files; GUIDE.md says how they are installed")


def _run_preflight(arguments: argparse.Namespace) -> int:
    kit = arguments.kit.resolve()
    if not _say(kit, verify(kit, Pins.read(arguments.pins))):
        return 1
    sys.stdout.flush()
    return _with_package(kit, "fedimaging.federation.preflight", str(kit))


def _run_package(arguments: argparse.Namespace) -> int:
    kit = arguments.kit.resolve()
    if not _say_problems(kit, verify(kit, Pins.read(arguments.pins))):
        return 1
    return _with_package(kit, "fedimaging", *arguments.arguments)


def _with_package(kit: Path, module: str, *arguments: str) -> int:
    """Runs a module of the kit's package in this Python's environment. Call :func:`verify` first."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=start_environment(kit, os.environ), check=False).returncode  # noqa: S603


def _run_start(arguments: argparse.Namespace) -> int:
    kit = arguments.kit.resolve()
    pins = Pins.read(arguments.pins)
    finish_installation(kit, pins)
    if not _say(kit, verify(kit, pins)):
        return 1
    sys.stdout.flush()
    if arguments.foreground or (kit / "startup" / "fl_admin.sh").exists():
        return run(kit)
    print(f"started: process {start(kit)}; `logs` shows what it says, `status` whether the server knows it")
    return 0


def _run_stop(arguments: argparse.Namespace) -> None:
    kit = arguments.kit.resolve()
    if not processes(kit):
        print(f"{kit}: does not run")
        return
    killed = stop(kit, arguments.seconds)
    print(f"stopped after {arguments.seconds:g} seconds by force" if killed else "stopped")


def _run_restart(arguments: argparse.Namespace) -> int:
    if not _say(arguments.kit, verify(arguments.kit, Pins.read(arguments.pins))):
        return 1
    _run_stop(arguments)
    return _run_start(arguments)


def _run_status(arguments: argparse.Namespace) -> int:
    kit = arguments.kit.resolve()
    report = verify(kit, Pins.read(arguments.pins))
    verified = _say(kit, report)
    if report.package:
        print(f"package      fedimaging {report.package['version']}, {report.package['sha256']}")
    running = processes(kit)
    print(f"runs         {', '.join(map(str, running)) if running else 'no'}")
    if running:
        lines = [line for line in _tail(kit / "log.txt", 2000) if _CONNECTION.search(line)]
        print(f"server       {lines[-1].strip() if lines else 'not reached yet; see `logs`'}")
    return 0 if verified and running else 1


def _run_logs(arguments: argparse.Namespace) -> None:
    path = arguments.kit / "log.txt"
    if not path.exists():
        raise KitError(f"{path}: nothing was logged yet; the first words of a start are in {CONSOLE_LOG}")
    print("".join(_tail(path, arguments.lines)), end="", flush=True)
    if not arguments.follow:
        return
    file = path.open(errors="replace")
    file.seek(0, os.SEEK_END)
    while True:
        if line := file.readline():
            print(line, end="", flush=True)
        elif path.exists() and path.stat().st_ino != os.fstat(file.fileno()).st_ino:
            file.close()
            file = path.open(errors="replace")
        else:
            time.sleep(0.2)


def _tail(path: Path, lines: int) -> list[str]:
    if not path.exists():
        return []
    with path.open(errors="replace") as file:
        return list(deque(file, maxlen=lines))


def _run_install(arguments: argparse.Namespace) -> int:
    kit, pins = arguments.kit.resolve(), Pins.read(arguments.pins)
    return _say_installed(arguments, install(kit, arguments.package, pins, downgrade=arguments.downgrade))


def _run_rollback(arguments: argparse.Namespace) -> int:
    return _say_installed(arguments, rollback(arguments.kit.resolve(), Pins.read(arguments.pins)))


def _run_finish(arguments: argparse.Namespace) -> None:
    finish_installation(arguments.kit.resolve(), Pins.read(arguments.pins))


def _say_installed(arguments: argparse.Namespace, package: Mapping[str, Any]) -> int:
    print(f"installed: fedimaging {package['version']} ({package['sha256']}); `rollback` undoes it")
    for name in ("privacy.json", "authorization.json", "resources.json", "log_config.json"):
        own, default = (arguments.kit / "local" / f"{name}{suffix}" for suffix in ("", ".default"))
        if own.exists() and own.read_bytes() != default.read_bytes():
            print(f"your own    local/{name} stays in force; compare it with the new {default.name}")
    return 0 if _say(arguments.kit, verify(arguments.kit, Pins.read(arguments.pins))) else 1


def _run_unit(arguments: argparse.Namespace) -> int:
    kit = arguments.kit.resolve()
    if not _say_problems(kit, verify(kit, Pins.read(arguments.pins))):
        return 1
    data = [path.resolve() for path in arguments.data]
    print(service_unit(kit, arguments.pins.resolve(), arguments.user, data, arguments.allow), end="")
    return 0


def _pins(arguments: argparse.Namespace) -> Pins:
    if arguments.pins:
        return Pins.read(arguments.pins)
    if not (arguments.name and arguments.root and arguments.code):
        raise KitError("verify needs --name, --root and --code, or --pins with a file that holds them")
    return Pins(arguments.name, fingerprint(arguments.root), fingerprint(arguments.code), tuple(arguments.versions))


def _say_problems(kit: Path, report: Report) -> bool:
    """Prints what is wrong with a kit, if anything. Returns whether the kit may be used."""
    for finding in report.findings:
        print(finding, file=sys.stderr)
    if report.findings:
        print(f"refused: {kit}: {len(report.findings)} findings; do not start this kit", file=sys.stderr)
    return not report.findings


def _say(kit: Path, report: Report) -> bool:
    """Prints a report. Returns whether the kit may be used."""
    if not _say_problems(kit, report):
        return False
    package = report.package
    code = f", fedimaging {package['version']} ({package['sha256'][:16]})" if package else ""
    signed = len(report.manifest["files"]) + len(package.get("files", ()))
    print(
        f"verified: {report.manifest['participant']} of {report.manifest['project']}{code}, "
        f"{signed} signed files, certificate valid for {report.days_left} days"
    )
    for name in report.site_changes:
        print(f"your own    {name} (differs from what was delivered, as it may)")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python kit.py",
        description="Opens, verifies and starts a startup kit.",
        epilog="example:\n  python kit.py open hospital-a.kit --to /srv/fedimaging",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_commands(parser.add_subparsers(metavar="COMMAND", required=True))
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except KitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
