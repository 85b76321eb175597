#!/usr/bin/env python3
"""Opens, verifies and starts a startup kit. This one file needs Python 3.11 or newer and `cryptography`, nothing else.

It trusts nothing in the kit. What it trusts are the two fingerprints that the project admin read out over the phone,
and the name of the participant. Nothing of the kit is run or imported before everything is verified.

    python kit.py open hospital-a.kit --to /srv/fedimaging
    python kit.py verify /srv/fedimaging/hospital-a --name hospital-a --root '3f2a ...' --code '91bc ...' --pin p.json
    python kit.py start /srv/fedimaging/hospital-a --pins p.json
"""

from __future__ import annotations

import argparse
import getpass
import hashlib
import io
import json
import os
import re
import stat
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.x509.oid import NameOID

MANIFEST, SIGNATURE, CODE_KEY = "kit_manifest.json", "kit_manifest.sig", "code_signing.pem"
ROOT = "startup/rootCA.pem"
ARCHIVE = "fedimaging-kit-1"
PASSPHRASE_VARIABLE = "KIT_PASSPHRASE"  # noqa: S105 (the name of a variable)
FORMAT = 1

_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 2**17, 8, 1
_MAX_SCRYPT_N = 2**20
_HEADER_BYTES = 4096
_CODE_SUFFIXES = (".py", ".pyc", ".pyo", ".pyd", ".so", ".pth", ".sh", ".egg")
_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_RUNTIME = re.compile(
    r"(?:error_log|log|log_fl)\.txt(?:\.\d+)?|log\.json(?:\.\d+)?|audit\.log(?:\.\d+)?|"
    rf"(?:pid|daemon_pid|restart|shutdown)\.fl|\.admin_cli_history|study_registry\.json|{_UUID}(?:/.*)?|transfer/.*"
)
"""what FLARE writes beside startup/ and local/ while it runs"""


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
    manifest = _trusted_manifest(kit, pins, report)
    if manifest is not None:
        report.manifest = manifest
        _check_files(kit, manifest, report)
        _check_versions(manifest, pins, report)
    _check_certificates(kit, pins, manifest, report, now or datetime.now(UTC))
    return report


def _trusted_manifest(kit: Path, pins: Pins, report: Report) -> dict[str, Any] | None:
    contents = {name: _read(kit, name, report) for name in (CODE_KEY, SIGNATURE, MANIFEST)}
    key_pem, signature, raw = contents.values()
    if key_pem is None or signature is None or raw is None:
        return None
    try:
        key = serialization.load_pem_public_key(key_pem)
    except ValueError:
        report.add("code key", CODE_KEY, "no public key")
        return None
    if not isinstance(key, ec.EllipticCurvePublicKey) or code_fingerprint(key) != pins.code:
        report.add("code key", CODE_KEY, "the kit is signed by another key than the pinned one")
        return None
    try:
        key.verify(signature, raw, ec.ECDSA(hashes.SHA256()))
        manifest = json.loads(raw)
    except InvalidSignature:
        report.add("changed", MANIFEST, "the signature does not fit")
        return None
    if manifest.get("format") != FORMAT:
        report.add("version", MANIFEST, "made by a newer version; use that version's kit.py")
        return None
    return dict(manifest)


def _check_files(kit: Path, manifest: Mapping[str, Any], report: Report) -> None:
    signed: dict[str, str] = manifest["files"]
    site: dict[str, dict[str, Any]] = manifest["site_files"]
    known = {*signed, *site, manifest["key"], MANIFEST, SIGNATURE, CODE_KEY}
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
    """Whether FLARE writes such a file while it runs. Code is none, but in transfer/, from where nothing is run."""
    return bool(_RUNTIME.fullmatch(name)) and (
        name.startswith("transfer/") or not name.lower().endswith(_CODE_SUFFIXES)
    )


def _check_versions(manifest: Mapping[str, Any], pins: Pins, report: Report) -> None:
    if manifest["participant"] != pins.participant:
        report.add("name", MANIFEST, f"this is the kit of {manifest['participant']}, not of {pins.participant}")
    package = manifest.get("package")
    if pins.versions and package and package["version"] not in pins.versions:
        report.add(
            "version", "local/custom", f"fedimaging {package['version']}; accepted are {', '.join(pins.versions)}"
        )


def _check_certificates(
    kit: Path, pins: Pins, manifest: Mapping[str, Any] | None, report: Report, now: datetime
) -> None:
    root = _certificate(kit, ROOT, report)
    name = manifest["certificate"] if manifest else _own_certificate(kit)
    own = _certificate(kit, name, report)
    if root is not None:
        if root_fingerprint(root) != pins.root:
            report.add("root", ROOT, "another root than the pinned one")
        _check_dates(root, ROOT, now, report)
    if own is None:
        return
    report.days_left = (own.not_valid_after_utc - now).days
    _check_dates(own, name, now, report)
    common_name = own.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if not common_name or common_name[0].value != pins.participant:
        whose = common_name[0].value if common_name else "nobody"
        report.add("name", name, f"the certificate is {whose!r}'s, not {pins.participant!r}'s")
    if root is not None:
        try:
            own.verify_directly_issued_by(root)
        except (ValueError, TypeError, InvalidSignature):
            report.add("certificate", name, "not issued by the kit's root")
    _check_key(kit, name.removesuffix(".crt") + ".key", own, report)


def _check_dates(certificate: x509.Certificate, name: str, now: datetime, report: Report) -> None:
    if now < certificate.not_valid_before_utc:
        report.add("certificate", name, f"not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")
    if now > certificate.not_valid_after_utc:
        report.add("certificate", name, f"expired on {certificate.not_valid_after_utc:%Y-%m-%d}; ask for a renewal")


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


