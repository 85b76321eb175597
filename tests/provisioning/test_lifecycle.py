"""Renewed certificates, removed participants, and how everybody stands."""

import json
import shutil
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from nvflare.lighter.entity import participant_from_dict
from nvflare.lighter.utils import serialize_cert

from fedimaging.errors import FedImagingError
from fedimaging.federation.revocation import Revocations
from provisioning import kit as kit_file
from provisioning.builders import sign_certificate
from provisioning.cli import main
from provisioning.federation import Federation, build
from provisioning.handover import hand_over
from provisioning.keys import Keys
from provisioning.kit import KitError, install_certificate, make_request, open_archive, verify
from provisioning.lifecycle import remove, renew, standings
from provisioning.project import ProjectFile, check
from tests.provisioning.conftest import PASSPHRASE, make_federation, pins, project_text, tree


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A federation whose hospital-a was handed its kit; the tests below work on copies."""
    made = make_federation(tmp_path_factory.mktemp("built"), project_text())
    made.kits = tmp_path_factory.mktemp("kits")
    folder, passphrase = hand_over(made.federation, "hospital-a")
    open_archive(folder / "hospital-a.kit", passphrase, made.kits)
    return made


@pytest.fixture
def made(built, tmp_path):
    """A copy of the federation, and of the site that hospital-a runs."""
    folder = shutil.copytree(built.folder, tmp_path / "federation")
    federation = Federation(folder)
    site = shutil.copytree(built.kits / "hospital-a", tmp_path / "hospital-a")
    (site / "local/datasets.yml").write_text("chest_xray: {path: /srv/xray}\n")
    (site / "audit.log").write_text("state of the site\n")
    return type("Made", (), {"path": built.path, "federation": federation, "folder": folder, "site": site})


def certificate(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def days_left(path):
    return (certificate(path).not_valid_after_utc - datetime.now(UTC)).days


def test_a_renewed_certificate_has_the_same_key_and_name_and_touches_no_one_else(made):
    before, old = tree(made.folder), certificate(made.site / "startup/client.crt")
    sent = renew(made.federation, "hospital-a", PASSPHRASE, 90)
    new, after = certificate(sent), tree(made.folder)
    assert new.public_key() == old.public_key()
    assert new.subject == old.subject
    assert new.serial_number != old.serial_number
    assert days_left(sent) == 89
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"federation.json", "renewed/hospital-a.crt", "kits/hospital-a/startup/client.crt"}
    assert before.keys() <= after.keys()
    root = certificate(made.site / "startup/rootCA.pem")
    new.verify_directly_issued_by(root)


def test_a_site_installs_it_and_keeps_all_else(made):
    before = tree(made.site)
    sent = renew(made.federation, "hospital-a", PASSPHRASE, 90)
    install_certificate(made.site, sent, pins(made, "hospital-a"))
    report = verify(made.site, pins(made, "hospital-a"))
    assert report.findings == []
    assert report.days_left == 89
    after = tree(made.site)
    assert {name for name in after if after[name] != before[name]} == {"startup/client.crt"}
    assert after["startup/client.crt"].split()[0] == before["startup/client.crt"].split()[0]


def test_a_new_key_comes_with_a_request_and_its_old_certificate_is_revoked(made, tmp_path):
    key, request, _ = make_request("hospital-a", "hospital_a", "client", tmp_path)
    old = certificate(made.site / "startup/client.crt").serial_number
    sent = renew(made.federation, "hospital-a", PASSPHRASE, 90, request=request, revoke=True)
    with pytest.raises(KitError, match="does not belong to the certificate"):
        install_certificate(made.site, sent, pins(made, "hospital-a"))
    assert verify(made.site, pins(made, "hospital-a")).findings == []
    install_certificate(made.site, sent, pins(made, "hospital-a"), key)
    assert verify(made.site, pins(made, "hospital-a")).findings == []
    listed = Revocations.read(made.folder / "revoked.crl", certificate(made.site / "startup/rootCA.pem"))
    assert listed == Revocations(1, frozenset(), {old: "hospital-a"})
    with pytest.raises(FedImagingError, match="needs a new key"):
        renew(made.federation, "hospital-a", PASSPHRASE, 90, revoke=True)


def test_a_stolen_key_is_revoked_with_every_certificate_that_it_has(made, tmp_path):
    serials = [certificate(made.site / "startup/client.crt").serial_number]
    for _ in range(2):
        serials.append(certificate(renew(made.federation, "hospital-a", PASSPHRASE, 90)).serial_number)
    _, request, _ = make_request("hospital-a", "hospital_a", "client", tmp_path)
    new = certificate(renew(made.federation, "hospital-a", PASSPHRASE, 90, request=request, revoke=True))
    listed = Revocations.read(made.folder / "revoked.crl", certificate(made.site / "startup/rootCA.pem"))
    assert listed == Revocations(1, frozenset(), dict.fromkeys(serials, "hospital-a"))
    assert new.serial_number not in listed.serials


def test_what_is_not_the_site_s_renewed_certificate_is_not_installed(made, tmp_path):
    ours = pins(made, "hospital-a")
    sent = renew(made.federation, "hospital-a", PASSPHRASE, 90)
    renew(made.federation, "hospital-b", PASSPHRASE, 90)
    wrong, forged = tmp_path / "wrong.crt", tmp_path / "forged.crt"
    stranger = Keys.make("fedimaging", 3650)
    hospital = participant_from_dict({"name": "hospital-a", "type": "client", "org": "hospital_a"})
    key = certificate(sent).public_key()
    forged.write_bytes(serialize_cert(sign_certificate(hospital, key, stranger.root, stranger.root_key, 90)))
    before = tree(made.site)
    for source, says in (
        (made.federation.kit("hospital-b") / "startup/client.crt", "the certificate is 'hospital-b''s, not"),
        (forged, "not issued by the kit's root"),
        (made.site / "GUIDE.md", "no certificate"),
    ):
        shutil.copy(source, wrong)
        with pytest.raises(KitError, match=says):
            install_certificate(made.site, wrong, ours)
    wrong.write_bytes(sent.read_bytes() * 2)
    with pytest.raises(KitError, match="more than one certificate"):
        install_certificate(made.site, wrong, ours)
    shutil.copy(made.site / "startup/client.crt", wrong)
    assert tree(made.site) == before
    install_certificate(made.site, sent, ours)
    with pytest.raises(KitError, match="older than the certificate in place"):
        install_certificate(made.site, wrong, ours)


def test_an_expired_certificate_is_renewed_in_place(made, monkeypatch, capsys):
    """The kit does not verify any more; its renewal goes in all the same."""
    sent = renew(made.federation, "hospital-a", PASSPHRASE, 365 * 2)
    expired = datetime.now(UTC) + timedelta(days=366)
    ours = pins(made, "hospital-a")
    assert {finding.kind for finding in verify(made.site, ours, expired).findings} == {"certificate"}
    pin = made.site.parent / "pins.json"
    ours.write(pin)
    assert kit_file.main(["install-certificate", str(made.site), str(sent), "--pins", str(pin)]) == 0
    assert "restart to use it" in capsys.readouterr().out
    assert verify(made.site, ours, expired).findings == []


def test_a_renewal_before_the_handover_stays_in_the_kit(made):
    assert renew(made.federation, "hospital-b", PASSPHRASE, 30) is None
    kit = made.federation.kit("hospital-b")
    assert verify(kit, pins(made, "hospital-b")).findings == []
    assert days_left(kit / "startup/client.crt") == 29
    with pytest.raises(FedImagingError, match="1 day or more"):
        renew(made.federation, "hospital-b", PASSPHRASE, 0)


def test_the_server_s_and_a_person_s_certificates_keep_their_usages(made):
    for name, file in (("localhost", "server"), ("lead@example.org", "client")):
        path = made.federation.kit(name) / f"startup/{file}.crt"
        old = certificate(path)
        renew(made.federation, name, PASSPHRASE, 30)
        new = certificate(path)
        skipped = {x509.SubjectKeyIdentifier.oid}
        usages = [
            {extension.oid: extension.value for extension in one.extensions if extension.oid not in skipped}
            for one in (old, new)
        ]
        assert usages[0] == usages[1]
        assert new.subject == old.subject


def test_a_removed_participant_is_on_the_list_with_all_its_certificates(made):
    root = certificate(made.site / "startup/rootCA.pem")
    serials = {certificate(made.site / "startup/client.crt").serial_number}
    serials.add(certificate(renew(made.federation, "hospital-a", PASSPHRASE, 90)).serial_number)
    path = remove(made.federation, "hospital-a", PASSPHRASE)
    listed = Revocations.read(path, root)
    assert listed.names == {"hospital-a"}
    assert listed.serials == dict.fromkeys(serials, "hospital-a")
    remove(made.federation, "lead@example.org", PASSPHRASE)
    again = Revocations.read(path, root)
    assert (listed.number, again.number) == (1, 2)
    assert again.names == {"hospital-a", "lead@example.org"}
    assert not made.federation.kit("hospital-a").exists()
    assert not (made.folder / "handover/hospital-a").exists()
    in_kit = made.federation.kit("localhost") / "local/revoked.crl"
    assert in_kit.read_bytes() == path.read_bytes()
    assert verify(made.federation.kit("localhost"), pins(made, "localhost")).findings == []


def test_openssl_reads_the_list(made):
    path = remove(made.federation, "hospital-b", PASSPHRASE)
    done = subprocess.run(
        ["openssl", "crl", "-in", path, "-noout", "-text", "-CAfile", made.site / "startup/rootCA.pem"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "verify OK" in done.stderr
    assert "hospital-b" in done.stdout
    assert "Cessation Of Operation" in done.stdout


def test_a_removed_name_does_not_come_back(made):
    remove(made.federation, "hospital-b", PASSPHRASE)
    for command in (
        lambda: remove(made.federation, "hospital-b", PASSPHRASE),
        lambda: renew(made.federation, "hospital-b", PASSPHRASE, 90),
        lambda: hand_over(made.federation, "hospital-b"),
    ):
        with pytest.raises(FedImagingError, match="was removed on"):
            command()
    with pytest.raises(FedImagingError, match=r"project\.yml:\d+: hospital-b was removed on"):
        build(ProjectFile(made.path), Federation(made.folder), lambda: PASSPHRASE)
    text = made.path.read_text()
    without = made.site.parent / "project.yml"
    without.write_text(text.replace("  - name: hospital-b\n    type: client\n    org: hospital_b\n", ""))
    problems = check(ProjectFile(without), made.federation.participants, resolve=False)
    assert [problem for problem in problems if not problem.warning] == []


def test_the_server_is_not_removed_and_a_wrong_passphrase_removes_nobody(made):
    before = tree(made.folder)
    with pytest.raises(FedImagingError, match="is the server"):
        remove(made.federation, "localhost", PASSPHRASE)
    with pytest.raises(KitError, match="wrong passphrase"):
        remove(made.federation, "hospital-a", "another passphrase")
    with pytest.raises(KitError, match="wrong passphrase"):
        renew(made.federation, "hospital-a", "another passphrase", 90)
    assert tree(made.folder) == before


def test_a_server_without_its_list_does_not_verify(made):
    kit = made.federation.kit("localhost")
    (kit / "local/revoked.crl").unlink()
    findings = verify(kit, pins(made, "localhost")).findings
    assert [str(finding).split() for finding in findings] == [["missing", "local/revoked.crl"]]


def test_how_everybody_stands(made):
    renew(made.federation, "hospital-b", PASSPHRASE, 59)
    remove(made.federation, "hospital-c", PASSPHRASE)
    found = {one.name: one for one in standings(made.federation)}
    assert [name for name, one in found.items() if one.warns] == ["hospital-b"]
    assert list(found)[-1] == "hospital-c"
    assert found["hospital-c"].removed
    assert found["hospital-a"].kit.startswith("handed over")
    assert found["hospital-a"].key == "participant"
    assert found["hospital-b"].key == "here, until handover"
    package = json.loads((made.federation.kit("hospital-b") / "package_manifest.json").read_text())
    version, start = found["hospital-b"].package.split()
    assert version == package["version"]
    assert package["sha256"].startswith(start)
    assert found["lead@example.org"].type == "lead"


def test_the_commands(made, capsys, monkeypatch):
    monkeypatch.setenv("PROVISIONING_PASSPHRASE", PASSPHRASE)
    monkeypatch.setenv("COLUMNS", "160")
    where = ["--project", str(made.path), "--folder", str(made.folder)]
    assert main(["renew", "hospital-a", "--days", "30", *where]) == 0
    assert "renewed/hospital-a.crt" in capsys.readouterr().err
    assert main(["renew", "hospital-b", *where]) == 0
    assert "its kit is still here" in capsys.readouterr().err
    assert main(["remove", "hospital-c", *where]) == 0
    assert "revoked.crl" in capsys.readouterr().err
    assert main(["status", *where]) == 0
    said = capsys.readouterr().out
    assert "warning: hospital-a: 29 days left; `python -m provisioning renew hospital-a`" in said
    assert "revocation list: number 1" in said
    assert "removed" in said
    assert main(["remove", "hospital-x", *where]) == 2
    assert "no kit of 'hospital-x' was built" in capsys.readouterr().err
    assert main(["renew", "hospital-a", "--request", str(made.site / "no.csr"), *where]) == 2
    assert "can't read the request" in capsys.readouterr().err
