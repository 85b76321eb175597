"""Our FLARE builders: certificates with a validity of our choice, the site's package and policies, the signed manifest.

They work under ``python -m provisioning build`` and, unsigned and with FLARE's own certificate state, under FLARE's
``nvflare provision`` and ``nvflare poc prepare``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from nvflare.lighter.constants import ParticipantType, PropKey, ProvFileName
from nvflare.lighter.ctx import ProvisionContext
from nvflare.lighter.entity import Participant, Project
from nvflare.lighter.impl.cert import CertBuilder
from nvflare.lighter.spec import Builder
from nvflare.lighter.utils import Identity, generate_cert, serialize_cert

from fedimaging.datasets.site import SITE_FILE
from fedimaging.errors import FedImagingError
from fedimaging.federation import policy
from fedimaging.federation.protocol import START_MODELS_FILE
from fedimaging.federation.revocation import REVOCATION_LIST, ROOT_CERTIFICATE
from fedimaging.governance.grants import GRANTS_FILE
from provisioning import package
from provisioning.keys import CLOCK_SKEW, new_rsa_key, revocation_list
from provisioning.kit import (
    CODE_KEY,
    FORMAT,
    MANIFEST,
    RESOURCES,
    SIGNATURE,
    code_fingerprint,
    hash_file,
    resources_file,
    root_fingerprint,
)

_SITE_OWNED = (
    "resources.json",
    "authorization.json",
    "log_config.json",
    SITE_FILE,
    GRANTS_FILE,
    START_MODELS_FILE,
    "privacy.json",
    REVOCATION_LIST,
)
_REQUIRED = {"local/privacy.json", f"local/{REVOCATION_LIST}"}
_PARENT_RESOURCES = "fedimaging__p_resources.json"
_DELIVERED_STORAGE = "/var/lib/fedimaging"


class FederationProject(Project):
    """FLARE's project with what a build of ours brings: keys in memory, who has a kit already, and whose key it is.

    Args:
        existing: who has a kit.
        code_key: signs the kits.
        requested: public keys of participants who keep their private key to themselves.
        **named: of FLARE's project.
    """

    def __init__(
        self,
        *,
        existing: Iterable[str],
        code_key: ec.EllipticCurvePrivateKey,
        requested: Mapping[str, rsa.RSAPublicKey],
        **named: Any,
    ) -> None:
        super().__init__(**named)
        self.existing = frozenset(existing)
        self.code_key = code_key
        self.requested = requested


def _to_build(project: Project) -> list[Participant]:
    existing: frozenset[str] = getattr(project, "existing", frozenset())
    return [participant for participant in project.get_all_participants() if participant.name not in existing]


class CertificateBuilder(CertBuilder):
    """FLARE's certificates with key usages, 3072-bit keys and a validity of our choice.

    The keys of the root and of participants stay in memory when the project brings the root's; FLARE's plain
    commands bring none, and then FLARE's ``state/cert.json`` is kept as usual, owner-only.

    Args:
        root_valid_days: of a new root certificate.
        valid_days: of a participant's certificate; it never outlives the root's.
    """

    def __init__(self, root_valid_days: int = 3650, valid_days: int = 365) -> None:
        super().__init__(root_valid_days=root_valid_days)
        self.valid_days = valid_days
        self._in_memory = False

    def initialize(self, project: Project, ctx: ProvisionContext) -> None:
        self._in_memory = project.root_private_key is not None
        self._built = {participant.name for participant in _to_build(project)}
        self._requested: Mapping[str, rsa.RSAPublicKey] = getattr(project, "requested", {})
        super().initialize(project, ctx)

    def _build_write_cert_pair(self, participant: Participant, base_name: str, ctx: ProvisionContext) -> None:
        if participant.name not in self._built:
            return
        startup = Path(ctx.get_kit_dir(participant))
        if participant.name in self._requested:
            certificate = self.certificate(participant, self._requested[participant.name])
            (startup / f"{base_name}.crt").write_bytes(serialize_cert(certificate))
            (startup / ROOT_CERTIFICATE).write_bytes(self.serialized_cert)
        else:
            super()._build_write_cert_pair(participant, base_name, ctx)
        if participant.type == ParticipantType.SERVER:
            nobody = revocation_list(self.pri_key, self.root_cert, 0, ())
            (Path(ctx.get_local_dir(participant)) / REVOCATION_LIST).write_bytes(nobody)

    def get_pri_key_cert(self, participant: Participant) -> tuple[rsa.RSAPrivateKey, x509.Certificate]:
        key = new_rsa_key()
        return key, self.certificate(participant, key.public_key())

    def certificate(self, participant: Participant, key: rsa.RSAPublicKey) -> x509.Certificate:
        return sign_certificate(participant, key, self.root_cert, self.pri_key, self.valid_days)

    def finalize(self, project: Project, ctx: ProvisionContext) -> None:
        if not self._in_memory:
            state = Path(ctx.get_state_dir()) / "cert.json"
            state.touch(mode=0o600)
            super().finalize(project, ctx)


def sign_certificate(
    participant: Participant,
    key: rsa.RSAPublicKey,
    root: x509.Certificate,
    root_key: rsa.RSAPrivateKey,
    valid_days: int,
) -> x509.Certificate:
    """A participant's certificate for ``key``, valid for ``valid_days`` days but no longer than the root's."""
    server = participant.type == ParticipantType.SERVER
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if server else [])]
    now = datetime.now(UTC)
    if root.not_valid_after_utc <= now:
        raise FedImagingError(f"the root certificate expired on {root.not_valid_after_utc:%Y-%m-%d}")
    return generate_cert(
        subject=Identity(participant.subject, participant.org, participant.get_prop(PropKey.ROLE)),
        issuer=Identity(root.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value),
        signing_pri_key=root_key,
        subject_pub_key=key,
        server_default_host=participant.get_default_host() if server else None,
        server_additional_hosts=participant.get_prop(PropKey.HOST_NAMES) if server else None,
        not_valid_before=now - CLOCK_SKEW,
        not_valid_after=min(now + timedelta(days=valid_days), root.not_valid_after_utc),
        extra_extensions=[
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_key_usage(encipherment=participant.type != ParticipantType.ADMIN), True),
            (x509.ExtendedKeyUsage(usages), False),
        ],
    )


def _key_usage(encipherment: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=not encipherment,
        key_encipherment=encipherment,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


class SiteBuilder(Builder):
    """Puts the site package, the participant's own resources and the files that a site edits into the kits."""

    def build(self, project: Project, ctx: ProvisionContext) -> None:
        for participant in _to_build(project):
            if participant.type in (ParticipantType.CLIENT, ParticipantType.SERVER):
                self._build_site(participant, Path(ctx.get_ws_dir(participant)))

    def _build_site(self, participant: Participant, kit: Path) -> None:
        (kit / "local" / ProvFileName.PRIVACY_JSON_SAMPLE).unlink()
        files = package.contents()
        own = {"type": participant.type, "settings": settings(participant)}
        for name, content in {**files, RESOURCES: resources_file(package.manifest(files), own)}.items():
            (kit / name).parent.mkdir(parents=True, exist_ok=True)
            (kit / name).write_bytes(content)
        if participant.type == ParticipantType.CLIENT:
            policy.write_json(kit / "local" / "privacy.json", policy.privacy())
            for name in (SITE_FILE, GRANTS_FILE):
                shutil.copyfile(package.TEMPLATES / name, kit / "local" / name)
        else:
            parent = policy.server_parent_resources(own["settings"]["storage"])
            policy.write_json(kit / "startup" / _PARENT_RESOURCES, parent)


