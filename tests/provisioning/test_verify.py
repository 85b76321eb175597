"""`verify` names what is wrong with a kit, and nothing of a wrong kit is run."""

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from provisioning import kit as kit_file
from provisioning.kit import KitError, Pins, fingerprint, spoken, start_environment, verify
from provisioning.package import public_pem
from tests.provisioning.conftest import make_federation, pins, project_text, tree

SCRIPT = Path(kit_file.__file__)
PACKAGE = "local/custom/fedimaging"
UUID = "0b5e3c1a-7f1d-4c8e-9a53-2f6f0d9d7c11"


@pytest.fixture
def kit(handed_over, tmp_path):
    return shutil.copytree(handed_over.kits / "hospital-a", tmp_path / "hospital-a")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Another federation with the same names."""
    return make_federation(tmp_path_factory.mktemp("strangers"), project_text())


@pytest.fixture
def findings(kit, handed_over):
    def found(now=None, **changes):
        expected = Pins(**{**vars(pins(handed_over, "hospital-a")), **changes})
        return {(finding.kind, finding.where) for finding in verify(kit, expected, now).findings}

    return found


def run(*arguments, **named):
    """kit.py as a hospital runs it: alone, in a Python that knows nothing of this project."""
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-I", str(SCRIPT), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=60, check=False, **named,
    )  # fmt: skip


def append(path, text="\n"):
    with path.open("a") as file:
        file.write(text)


def test_a_kit_as_it_arrives_is_right(findings):
    assert findings() == set()


def test_kit_py_needs_nothing_but_cryptography():
    text = SCRIPT.read_text()
    modules = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert modules - set(sys.stdlib_module_names) == {"cryptography"}


@pytest.mark.parametrize(
    "name",
    [
        "startup/start.sh",
        "startup/sub_start.sh",
        "startup/fed_client.json",
        "local/resources.json.default",
        "local/authorization.json.default",
        "local/requirements.lock",
        "local/requirements.cdx.json",
        "fedimaging.service",
        f"{PACKAGE}/__init__.py",
        f"{PACKAGE}/federation/executor.py",
        "GUIDE.md",
    ],
)
def test_one_byte_changed_is_told_by_name(kit, findings, name):
    content = bytearray((kit / name).read_bytes())
    content[len(content) // 2] ^= 1
    (kit / name).write_bytes(content)
    assert findings() == {("changed", name)}


@pytest.mark.parametrize("name", ["startup/start.sh", f"{PACKAGE}/cli.py", "local/privacy.json"])
def test_a_missing_file_is_told_by_name(kit, findings, name):
    (kit / name).unlink()
    assert findings() == {("missing", name)}


@pytest.mark.parametrize(
    "name",
    [
        f"{PACKAGE}/stray.py",
        f"{PACKAGE}/__pycache__/cli.cpython-311.pyc",
        "local/custom/sitecustomize.py",
        "local/custom/torch/__init__.py",
        "local/job_resources.json",
        "local/evil__resources.json",
        "startup/evil__resources.json",
        "startup/signature.json",
        "json.py",
        "torch/__init__.py",
        f"{UUID}/app_hospital-a/custom/x.py",
        f"{UUID}/x.so",
        "notes.txt",
    ],
)
def test_an_extra_file_is_told_by_name(kit, findings, name):
    (kit / name).parent.mkdir(parents=True, exist_ok=True)
    (kit / name).write_bytes(b"\0")
    assert findings() == {("extra", name)}


@pytest.mark.parametrize(
    "name",
    [
        "log.txt",
        "log.txt.3",
        "log.json",
        "error_log.txt",
        "audit.log",
        "pid.fl",
        "daemon_pid.fl",
        ".admin_cli_history",
        "transfer/job/app.py",
        f"{UUID}/rounds.jsonl",
        f"{UUID}/app_hospital-a/config/config_fed_client.json",
    ],
)
def test_what_flare_writes_while_it_runs_is_no_finding(kit, findings, name):
    (kit / name).parent.mkdir(parents=True, exist_ok=True)
    (kit / name).write_text("")
    assert findings() == set()


def test_links_are_refused(kit, findings):
    start = kit / "startup/start.sh"
    start.rename(kit.parent / "start.sh")
    start.symlink_to(kit.parent / "start.sh")
    (kit / PACKAGE / "tasks").rename(kit.parent / "tasks")
    (kit / PACKAGE / "tasks").symlink_to(kit.parent / "tasks")
    found = findings()
    assert ("extra", "startup/start.sh") in found
    assert ("extra", f"{PACKAGE}/tasks") in found


def test_a_pipe_instead_of_a_key_does_not_hang(kit, findings):
    (kit / "startup/client.key").unlink()
    os.mkfifo(kit / "startup/client.key")
    assert {("missing", "startup/client.key"), ("extra", "startup/client.key")} <= findings()


def test_the_site_s_own_files_may_change_and_are_listed(kit, handed_over):
    append(kit / "local/datasets.yml", "chest_xray: {path: /srv/xray}\n")
    append(kit / "local/privacy.json")
    (kit / "local/resources.json").write_text("{}")
    report = verify(kit, pins(handed_over, "hospital-a"))
    assert report.findings == []
    assert report.site_changes == ["local/datasets.yml", "local/privacy.json"]


def edit_and_sign_anew(kit, name):
    """Enters a changed file into its manifest and signs both manifests with a key of one's own. Returns the key."""
    key = ec.generate_private_key(ec.SECP256R1())
    for manifest in ("kit_manifest", "package_manifest"):
        content = json.loads((kit / f"{manifest}.json").read_text())
        if name in content["files"]:
            content["files"][name] = kit_file.hash_file(kit / name)
        raw = json.dumps(content).encode()
        (kit / f"{manifest}.json").write_bytes(raw)
        (kit / f"{manifest}.sig").write_bytes(key.sign(raw, ec.ECDSA(hashes.SHA256())))
    (kit / "code_signing.pem").write_bytes(public_pem(key))
    return key