def _certificate(kit: Path, name: str, report: Report) -> x509.Certificate | None:
    pem = _read(kit, name, report)
    if pem is None:
        return None
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        report.add("changed", name, "no certificate")
        return None


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


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- encryption under a passphrase -------------------------------------------------------------------------------------


def seal(plain: bytes, passphrase: str, kind: str, **says: str) -> bytes:
    """Encrypts: one line of JSON that says how, and the AES-256-GCM ciphertext with that line as associated data.

    The key comes from the passphrase by scrypt. ``says`` is readable by all, and authentic once opened.
    """
    salt, nonce = os.urandom(16), os.urandom(12)
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
        known = header["format"] == kind and 2 <= n <= _MAX_SCRYPT_N and (r, p) == (_SCRYPT_R, _SCRYPT_P)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise KitError(f"{where}: not a file of the format {kind}")
    key = Scrypt(salt=salt, length=32, n=n, r=r, p=p).derive(passphrase.encode())
    try:
        return AESGCM(key).decrypt(nonce, sealed[end:], sealed[:end]), header
    except InvalidTag:
        raise KitError(f"{where}: wrong passphrase, or the file was changed on its way") from None


def open_archive(archive: Path, passphrase: str, to: Path) -> Path:
    """Unpacks an encrypted kit into ``to/<participant>``, which must not exist. Returns that folder."""
    try:
        sealed = archive.read_bytes()
    except OSError as error:
        raise KitError(f"{archive}: can't read the archive: {error.strerror}") from None
    plain, header = unseal(sealed, passphrase, ARCHIVE, str(archive))
    folder = to / str(header["participant"])
    if folder.parent != to or folder.name in {"", ".", ".."}:
        raise KitError(f"{archive}: the participant's name is no folder name")
    if folder.exists():
        raise KitError(f"{folder}: is there already; move it away first, a kit is not unpacked over another")
    to.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700)
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        for member in tar:
            _extract(tar, member, folder)
    return folder


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    parts = PurePosixPath(member.name).parts
    if PurePosixPath(member.name).is_absolute() or ".." in parts or not (member.isreg() or member.isdir()):
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


def start(kit: Path, foreground: bool) -> NoReturn:
    """Replaces this process by the kit's own start script. Call :func:`verify` first."""
    kit = kit.resolve()
    script = kit / "startup" / ("sub_start.sh" if foreground else "start.sh")
    arguments = ["--once"] if foreground else []
    if (kit / "startup" / "fl_admin.sh").exists():
        script, arguments = kit / "startup" / "fl_admin.sh", []
    os.umask(0o077)
    os.chdir(kit)
    sys.stdout.flush()
    bash = "/bin/bash"
    os.execve(bash, [bash, str(script), *arguments], start_environment(kit, os.environ))  # noqa: S606


# -- commands ----------------------------------------------------------------------------------------------------------


def add_commands(subparsers: Any) -> None:
    """Registers ``open``, ``verify`` and ``start``."""
    parser = _command(subparsers, "open", "unpack an encrypted kit", "open hospital-a.kit --to /srv/fedimaging")
    parser.add_argument("archive", type=Path, help="the encrypted archive")
    parser.add_argument("--to", type=Path, default=Path(), help="folder to make <participant>/ in (default: here)")
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
        "start",
        "verify a kit and start it",
        "start /srv/fedimaging/hospital-a --pins /etc/fedimaging/pins.json",
    )
    parser.add_argument("kit", type=Path, help="the kit's folder")
    parser.add_argument("--pins", type=Path, required=True, help="the file that `verify --pin` wrote")
    parser.add_argument("--foreground", action="store_true", help="stay in the foreground, for systemd")
    parser.set_defaults(run=_run_start)


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


def _run_open(arguments: argparse.Namespace) -> None:
    passphrase = read_passphrase(arguments.passphrase_file, PASSPHRASE_VARIABLE, "passphrase of the kit: ")
    folder = open_archive(arguments.archive, passphrase.strip(), arguments.to)
    print(f"unpacked into {folder}; nothing of it is verified yet")


def _run_verify(arguments: argparse.Namespace) -> int:
    report = verify(arguments.kit, _pins(arguments))
    if _say(arguments.kit, report) and arguments.pin:
        if arguments.pin.resolve().is_relative_to(arguments.kit.resolve()):
            raise KitError(f"{arguments.pin}: keep the pins outside the kit")
        _pins(arguments).write(arguments.pin)
        print(f"pinned in {arguments.pin}")
    return 1 if report.findings else 0


def _run_start(arguments: argparse.Namespace) -> int:
    report = verify(arguments.kit, Pins.read(arguments.pins))
    if not _say(arguments.kit, report):
        return 1
    start(arguments.kit, arguments.foreground)


def _pins(arguments: argparse.Namespace) -> Pins:
    if arguments.pins:
        return Pins.read(arguments.pins)
    if not (arguments.name and arguments.root and arguments.code):
        raise KitError("verify needs --name, --root and --code, or --pins with a file that holds them")
    return Pins(arguments.name, fingerprint(arguments.root), fingerprint(arguments.code), tuple(arguments.versions))


def _say(kit: Path, report: Report) -> bool:
    """Prints a report. Returns whether the kit may be used."""
    for finding in report.findings:
        print(finding, file=sys.stderr)
    if report.findings:
        print(f"refused: {kit}: {len(report.findings)} findings; do not start this kit", file=sys.stderr)
        return False
    package = report.manifest.get("package")
    code = f", fedimaging {package['version']} ({package['sha256'][:16]})" if package else ""
    print(
        f"verified: {report.manifest['participant']} of {report.manifest['project']}{code}, "
        f"{len(report.manifest['files'])} signed files, certificate valid for {report.days_left} days"
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
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
