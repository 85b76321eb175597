"""The site package: code, lock files and policies of one version, signed; in every kit, and issued anew to update."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from nvflare.lighter.constants import ParticipantType, ProvFileName

import fedimaging
from fedimaging.errors import FedImagingError
from fedimaging.federation import policy
from fedimaging.version import PACKAGE, package_sources, tree_hash
from provisioning.kit import (
    CODE_KEY,
    FORMAT,
    PACKAGE_MANIFEST,
    PACKAGE_SIGNATURE,
    hash_bytes,
    pack_files,
    write_private,
)
from provisioning.lock import BUILD_LOCK, LOCKS, sbom

TEMPLATES = Path(__file__).with_name("templates")
GUIDE, UNIT = "GUIDE.md", "fedimaging.service"
NAME = PACKAGE.name


def contents() -> dict[str, bytes]:
    """The files of a package by their place in a kit."""
    files = {f"local/custom/{NAME}/{name}": path.read_bytes() for name, path in package_sources(PACKAGE).items()}
    for lock in LOCKS:
        files[f"local/{lock.path.name}"] = lock.path.read_bytes()
        files[f"local/{lock.sbom_path.name}"] = sbom(lock)
    files[f"local/{BUILD_LOCK.name}"] = BUILD_LOCK.read_bytes()
    defaults = {
        ProvFileName.AUTHORIZATION_JSON_DEFAULT: policy.authorization(),
        ProvFileName.LOG_CONFIG_DEFAULT: policy.log_config(),
        "privacy.json.default": policy.privacy(),
    }
    files |= {f"local/{name}": policy.to_json(content) for name, content in defaults.items()}
    return files | {name: (TEMPLATES / name).read_bytes() for name in (GUIDE, UNIT)}


def manifest(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What is signed: every file with its SHA-256, and the resources, which differ by participant, as templates."""
    signed = {name: hash_bytes(files[name]) for name in sorted(files)}
    code = f"local/custom/{NAME}/"
    return {
        "format": FORMAT,
        "kind": "package",
        "name": NAME,
        "version": fedimaging.__version__,
        "sha256": tree_hash({name.removeprefix(code): signed[name] for name in signed if name.startswith(code)}),
        "files": signed,
        "resources": {
            ParticipantType.CLIENT: policy.client_resources("<gpus>", "<gpu_memory>"),
            ParticipantType.SERVER: policy.server_resources("<storage>"),
        },
    }


def signature_files(manifest: Mapping[str, Any], code_key: ec.EllipticCurvePrivateKey) -> dict[str, bytes]:
    """A package's manifest, its signature (ECDSA P-256 over SHA-256) and the code-signing key's public half."""
    raw = json.dumps(manifest, indent=1).encode() + b"\n"
    return {
        PACKAGE_MANIFEST: raw,
        PACKAGE_SIGNATURE: code_key.sign(raw, ec.ECDSA(hashes.SHA256())),
        CODE_KEY: public_pem(code_key),
    }


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def write_package(path: Path, code_key: ec.EllipticCurvePrivateKey) -> None:
    """Writes the package that sites install into their kits with ``kit.py install``."""
    if path.exists():
        raise FedImagingError(f"{path}: is there already; a package is not written over another")
    if not path.parent.is_dir():
        raise FedImagingError(f"{path.parent}: no such folder")
    files = contents()
    write_private(path, pack_files(files | signature_files(manifest(files), code_key)))
    path.chmod(0o644)