@pytest.mark.parametrize(("manifest", "name"), [("kit", "startup/start.sh"), ("package", f"{PACKAGE}/cli.py")])
def test_a_manifest_that_is_edited_or_signed_anew_is_refused(kit, findings, manifest, name):
    append(kit / name)
    path = kit / f"{manifest}_manifest.json"
    content = json.loads(path.read_text())
    content["files"][name] = kit_file.hash_file(kit / name)
    path.write_text(json.dumps(content))
    assert findings() == {("changed", f"{manifest}_manifest.json")}
    edit_and_sign_anew(kit, name)
    assert findings() == {("code key", "code_signing.pem")}


def test_one_manifest_does_not_stand_for_the_other(kit, findings):
    for suffix in ("json", "sig"):
        shutil.copyfile(kit / f"kit_manifest.{suffix}", kit / f"package_manifest.{suffix}")
    assert findings() == {("version", "package_manifest.json")}


@pytest.mark.parametrize(
    "name",
    ["kit_manifest.json", "kit_manifest.sig", "package_manifest.json", "package_manifest.sig", "code_signing.pem"],
)
def test_a_kit_without_signature_is_refused(kit, findings, name):
    (kit / name).unlink()
    assert ("missing", name) in findings()


def test_a_package_signed_by_another_federation_s_code_key_is_refused(kit, findings, strangers):
    theirs = strangers.folder / "kits/hospital-a"
    shutil.rmtree(kit / "local/custom")
    shutil.copytree(theirs / "local/custom", kit / "local/custom")
    for name in ("package_manifest.json", "package_manifest.sig", "code_signing.pem"):
        shutil.copyfile(theirs / name, kit / name)
    assert ("code key", "code_signing.pem") in findings()


def test_a_whole_kit_of_another_federation_is_refused_by_root_and_code_key(handed_over, strangers):
    found = verify(strangers.folder / "kits/hospital-a", pins(handed_over, "hospital-a")).findings
    assert {(finding.kind, finding.where) for finding in found} == {
        ("code key", "code_signing.pem"), ("root", "startup/rootCA.pem")
    }  # fmt: skip


def test_another_root_put_into_the_kit_is_refused(kit, findings, strangers):
    shutil.copyfile(strangers.folder / "kits/hospital-a/startup/rootCA.pem", kit / "startup/rootCA.pem")
    assert findings() == {
        ("changed", "startup/rootCA.pem"), ("root", "startup/rootCA.pem"), ("certificate", "startup/client.crt")
    }  # fmt: skip


def test_another_hospital_s_kit_is_refused_by_name(handed_over):
    report = verify(handed_over.kits / "hospital-b", pins(handed_over, "hospital-a"))
    assert {finding.kind for finding in report.findings} == {"name"}
    assert "kit of hospital-b, not of hospital-a" in str(report.findings[0])


