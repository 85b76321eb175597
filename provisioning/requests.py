"""Requests for certificates (PKCS #10) of participants who keep their private key to themselves."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from fedimaging.errors import FedImagingError

_MIN_RSA_BITS = 2048
"""what `nvflare cert request` makes; kit.py makes 3072"""
_EXPONENT = 65537
_MAX_BYTES = 2**16
_SUFFIXES = (".csr", ".pem", ".zip")


def read_requests(paths: Iterable[Path], new: Mapping[str, Mapping[str, Any]]) -> dict[str, rsa.RSAPublicKey]:
    """Reads and checks requests: files of kit.py or of ``nvflare cert request`` (also its zip), or folders of them.

    Args:
        paths: files and folders.
        new: the participants, by name, whom a kit is to be built for, as project.yml describes them.

    Returns:
        Public keys by participant.

    Raises:
        FedImagingError: for the first request that is damaged, not signed by its own key, of a weak key, or does not
            fit a participant's name, organisation and role.
    """
    keys: dict[str, rsa.RSAPublicKey] = {}
    for path in _files(paths):
        request = _read(path)
        name = _subject(request, NameOID.COMMON_NAME)
        if name is None or name not in new:
            raise FedImagingError(f"{path}: asks for {name!r}, who is not a new participant of the project")
        if name in keys:
            raise FedImagingError(f"{path}: a second request of {name}; keep the right one only")
        keys[name] = check_request(path, request, new[name])
    return keys


def read_request(path: Path, name: str, entry: Mapping[str, Any]) -> rsa.RSAPublicKey:
    """Reads and checks one participant's request, as :func:`read_requests` does."""
    request = _read(path)
    if (asked := _subject(request, NameOID.COMMON_NAME)) != name:
        raise FedImagingError(f"{path}: asks for {asked!r}, not for {name!r}")
    return check_request(path, request, entry)


def check_request(path: Path, request: x509.CertificateSigningRequest, entry: Mapping[str, Any]) -> rsa.RSAPublicKey:
    """The request's public key, if it is signed by it, strong, and for the organisation and role of ``entry``."""
    if not request.is_signature_valid:
        raise FedImagingError(
            f"{path}: the request's signature does not fit; it was changed, or its key is not its own"
        )
    key = request.public_key()
    if not isinstance(key, rsa.RSAPublicKey):
        raise FedImagingError(f"{path}: the key must be RSA, which FLARE's signatures need")
    if key.key_size < _MIN_RSA_BITS or key.public_numbers().e != _EXPONENT:
        raise FedImagingError(
            f"{path}: the key is too weak (RSA {key.key_size}, exponent {key.public_numbers().e}); "
            f"{_MIN_RSA_BITS} bits and {_EXPONENT} at least"
        )
    if (org := _subject(request, NameOID.ORGANIZATION_NAME)) != entry["org"]:
        raise FedImagingError(f"{path}: is of the organisation {org!r}; project.yml says {entry['org']!r}")
    role = _subject(request, NameOID.UNSTRUCTURED_NAME)
    if role != (wanted := entry.get("role") or entry["type"]):
        raise FedImagingError(f"{path}: is for a {role or 'participant without a role'}; project.yml says {wanted}")
    return key


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        inside = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
        if not inside:
            raise FedImagingError(f"{path}: holds no request ({', '.join(_SUFFIXES)})")
        yield from inside


def _read(path: Path) -> x509.CertificateSigningRequest:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        if zipfile.is_zipfile(path):
            raw = _from_zip(path)
        if len(raw) > _MAX_BYTES:
            raise FedImagingError(f"{path}: too large for a request")
        request = x509.load_pem_x509_csr(raw)
        request.public_key()
        return request
    except OSError as error:
        raise FedImagingError(f"{path}: can't read the request: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm, zipfile.BadZipFile):
        raise FedImagingError(f"{path}: no certificate request in PEM") from None


def _from_zip(path: Path) -> bytes:
    """The one .csr in a zip of ``nvflare cert request``; what else the zip says is not believed."""
    with zipfile.ZipFile(path) as packed:
        names = [name for name in packed.namelist() if name.endswith(".csr")]
        if len(names) != 1:
            raise FedImagingError(f"{path}: holds {len(names)} requests, not one")
        with packed.open(names[0]) as file:
            return file.read(_MAX_BYTES + 1)


def _subject(request: x509.CertificateSigningRequest, oid: x509.ObjectIdentifier) -> str | None:
    values = [attribute.value for attribute in request.subject.get_attributes_for_oid(oid)]
    return str(values[0]) if len(values) == 1 else None
