"""Removed participants and revoked certificates over real processes: FLARE's server, hospitals and console."""

import os

import pexpect
import pytest

from provisioning import kit as kit_file
from provisioning.kit import make_request
from provisioning.lifecycle import remove, renew
from tests.console import AdminConsole, LoginRefusedError
from tests.provisioning.conftest import PASSPHRASE, PATIENCE, said, tree, wait_for


def publish(running, path):
    """Brings a revocation list to the server as the README says: a copy under another name, then a move."""
    new = running.server / "local/revoked.new"
    new.write_bytes(path.read_bytes())
    new.rename(running.server / "local/revoked.crl")


def console(running, kit, name):
    pins = running.folder / f"{name}.json"
    return AdminConsole(
        kit,
        name,
        command=[str(running.python), "-I", kit_file.__file__, "start", str(kit), "--pins", str(pins)],
        environment={"PATH": os.environ["PATH"], "HOME": str(running.folder)},
        timeout=PATIENCE,
    )


def test_a_removed_hospital_and_a_removed_person_are_out_at_once_and_stay_out(running):
    lead = "lead@example.org"
    hospital, person = running.site("hospital-b"), running.site(lead)
    assert running.kit_py("start", hospital).returncode == 0
    wait_for(lambda: said(running.server, "New client hospital-b"))
    with console(running, person, lead) as open_console:
        assert "hospital-b" in open_console.send("check_status server")
        remove(running.made.federation, "hospital-b", PASSPHRASE)
        publish(running, remove(running.made.federation, lead, PASSPHRASE))
        wait_for(lambda: said(running.server, "logged out hospital-b"))
        open_console.process.expect(pexpect.EOF, timeout=PATIENCE)
        assert "was removed from this federation" in open_console.process.before
    with pytest.raises(LoginRefusedError, match=f"{lead} was removed from this federation"):
        console(running, person, lead)
    assert said(running.server, "closed the connection of hospital-b: hospital-b was removed from this federation")
    running.kit_py("stop", hospital, "--seconds", str(PATIENCE))
    (hospital / "log.txt").unlink()
    running.kit_py("start", hospital)
    wait_for(lambda: said(hospital, "Login failed"))
    assert said(running.server, "refused messages of hospital-b: hospital-b was removed from this federation")
    assert (running.server / "log.txt").read_text().count("New client hospital-b") == 1


def test_a_certificate_of_a_stolen_key_is_shut_out_and_the_renewed_one_takes_over(running, tmp_path):
    hospital = running.site("hospital-c")
    (hospital / "local/datasets.yml").write_text("chest_xray: {path: /srv/xray}\n")
    assert running.kit_py("start", hospital).returncode == 0
    wait_for(lambda: said(running.server, "New client hospital-c"))
    key, request, _ = make_request("hospital-c", "hospital_c", "client", tmp_path)
    renew(running.made.federation, "hospital-c", PASSPHRASE, 90, request=request, revoke=True)
    publish(running, running.made.folder / "revoked.crl")
    wait_for(lambda: said(running.server, "closed the connection of hospital-c: the certificate"))
    assert said(running.server, "logged out hospital-c: the certificate")
    running.kit_py("stop", hospital, "--seconds", str(PATIENCE))
    before = tree(hospital)
    certificate = running.made.federation.kit("hospital-c") / "startup/client.crt"
    done = running.kit_py("install-certificate", hospital, certificate, "--key", key)
    assert done.returncode == 0, done.stderr
    after = tree(hospital)
    assert {name for name in after if after[name] != before.get(name)} == {"startup/client.crt", "startup/client.key"}
    running.kit_py("start", hospital)
    wait_for(lambda: (running.server / "log.txt").read_text().count("New client hospital-c") == 2)