def test_another_hospital_s_certificate_or_key_in_the_kit_is_refused(kit, findings, handed_over):
    for name in ("client.crt", "client.key"):
        shutil.copy(handed_over.kits / "hospital-b/startup" / name, kit / "startup" / name)
    assert findings() == {("name", "startup/client.crt")}
    shutil.copy(handed_over.kits / "hospital-a/startup/client.crt", kit / "startup/client.crt")
    assert findings() == {("changed", "startup/client.key")}


@pytest.mark.parametrize("position", [40, 400, 1000, -40])
def test_one_byte_changed_in_the_certificate_is_refused(kit, findings, position):
    path = kit / "startup/client.crt"
    raw = bytearray(path.read_bytes())
    raw[position] = ord("A") if raw[position] != ord("A") else ord("B")
    path.write_bytes(raw)
    assert {("changed", "startup/client.crt"), ("certificate", "startup/client.crt")} & findings()


def test_something_added_to_the_certificate_s_file_is_refused(kit, findings):
    append(kit / "startup/client.crt", "# \n")
    assert findings() == {("changed", "startup/client.crt")}


def test_an_expired_and_a_not_yet_valid_certificate_are_refused(findings):
    now = datetime.now(UTC)
    assert findings(now + timedelta(days=364)) == set()
    assert findings(now + timedelta(days=366)) == {("certificate", "startup/client.crt")}
    early = findings(now - timedelta(days=1))
    assert early == {("certificate", "startup/client.crt"), ("certificate", "startup/rootCA.pem")}


def test_a_version_that_is_not_accepted_is_refused(findings):
    assert findings(versions=("99.0.0",)) == {("version", "package_manifest.json")}
    assert findings(versions=("99.0.0", kit_version())) == set()


def kit_version():
    from fedimaging import __version__

    return __version__


def test_files_that_others_may_read_or_write_are_told(kit, findings):
    (kit / "startup/client.key").chmod(0o640)
    (kit / PACKAGE / "cli.py").chmod(0o666)
    assert findings() == {("permissions", "startup/client.key"), ("permissions", f"{PACKAGE}/cli.py")}


def test_fingerprints_are_taken_as_people_write_them():
    digits = "0123456789abcdef" * 4
    colons = ":".join(digits[i : i + 2] for i in range(0, 64, 2)).upper()
    assert fingerprint(spoken(digits)) == fingerprint(colons) == digits
    for wrong in ("", digits[:-1], digits + "0", digits.replace("0", "g")):
        with pytest.raises(KitError, match="64 hexadecimal"):
            fingerprint(wrong)


def test_the_stand_alone_command_pins_refuses_and_says_why(kit, handed_over, tmp_path):
    record = handed_over.federation.record
    known = ["--name", "hospital-a", "--root", spoken(record["root"]), "--code", record["code"].upper()]
    pinned = tmp_path / "pins.json"
    before = tree(kit)
    done = run("verify", kit, *known, "--pin", pinned)
    assert done.returncode == 0, done.stderr
    assert "verified: hospital-a of fedimaging" in done.stdout
    assert pinned.stat().st_mode & 0o077 == 0
    assert tree(kit) == before
    append(kit / "startup/start.sh")
    for command in (["verify", kit, "--pins", pinned], ["start", kit, "--pins", pinned]):
        done = run(*command)
        assert done.returncode == 1
        assert "changed      startup/start.sh" in done.stderr
        assert "refused" in done.stderr
    assert run("verify", kit, *known, "--pin", tmp_path / "second.json").returncode == 1
    assert not (tmp_path / "second.json").exists()


def _extra(kit, name):
    (kit / name).parent.mkdir(exist_ok=True)
    (kit / name).write_bytes(b"\0")


def _take(kit, other, *names):
    for name in names:
        shutil.copy(other / name, kit / name)


