"""A kit runs as a service, without and with systemd: the server and one hospital for real, on this machine."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys

import pytest

import fedimaging
from fedimaging.version import package_hash
from provisioning import kit as kit_file
from provisioning import package as site_package
from provisioning.cli import main
from provisioning.keys import Keys
from provisioning.kit import KitError, Pins, processes, service_unit, verify
from provisioning.package import write_package
from tests.provisioning.conftest import PASSPHRASE, PATIENCE, pins, said, wait_for

SCRIPT = kit_file.__file__


@pytest.fixture
def kit(handed_over, tmp_path):
    return shutil.copytree(handed_over.kits / "hospital-a", tmp_path / "hospital-a")


def unit(kit, tmp_path, **named):
    values = {"user": "fedimaging", "data": [tmp_path / "images"], "allow": [], **named}
    return service_unit(kit, tmp_path / "pins.json", values["user"], values["data"], values["allow"])


def settings(text):
    lines = [line.partition("=") for line in text.splitlines() if not line.startswith(("#", "["))]
    return {name: value for name, _, value in lines if name}


def test_the_unit_lets_the_kit_write_into_its_folder_and_reach_the_server_only(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(kit_file, "_name_servers", lambda: ["192.0.2.53"])
    said = settings(unit(kit, tmp_path, allow=["198.51.100.7"]))
    assert said["ReadWritePaths"] == str(kit)
    assert said["ReadOnlyPaths"].split() == [f"{kit}/startup", f"{kit}/local", str(tmp_path / "images")]
    assert said["IPAddressDeny"] == "any"
    server = {entry[4][0] for entry in socket.getaddrinfo("localhost", 443)}
    assert set(said["IPAddressAllow"].split()) == server | {"192.0.2.53/32", "198.51.100.7/32", "localhost"}
    assert said["ProtectSystem"] == "strict"
    assert said["CapabilityBoundingSet"] == said["AmbientCapabilities"] == ""
    assert said["NoNewPrivileges"] == "yes"
    assert said["User"] == "fedimaging"
    assert "@" not in re.sub(r"@(?:system-service|privileged)", "", unit(kit, tmp_path))


def as_systemd_does(text):
    """Runs the unit's commands in their order, as far as they succeed. Returns the last exit code."""
    code = 0
    for line in re.findall(r"^Exec\w+=(.*)$", text, re.MULTILINE):
        python, isolated, script, *arguments = shlex.split(line.removeprefix("+"))
        assert (python, isolated, script) == (sys.executable, "-I", SCRIPT)
        if code := kit_file.main(arguments):
            break
    return code


@pytest.fixture
def started(monkeypatch):
    """Which kits were started; none really is."""
    started = []
    monkeypatch.setattr(kit_file, "run", lambda kit: started.append(kit) or 0)
    return started


def test_the_service_starts_a_kit_that_verifies_and_no_other(kit, handed_over, tmp_path, started, capsys):
    pins(handed_over, "hospital-a").write(tmp_path / "pins.json")
    assert as_systemd_does(unit(kit, tmp_path)) == 0
    assert started == [kit]
    text = unit(kit, tmp_path)
    (kit / "startup/start.sh").write_text("")
    assert as_systemd_does(text) == 1
    assert "changed      startup/start.sh" in capsys.readouterr().err
    assert started == [kit]


def test_after_a_power_cut_during_an_installation_the_service_ends_it_and_starts(
    kit, handed_over, tmp_path, monkeypatch, started
):
    trusted = pins(handed_over, "hospital-a")
    trusted.write(tmp_path / "pins.json")
    with monkeypatch.context() as patch:
        patch.setattr(fedimaging, "__version__", "0.1.7")
        write_package(tmp_path / "new.package", Keys.read(handed_over.folder, PASSPHRASE).code_key)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(kit_file.Path, "replace", lambda *_: sys.exit("power cut"))
        kit_file.install(kit, tmp_path / "new.package", trusted)
    assert [finding.kind for finding in verify(kit, trusted).findings] == ["interrupted"]
    assert as_systemd_does(unit(kit, tmp_path)) == 0
    assert started == [kit]
    assert json.loads((kit / "package_manifest.json").read_text())["version"] == "0.1.7"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit_and_rates_it_as_safe(kit, tmp_path):
    path = tmp_path / "fedimaging.service"
    # The rating is of a user that exists on this machine and is not the special one called nobody.
    path.write_text(unit(kit, tmp_path, user="daemon"))
    checked = subprocess.run(
        ["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert "Unknown" not in checked.stderr
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", path],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert rated.returncode == 0, rated.stdout[-2000:] + rated.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": [kit_file.Path("/srv/my images")]}, "without spaces"),
        ({"allow": ["proxy.example.org"]}, "--allow: 'proxy.example.org'"),
        ({"data": [kit_file.Path("/srv/x\nExecStart=/bin/sh")]}, "without spaces"),
    ],
)
def test_a_unit_is_not_made_of_what_systemd_would_misread(kit, tmp_path, change, words):
    with pytest.raises(KitError, match=words):
        unit(kit, tmp_path, **change)