def settings(participant: Participant) -> dict[str, Any] | None:
    """What ``project.yml`` says of a participant's resources; None for people, who run nothing."""
    if participant.type == ParticipantType.SERVER:
        return {"storage": participant.get_prop("storage", _DELIVERED_STORAGE)}
    if participant.type == ParticipantType.CLIENT:
        capacity = participant.get_prop(PropKey.CAPACITY) or {}
        return {"gpus": capacity.get(PropKey.NUM_GPUS, 0), "gpu_memory": capacity.get(PropKey.GPU_MEM, 0)}
    return None


class ManifestBuilder(Builder):
    """Lists every file of a kit with its SHA-256 and signs the list. It finishes after all builders that follow it."""

    def finalize(self, project: Project, ctx: ProvisionContext) -> None:
        code_key = getattr(project, "code_key", None)
        if code_key is None:
            ctx.warning("these kits are not signed; kits for hospitals come from `python -m provisioning build`")
            return
        for participant in _to_build(project):
            sign_kit(Path(ctx.get_ws_dir(participant)), participant, project.name, code_key)


def sign_kit(kit: Path, participant: Participant, federation: str, code_key: ec.EllipticCurvePrivateKey) -> None:
    """Signs a kit's package, and in a manifest of its own all else that stays as it is."""
    base = "server" if participant.type == ParticipantType.SERVER else "client"
    key, certificate = f"startup/{base}.key", f"startup/{base}.crt"
    names = {path.relative_to(kit).as_posix() for path in kit.rglob("*") if path.is_file()}
    if own := settings(participant):
        packaged = package.contents()
        for name, content in package.signature_files(package.manifest(packaged), code_key).items():
            (kit / name).write_bytes(content)
        names -= {*packaged, RESOURCES}
    site = {f"local/{name}" for name in _SITE_OWNED}
    manifest = {
        "format": FORMAT,
        "kind": "kit",
        "project": federation,
        "participant": participant.name,
        "type": participant.type,
        "org": participant.org,
        "role": participant.get_prop(PropKey.ROLE),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": own,
        "root": root_fingerprint(x509.load_pem_x509_certificate((kit / "startup" / "rootCA.pem").read_bytes())),
        "code": code_fingerprint(code_key.public_key()),
        "key": key,
        "certificate": certificate,
        "files": {name: hash_file(kit / name) for name in sorted(names - site - {key, certificate})},
        "site_files": {
            name: {
                "sha256": hash_file(kit / name) if name in names else None,
                "required": name in _REQUIRED and name in names,
            }
            for name in sorted(site)
        },
    }
    raw = json.dumps(manifest, indent=1).encode() + b"\n"
    (kit / MANIFEST).write_bytes(raw)
    (kit / SIGNATURE).write_bytes(code_key.sign(raw, ec.ECDSA(hashes.SHA256())))
    (kit / CODE_KEY).write_bytes(package.public_pem(code_key))