PACKAGE_SIGNATURE = ("package_manifest.json", "package_manifest.sig", "code_signing.pem")
START_ATTACKS = {
    "a byte of a start script": (lambda kit, *_: append(kit / "startup/start.sh"), "changed      startup/start.sh"),
    "a byte of the package": (lambda kit, *_: append(kit / PACKAGE / "cli.py"), f"changed      {PACKAGE}/cli.py"),
    "a byte of the certificate": (lambda kit, *_: append(kit / "startup/client.crt", "x"), "startup/client.crt"),
    "a stray source file": (lambda kit, *_: _extra(kit, "local/custom/sitecustomize.py"), "extra        local/custom"),
    "a stray bytecode file": (
        lambda kit, *_: _extra(kit, f"{PACKAGE}/__pycache__/cli.cpython-311.pyc"), f"extra        {PACKAGE}/__pycache__"
    ),
    "another root": (
        lambda kit, stranger, _: _take(kit, stranger, "startup/rootCA.pem", "startup/client.crt", "startup/client.key"),
        "root         startup/rootCA.pem",
    ),
    "a package signed by another key": (
        lambda kit, stranger, _: _take(kit, stranger, *PACKAGE_SIGNATURE), "code key     code_signing.pem"
    ),
    "another hospital's kit": (
        lambda kit, _, neighbour: shutil.copytree(neighbour, kit, dirs_exist_ok=True), "name         kit_manifest.json"
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", START_ATTACKS)
def test_start_refuses_and_nothing_of_the_kit_runs(kit, handed_over, strangers, tmp_path, attack):
    pins(handed_over, "hospital-a").write(tmp_path / "pins.json")
    change, said = START_ATTACKS[attack]
    change(kit, strangers.folder / "kits/hospital-a", handed_over.kits / "hospital-b")
    done = run("start", kit, "--pins", tmp_path / "pins.json")
    assert done.returncode == 1
    assert said in done.stderr
    assert "do not start this kit" in done.stderr
    assert kit_file.processes(kit) == []
    assert not (kit / "console.log").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "{kit}"], "needs --name, --root and --code"),
        (["verify", "{kit}", "--pins", "no.json"], "can't read the pins"),
        (["verify", "no-kit", "--name", "a", "--root", "0" * 64, "--code", "0" * 64], "no such kit folder"),
        (["verify", "{kit}", "--name", "a", "--root", "12", "--code", "0" * 64], "64 hexadecimal digits"),
        (["open", "no.kit"], "passphrase"),
        (["logs", "{kit}"], "nothing was logged yet"),
        (["install", "{kit}", "no.package", "--pins", "no.json"], "can't read the pins"),
        (["wheelhouse", "no.lock", "--to", "w"], "no such lock file"),
    ],
)
def test_a_mistake_is_one_line(kit, arguments, words):
    done = run(*(argument.format(kit=kit) for argument in arguments), stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_pins_do_not_go_into_the_kit(kit, handed_over):
    record = handed_over.federation.record
    known = ["--name", "hospital-a", "--root", record["root"], "--code", record["code"]]
    done = run("verify", kit, *known, "--pin", kit / "pins.json")
    assert done.returncode == 2
    assert "outside the kit" in done.stderr
    assert not (kit / "pins.json").exists()


def test_start_verifies_runs_the_kit_s_script_and_shields_it(kit, handed_over, tmp_path):
    """The start script is replaced, and signed anew, by one that says what it sees."""
    pinned = tmp_path / "pins.json"
    script = kit / "startup/sub_start.sh"
    script.write_text('env; echo "folder $PWD $1"; umask; python3 -c "import sys; print(sys.path[:2])"\n')
    key = edit_and_sign_anew(kit, "startup/sub_start.sh")
    code = kit_file.code_fingerprint(key.public_key())
    Pins("hospital-a", handed_over.federation.record["root"], code).write(pinned)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "start", str(kit), "--pins", str(pinned), "--foreground"],
        env={**os.environ, "PYTHONPATH": "/tmp/evil", "LD_PRELOAD": "", "PYTHONSTARTUP": "/tmp/evil.py"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "/tmp/evil" not in done.stdout
    assert "PYTHONDONTWRITEBYTECODE=1" in done.stdout
    assert "PYTHONSAFEPATH=1" in done.stdout
    assert f"folder {kit} --once" in done.stdout
    assert "0077" in done.stdout
    assert f"['{kit}/local/custom'" in done.stdout


def test_the_environment_keeps_what_else_there_is():
    clean = start_environment(
        Path("/kit"), {"PATH": "/bin", "HOME": "/root", "LD_LIBRARY_PATH": "/x", "PYTHONHOME": "/y"}
    )
    assert clean["HOME"] == "/root"
    assert clean["PATH"].endswith(":/bin")
    assert not {"LD_LIBRARY_PATH", "PYTHONHOME"} & set(clean)