def test_the_command_prints_a_unit_of_a_kit_that_verifies_only(kit, handed_over, tmp_path, capsys):
    pins(handed_over, "hospital-a").write(tmp_path / "pins.json")
    arguments = ["unit", str(kit), "--pins", str(tmp_path / "pins.json"), "--user", "fedimaging", "--data", "/srv/xray"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("# Runs one hospital's startup kit")
    assert said.endswith("WantedBy=multi-user.target\n")
    (kit / "startup/start.sh").write_text("")
    assert main(arguments) == 1
    assert capsys.readouterr().out == ""


def test_a_hospital_runs_in_the_foreground_as_systemd_runs_it_and_sigterm_says_good_bye(running):
    kit, server = running.hospital, running.server

    def written():
        """When anything was last changed in the folders that the unit makes read only."""
        return {
            path: path.lstat().st_mtime_ns
            for name in ("startup", "local")
            for path in (kit / name, *(kit / name).rglob("*"))
        }

    before = written()
    service = subprocess.Popen(
        [running.python, "-I", SCRIPT, "start", kit, "--pins", running.folder / "hospital-a.json", "--foreground"],
        env={"PATH": os.environ["PATH"], "HOME": str(running.folder)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        wait_for(lambda: said(kit, f"fedimaging {fedimaging.__version__} ({package_hash()})"))
        assert said(server, "New client hospital-a")
        assert written() == before
        status = running.kit_py("status", kit)
        assert status.returncode == 0, status.stdout + status.stderr
        assert f"fedimaging {fedimaging.__version__}, {package_hash()}" in status.stdout
        assert "Successfully registered client:hospital-a" in status.stdout
        again = running.kit_py("start", kit)
        assert (again.returncode, "runs already" in again.stderr) == (2, True)
    finally:
        service.send_signal(signal.SIGTERM)
        heard = service.communicate(timeout=2 * PATIENCE)[0].decode()
    assert service.returncode == 0, heard
    wait_for(lambda: said(server, "hospital-a left"))
    assert processes(kit) == []
    assert written() == before
    assert verify(kit, Pins.read(running.folder / "hospital-a.json")).findings == []
    assert not list(kit.rglob("*.pyc"))


def test_a_running_site_is_updated_and_rolled_back(running, tmp_path, monkeypatch):
    kit = running.hospital
    shutil.copytree(site_package.PACKAGE, tmp_path / "fedimaging", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fedimaging/__init__.py").write_text('__version__ = "0.1.7"\n')
    with monkeypatch.context() as patch:
        patch.setattr(site_package, "PACKAGE", tmp_path / "fedimaging")
        patch.setattr(fedimaging, "__version__", "0.1.7")
        write_package(tmp_path / "new.package", running.code_key)
    assert running.kit_py("start", kit).returncode == 0
    assert (
        f"(process {processes(kit)[0]}); stop it first"
        in running.kit_py("install", kit, tmp_path / "new.package").stderr
    )
    stopped = running.kit_py("stop", kit, "--seconds", str(PATIENCE))
    assert stopped.stdout == "stopped\n"
    installed = running.kit_py("install", kit, tmp_path / "new.package")
    assert installed.returncode == 0, installed.stderr
    (kit / "log.txt").unlink()
    assert running.kit_py("start", kit).returncode == 0
    digest = json.loads((kit / "package_manifest.json").read_text())["sha256"]
    wait_for(lambda: said(kit, f"fedimaging 0.1.7 ({digest})"))
    assert "0.1.7" in running.kit_py("logs", kit).stdout
    running.kit_py("stop", kit)
    assert running.kit_py("rollback", kit).returncode == 0
    assert f"fedimaging {fedimaging.__version__}" in running.kit_py("verify", kit).stdout
    assert "does not run" in running.kit_py("stop", kit).stdout
    assert running.kit_py("status", kit).returncode == 1
