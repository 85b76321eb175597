"""The federation's two private keys: the root's, which makes participants, and the code key, which signs kits."""

from __future__ import annotations

import argparse
import getpass
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from nvflare.lighter.utils import Identity, generate_cert

from fedimaging.errors import FedImagingError
from fedimaging.federation.revocation import removed, superseded
from provisioning.kit import code_fingerprint, read_passphrase, root_fingerprint, seal, unseal, write_private

SEALED = "keys.sealed"
PASSPHRASE_VARIABLE = "PROVISIONING_PASSPHRASE"  # noqa: S105 (the name of a variable)
CLOCK_SKEW = timedelta(hours=1)
"""certificates are valid from so long ago, for participants whose clocks are behind"""

_KIND = "fedimaging-keys-1"
_RSA_BITS = 3072
_MIN_PASSPHRASE = 12
_PEM_END = b"-----END"


@dataclass(frozen=True)
class Keys:
    """In memory only while a command runs; on disk only encrypted under the project admin's passphrase."""

    root_key: rsa.RSAPrivateKey
    root: x509.Certificate
    code_key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, federation: str, valid_days: int) -> Keys:
        """A new root, with a self-signed certificate named after the federation, and a new code key."""
        root_key = new_rsa_key()
        before = datetime.now(UTC) - CLOCK_SKEW
        name = Identity(federation)
        root = generate_cert(
            subject=name,
            issuer=name,
            signing_pri_key=root_key,
            subject_pub_key=root_key.public_key(),
            ca=True,
            not_valid_before=before,
            not_valid_after=before + timedelta(days=valid_days),
        )
        return cls(root_key, root, ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def read(cls, folder: Path, passphrase: str) -> Keys:
        path = folder / SEALED
        plain, _ = unseal(path.read_bytes(), passphrase, _KIND, str(path))
        root_key, code_key, root = (part + b"\n" for part in plain.split(b"\n\n"))
        return cls(
            serialization.load_pem_private_key(root_key, password=None),  # type: ignore[arg-type]
            x509.load_pem_x509_certificate(root),
            serialization.load_pem_private_key(code_key, password=None),  # type: ignore[arg-type]
        )

    def write(self, folder: Path, passphrase: str) -> None:
        parts = [
            private_pem(self.root_key),
            private_pem(self.code_key),
            self.root.public_bytes(serialization.Encoding.PEM),
        ]
        plain = b"\n\n".join(part.strip() for part in parts)
        write_private(folder / SEALED, seal(plain, passphrase, _KIND))

    def revocation_list(self, number: int, entries: Iterable[Revoked]) -> bytes:
        return revocation_list(self.root_key, self.root, number, entries)

    @property
    def root_fingerprint(self) -> str:
        return root_fingerprint(self.root)

    @property
    def code_fingerprint(self) -> str:
        return code_fingerprint(self.code_key.public_key())


@dataclass(frozen=True)
class Revoked:
    """An entry of the revocation list: whose certificate, since when, and whether the participant itself is gone."""

    serial: str
    name: str
    since: str
    removed: bool


def revocation_list(
    root_key: rsa.RSAPrivateKey, root: x509.Certificate, number: int, entries: Iterable[Revoked]
) -> bytes:
    """A CRL (RFC 5280) in PEM. It holds until the next one comes, so its next update is the root's end."""
    now = datetime.now(UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(root.subject)
        .last_update(now)
        .next_update(root.not_valid_after_utc)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
    )
    for entry in entries:
        revoked = (
            x509.RevokedCertificateBuilder()
            .serial_number(int(entry.serial, 16))
            .revocation_date(datetime.fromisoformat(entry.since))
        )
        for extension in removed(entry.name) if entry.removed else superseded(entry.name):
            revoked = revoked.add_extension(extension, critical=False)
        builder = builder.add_revoked_certificate(revoked.build())
    return builder.sign(root_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def new_rsa_key() -> rsa.RSAPrivateKey:
    """RSA, which FLARE's job signatures need; 3072 bits, as NIST SP 800-57 asks for beyond 2030."""
    return rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS)


def private_pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def admin_passphrase(arguments: argparse.Namespace, folder: Path) -> Callable[[], str]:
    """How to get the project admin's passphrase, once it is needed; a first one is asked for twice."""

    def get() -> str:
        file = arguments.passphrase_file
        first = not (folder / SEALED).exists()
        passphrase = read_passphrase(file, PASSPHRASE_VARIABLE, "passphrase of the federation's keys: ")
        asked = first and file is None and PASSPHRASE_VARIABLE not in os.environ
        if asked and getpass.getpass("the same again: ") != passphrase:
            raise FedImagingError("the two passphrases differ; nothing was made")
        if first and len(passphrase) < _MIN_PASSPHRASE:
            raise FedImagingError(f"the passphrase of the federation's keys needs {_MIN_PASSPHRASE} characters or more")
        return passphrase

    return get
