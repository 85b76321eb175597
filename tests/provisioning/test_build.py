"""Building: what is in a kit, what is kept, and that building again touches nothing."""

import json
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedimaging import __version__
from fedimaging.errors import FedImagingError
from fedimaging.federation.policy import ALLOWED_CLASSES
from fedimaging.federation.revocation import Revocations
from fedimaging.version import package_hash, package_sources
from provisioning import package as site_package
from provisioning.cli import main
from provisioning.federation import Federation, build
from provisioning.kit import KitError, verify
from provisioning.project import ProjectFile
from tests.provisioning.conftest import (
    FOURTH,
    PASSPHRASE,
    make_federation,
    pins,
    project_text,
    tree,
    with_participants,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_federation(tmp_path_factory.mktemp("made"), project_text())


def certificate(made, name, file="client"):
    return x509.load_pem_x509_certificate((made.folder / "kits" / name / "startup" / f"{file}.crt").read_bytes())


def test_every_participant_has_a_kit_that_verifies(made):
    assert len(made.built) == 9
    for name in made.built:
        report = verify(made.folder / "kits" / name, pins(made, name))
        assert report.findings == []
        assert report.site_changes == []


def test_a_site_s_kit_holds_the_package_as_sources_only(made):
    for name in ("hospital-a", "localhost"):
        custom = made.folder / "kits" / name / "local/custom"
        assert [path.name for path in custom.iterdir()] == ["fedimaging"]
        files = {
            path.relative_to(custom / "fedimaging").as_posix(): path for path in custom.rglob("*") if path.is_file()
        }
        assert files.keys() == package_sources().keys()
        assert all(path.read_bytes() == site_package.PACKAGE.joinpath(key).read_bytes() for key, path in files.items())
        assert not [key for key in files if "__pycache__" in key or key.endswith(".pyc")]
    assert not (made.folder / "kits/lead@example.org/local/custom").exists()


def test_the_manifest_says_version_and_hash_of_the_package(made):
    kit = made.folder / "kits/hospital-a"
    package = json.loads((kit / "package_manifest.json").read_text())
    assert package["version"] == __version__
    lines = subprocess.run(
        "find . -type f | sed 's#^./##' | LC_ALL=C sort | xargs sha256sum | sha256sum",
        shell=True, cwd=kit / "local/custom/fedimaging", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert package["sha256"] == lines.stdout.split()[0] == package_hash()


def test_something_that_is_no_source_stops_the_build(tmp_path):
    package = tmp_path / "fedimaging"
    package.mkdir()
    (package / "a.py").write_text("")
    assert list(package_sources(package)) == ["a.py"]
    (package / "scan.dcm").write_bytes(b"")
    with pytest.raises(FedImagingError, match=r"scan\.dcm: no source file"):
        package_sources(package)
    (package / "scan.dcm").unlink()
    (package / "b.py").symlink_to("/etc/passwd")
    with pytest.raises(FedImagingError, match=r"b\.py"):
        package_sources(package)


def test_openssl_and_jq_agree_on_a_kit(made):
    kit = made.folder / "kits/hospital-a"

    def said(command):
        done = subprocess.run(command, shell=True, cwd=kit, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    guide = (kit / "GUIDE.md").read_text()
    commands = [line.strip() for line in guide.splitlines() if line.startswith(("    openssl", "    jq"))]
    assert len(commands) == 7
    root, code, *signatures, files, packaged, chain = map(said, commands)
    assert root.strip().split("=")[1].replace(":", "").lower() == made.federation.record["root"]
    assert code.split()[0] == made.federation.record["code"]
    assert [signature.strip() for signature in signatures] == ["Verified OK"] * 2
    assert files == packaged == ""
    assert chain.strip() == "startup/client.crt: OK"


def test_certificates_have_names_usages_and_dates(made):
    now = datetime.now(UTC)
    root = x509.load_pem_x509_certificate((made.folder / "kits/hospital-a/startup/rootCA.pem").read_bytes())
    assert abs(root.not_valid_after_utc - now - timedelta(days=3650)) < timedelta(hours=2)
    for name, file, role in (
        ("hospital-a", "client", None),
        ("lead@example.org", "client", "lead"),
        ("localhost", "server", None),
    ):
        own = certificate(made, name, file)
        own.verify_directly_issued_by(root)
        assert own.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == name
        assert [attribute.value for attribute in own.subject.get_attributes_for_oid(NameOID.UNSTRUCTURED_NAME)] == (
            [role] if role else []
        )
        assert abs(own.not_valid_after_utc - now - timedelta(days=365)) < timedelta(hours=2)
        assert own.not_valid_before_utc < now
        usages = own.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert (ExtendedKeyUsageOID.SERVER_AUTH in usages) == (file == "server")
        assert not own.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_certificate_never_outlives_the_root(tmp_path):
    text = project_text().replace("root_valid_days: 3650", "root_valid_days: 30")
    made = make_federation(tmp_path, text)
    root = x509.load_pem_x509_certificate((made.folder / "kits/hospital-a/startup/rootCA.pem").read_bytes())
    assert certificate(made, "hospital-a").not_valid_after_utc == root.not_valid_after_utc


def test_building_again_changes_nothing_and_a_fourth_hospital_touches_no_one(tmp_path):
    made = make_federation(tmp_path, project_text())
    before = tree(made.folder)

    def forbidden():
        pytest.fail("nothing to build needs no passphrase")

    assert build(ProjectFile(made.path), Federation(made.folder), forbidden) == []
    assert tree(made.folder) == before
    made.path.write_text(with_participants(made.path.read_text(), FOURTH))
    federation = Federation(made.folder)
    assert build(ProjectFile(made.path), federation, lambda: PASSPHRASE) == [
        "hospital-d",
        "admin@hospital-d.example.org",
    ]
    after = tree(made.folder)
    record = after.pop("federation.json")
    assert record != before.pop("federation.json")
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[1] for name in after.keys() - before.keys()} == {
        "hospital-d",
        "admin@hospital-d.example.org",
    }
    assert verify(federation.kit("hospital-d"), pins(made, "hospital-d")).findings == []


def test_private_keys_are_on_disk_in_the_kits_only_and_all_else_is_encrypted(made):
    for path in made.folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or "kits" in path.parts
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((made.folder / "kits").stat().st_mode) == 0o700
    holders = [
        path.relative_to(made.folder).as_posix()
        for path in made.folder.rglob("*")
        if path.is_file() and b"PRIVATE KEY-----\n" in path.read_bytes()
    ]
    assert sorted(holders) == sorted(
        f"kits/{name}/startup/{'server' if name == 'localhost' else 'client'}.key" for name in made.built
    )
    assert not list(made.folder.rglob("cert.json"))
    assert not list(made.folder.glob(".building-*"))


def test_a_wrong_passphrase_builds_nothing(tmp_path):
    made = make_federation(tmp_path, project_text())
    before = tree(made.folder)
    made.path.write_text(with_participants(made.path.read_text(), FOURTH))
    with pytest.raises(KitError, match="wrong passphrase"):
        build(ProjectFile(made.path), Federation(made.folder), lambda: "another passphrase")
    assert tree(made.folder) == before


def test_lost_keys_are_not_silently_made_anew(tmp_path):
    made = make_federation(tmp_path, project_text())
    (made.folder / "keys.sealed").unlink()
    made.path.write_text(with_participants(made.path.read_text(), FOURTH))
    with pytest.raises(FedImagingError, match=r"keys\.sealed is missing"):
        build(ProjectFile(made.path), Federation(made.folder), lambda: PASSPHRASE)


def test_a_wrong_project_builds_nothing_and_names_the_line(tmp_path):
    with pytest.raises(FedImagingError, match=r"project\.yml:\d+: unknown role"):
        make_federation(tmp_path, project_text().replace("role: lead", "role: leader"))
    assert not (tmp_path / "federation/kits").exists()
    assert not (tmp_path / "federation/keys.sealed").exists()


def test_a_failing_builder_leaves_nothing_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(site_package, "TEMPLATES", tmp_path / "no-templates")
    with pytest.raises(FedImagingError, match=r"provisioning failed.*no-templates"):
        make_federation(tmp_path, project_text())
    assert [path.name for path in (tmp_path / "federation").iterdir() if path.name[0] != "."] == ["keys.sealed"]
    monkeypatch.undo()
    assert len(make_federation(tmp_path, project_text()).built) == 9


def test_the_policies_of_a_kit(made):
    local = made.folder / "kits/hospital-a/local"
    resources = json.loads((local / "resources.json.default").read_text())
    assert resources["class_allow_list"] == list(ALLOWED_CLASSES)
    assert resources["class_list_enforcement_mode"] == "enforce"
    assert resources["allow_log_streaming"] is False
    permissions = json.loads((local / "authorization.json.default").read_text())["permissions"]
    assert set(permissions) == {"project_admin", "org_admin", "lead", "member"}
    assert all(rights["byoc"] == "none" for rights in permissions.values())
    assert [role for role, rights in permissions.items() if rights["submit_job"] != "none"] == ["lead"]
    privacy = json.loads((local / "privacy.json").read_text())
    assert privacy["default_scope"] in [scope["name"] for scope in privacy["scopes"]]
    assert not list(local.glob("*.sample"))
    server = json.loads((made.folder / "kits/localhost/local/resources.json.default").read_text())
    assert server["class_allow_list"] == list(ALLOWED_CLASSES)
    assert "/tmp" not in json.dumps(server)


def test_the_commands_with_the_passphrase_in_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("PROVISIONING_PASSPHRASE", raising=False)
    project, secret, folder = tmp_path / "project.yml", tmp_path / "secret", tmp_path / "federation"
    project.write_text(project_text())
    secret.write_text(PASSPHRASE + "\n")
    arguments = ["build", "--project", str(project), "--folder", str(folder), "--passphrase-file", str(secret)]
    secret.chmod(0o644)
    assert main(arguments) == 2
    assert "others may read" in capsys.readouterr().err
    secret.chmod(0o600)
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert PASSPHRASE not in said.out + said.err
    assert main(arguments) == 0
    assert "nothing to build" in capsys.readouterr().err
    secret.write_text("short")
    assert main([*arguments, "--folder", str(tmp_path / "other")]) == 2
    assert "12 characters" in capsys.readouterr().err


def test_without_a_terminal_the_passphrase_is_not_waited_for(tmp_path):
    project = tmp_path / "project.yml"
    project.write_text(project_text())
    environment = {name: value for name, value in os.environ.items() if name != "PROVISIONING_PASSPHRASE"}
    done = subprocess.run(
        [sys.executable, "-m", "provisioning", "build", "--project", project, "--folder", tmp_path / "f"],
        cwd=Path(__file__).parents[2], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no terminal to ask" in done.stderr
    assert "Traceback" not in done.stderr


def test_flare_s_own_command_makes_unsigned_kits_of_the_same_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nvflare.cli", "provision", "-p", "provisioning/project.yml", "-w", str(tmp_path / "w")],
        cwd=Path(__file__).parents[2], env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not signed" in done.stdout + done.stderr
    kit = next((tmp_path / "w").rglob("prod_00/hospital-a"))
    server = kit.parent / "fl.example.org"
    root = x509.load_pem_x509_certificate((server / "startup/rootCA.pem").read_bytes())
    assert Revocations.read(server / "local/revoked.crl", root) == Revocations(0)
    assert (kit / "local/custom/fedimaging/cli.py").is_file()
    report = verify(kit, pins_of_nobody())
    assert any(finding.where == "kit_manifest.json" and finding.kind == "missing" for finding in report.findings)
    state = next((tmp_path / "w").rglob("cert.json"))
    assert stat.S_IMODE(state.stat().st_mode) == 0o600


def pins_of_nobody():
    from provisioning.kit import Pins

    return Pins("hospital-a", "0" * 64, "0" * 64)
