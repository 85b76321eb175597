"""A hospital makes its own private key: the kit is built around its request, and the key never travels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from fedimaging.errors import FedImagingError
from provisioning import kit as kit_file
from provisioning.cli import main
from provisioning.federation import Federation, build
from provisioning.handover import hand_over
from provisioning.kit import KitError, code_fingerprint, make_request, open_archive, place_key, verify
from provisioning.project import ProjectFile
from provisioning.requests import read_requests
from tests.provisioning.conftest import PASSPHRASE, pins, project_text, tree

NEW = {
    "hospital-a": {"type": "client", "org": "hospital_a"},
    "lead@example.org": {"type": "admin", "org": "consortium", "role": "lead"},
}


@pytest.fixture(scope="module")
def requested(tmp_path_factory):
    """A federation whose hospital-a and lead asked for their certificates, and its two kits as they arrive."""
    folder = tmp_path_factory.mktemp("requested")
    at_hospital, sent = folder / "at_hospital", folder / "sent"
    sent.mkdir()
    for name, org, role in (("hospital-a", "hospital_a", "client"), ("lead@example.org", "consortium", "lead")):
        _, request, _ = make_request(name, org, role, at_hospital)
        request.rename(sent / request.name)
    (folder / "project.yml").write_text(project_text())
    federation = Federation(folder / "federation")
    build(ProjectFile(folder / "project.yml"), federation, lambda: PASSPHRASE, [sent])
    kits = folder / "kits"
    for name in NEW:
        made, passphrase = hand_over(federation, name)
        place_key(open_archive(made / f"{name}.kit", passphrase, kits), at_hospital / f"{name}.key")
    return type("Requested", (), {
        "folder": folder, "keys": at_hospital, "sent": sent, "federation": federation, "kits": kits,
    })  # fmt: skip


def test_the_kit_with_a_hospital_s_own_key_is_as_good(requested):
    for name in NEW:
        assert verify(requested.kits / name, pins(requested, name)).findings == []
        key = requested.kits / name / "startup/client.key"
        assert key.read_bytes() == (requested.keys / f"{name}.key").read_bytes()
        assert key.stat().st_mode & 0o077 == 0


def test_both_ways_give_the_same_kit_but_for_the_key(requested, handed_over):
    """Certificates and ports apart, which differ between any two federations."""
    ours, theirs = tree(requested.kits / "hospital-a"), tree(handed_over.kits / "hospital-a")
    assert ours.keys() == theirs.keys()
    differ = {name for name in ours if ours[name] != theirs[name]}
    assert differ <= {
        "startup/client.crt", "startup/client.key", "startup/rootCA.pem",
        "kit_manifest.json", "kit_manifest.sig", "package_manifest.sig", "code_signing.pem",
    }  # fmt: skip


def test_the_private_key_was_never_at_the_admin_s(requested):
    secret = (requested.keys / "hospital-a.key").read_bytes()
    for path in (requested.federation.folder).rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes()
    entry = requested.federation.participants["hospital-a"]
    key = serialization.load_pem_private_key(secret, None)
    assert entry["own_key"] == code_fingerprint(key.public_key())
    assert "--key hospital-a.key" in (requested.federation.folder / "handover/hospital-a/sheet.txt").read_text()
    assert "own_key" not in requested.federation.participants["hospital-b"]


def test_a_kit_without_its_key_or_with_another_s_is_told(requested, tmp_path):
    made = requested.federation.folder / "handover/hospital-a/hospital-a.kit"
    passphrase_file = tmp_path / "passphrase"
    folder, passphrase = again(requested, "hospital-b")
    passphrase_file.write_text(passphrase)
    passphrase_file.chmod(0o600)
    assert made.is_file()
    arguments = [
        "open",
        str(folder / "hospital-b.kit"),
        "--to",
        str(tmp_path),
        "--passphrase-file",
        str(passphrase_file),
    ]
    assert kit_file.main([*arguments, "--key", str(requested.keys / "hospital-a.key")]) == 2
    assert not (tmp_path / "hospital-b").exists()
    kit = tmp_path / "hospital-a"
    kit.mkdir()
    with pytest.raises(KitError, match="no certificate"):
        place_key(kit, requested.keys / "hospital-a.key")


def again(requested, name):
    return hand_over(requested.federation, name)


def test_request_command_at_the_hospital(tmp_path):
    """kit.py alone, in a Python that knows nothing of this project."""
    done = subprocess.run(
        [sys.executable, "-I", kit_file.__file__, "request", "hospital-a", "--org", "hospital_a"],
        cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    key, request = tmp_path / "hospital-a.key", tmp_path / "hospital-a.csr"
    assert key.stat().st_mode & 0o777 == 0o600
    public = read_requests([request], NEW)["hospital-a"]
    assert public.key_size == 3072
    assert kit_file.spoken(code_fingerprint(public)) in done.stdout
    before = tree(tmp_path)
    assert kit_file.main(["request", "hospital-a", "--org", "hospital_a", "--to", str(tmp_path)]) == 2
    assert tree(tmp_path) == before


def test_requests_of_flare_s_own_command_are_taken(tmp_path):
    definition = "name: fedimaging\nparticipants:\n  - {name: hospital-a, type: client, org: hospital_a}\n"
    (tmp_path / "participant.yml").write_text(definition)
    subprocess.run(
        [sys.executable, "-m", "nvflare.cli", "cert", "request", "-p", "participant.yml"],
        cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    packed, plain = tmp_path / "hospital-a/hospital-a.request.zip", tmp_path / "hospital-a/hospital-a.csr"
    assert read_requests([packed], NEW) == read_requests([plain], NEW)


def signed(path: Path, key=None, cn="hospital-a", org="hospital_a", role="client"):
    key = key or rsa.generate_private_key(public_exponent=65537, key_size=2048)
    parts = ((NameOID.COMMON_NAME, cn), (NameOID.ORGANIZATION_NAME, org), (NameOID.UNSTRUCTURED_NAME, role))
    subject = x509.Name([x509.NameAttribute(oid, value) for oid, value in parts if value])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    path.write_bytes(request.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"cn": "hospital-x"}, "'hospital-x', who is not a new participant"),
        ({"cn": None}, "asks for None"),
        ({"org": "hospital_b"}, "organisation 'hospital_b'; project.yml says 'hospital_a'"),
        ({"org": None}, "organisation None"),
        ({"role": "project_admin"}, "is for a project_admin; project.yml says client"),
        ({"cn": "lead@example.org", "org": "consortium", "role": "project_admin"}, "project.yml says lead"),
        ({"role": None}, "participant without a role"),
        ({"key": rsa.generate_private_key(public_exponent=65537, key_size=1024)}, "too weak"),
        ({"key": rsa.generate_private_key(public_exponent=3, key_size=2048)}, "too weak"),
        ({"key": ec.generate_private_key(ec.SECP256R1())}, "must be RSA"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(tmp_path, wrong, says):
    path = signed(tmp_path / "a.csr", **wrong)
    with pytest.raises(FedImagingError, match=says) as refusal:
        read_requests([path], NEW)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_request_with_another_s_signature_or_damaged_is_refused(tmp_path):
    path = signed(tmp_path / "a.csr")
    der = bytearray(x509.load_pem_x509_csr(path.read_bytes()).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    changed = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    path.write_bytes(changed)
    with pytest.raises(FedImagingError, match="signature does not fit"):
        read_requests([path], NEW)
    for content in (b"", b"\0" * 100, b"x" * 2**17, b"PK\x03\x04 no zip"):
        path.write_bytes(content)
        with pytest.raises(FedImagingError, match=r"no certificate request|too large"):
            read_requests([path], NEW)
    with pytest.raises(FedImagingError, match="can't read the request"):
        read_requests([tmp_path / "missing.csr"], NEW)


def test_two_requests_of_one_participant_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(FedImagingError, match="holds no request"):
        read_requests([tmp_path], NEW)
    signed(tmp_path / "a.csr")
    signed(tmp_path / "b.csr")
    with pytest.raises(FedImagingError, match="a second request of hospital-a"):
        read_requests([tmp_path], NEW)


def test_build_with_a_wrong_request_builds_nothing(tmp_path, capsys):
    project, secret = tmp_path / "project.yml", tmp_path / "secret"
    project.write_text(project_text())
    secret.write_text(PASSPHRASE)
    secret.chmod(0o600)
    request = signed(tmp_path / "a.csr", org="hospital_b")
    arguments = ["build", "--project", str(project), "--folder", str(tmp_path / "f"), "--passphrase-file", str(secret)]
    assert main([*arguments, "--request", str(request)]) == 2
    assert "organisation 'hospital_b'" in capsys.readouterr().err
    assert not (tmp_path / "f/keys.sealed").exists()
