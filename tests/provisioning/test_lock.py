"""The lock files, the bills of materials, and that pip refuses what was changed."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.utils import canonicalize_name

from fedimaging import __version__
from fedimaging.federation import preflight
from fedimaging.version import package_hash
from provisioning import lock as locks
from provisioning.cli import main
from provisioning.kit import KitError, make_wheelhouse
from provisioning.lock import BUILD_LOCK, CPU, GPU, LOCKS, REQUIREMENTS, bill_of_materials, lock_text, locked, sbom


def pins(text):
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_the_lock_holds_the_requirements_and_one_hash_for_each_package(lock):
    wanted = pins(REQUIREMENTS.read_text())
    wanted["torch"] += lock.torch
    found = locked(lock)
    stale = {name: version for name, version in wanted.items() if found.get(name) != version}
    assert not stale, f"{lock.path.name} is not of requirements.txt: run `python -m provisioning lock`"
    lines = [line for line in lock.path.read_text().splitlines() if not line.startswith("#")]
    for name, digest in zip(lines[::2], lines[1::2], strict=True):
        assert re.fullmatch(r"[a-z0-9-]+==\S+ \\", name)
        assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", digest)


def test_this_environment_is_what_the_kits_run_on(tmp_path):
    """By the hospitals' own check; else the suite would show something of other versions than those they install."""
    (tmp_path / "local").mkdir()
    for lock in LOCKS:
        shutil.copy(lock.path, tmp_path / "local")
    passed, found, _ = preflight._packages(tmp_path)
    assert passed, f"`make install` takes versions from provisioning/requirements.lock; found {found}"


def test_no_lock_names_a_registry_or_a_folder_of_a_machine():
    for path in [BUILD_LOCK, *(lock.path for lock in LOCKS), *(lock.sbom_path for lock in LOCKS)]:
        text = path.read_text().replace("http://cyclonedx.org/schema/bom-1.6.schema.json", "")
        assert "://" not in text
        assert "index-url" not in text
        assert "/opt/" not in text


def test_only_the_lock_for_gpus_holds_what_gpus_need():
    gpu = set(locked(GPU)) - set(locked(CPU))
    assert any(name.startswith("nvidia-") for name in gpu)
    assert not any(name.startswith(("nvidia-", "cuda")) for name in locked(CPU))
    assert set(locked(CPU)) <= set(locked(GPU))
    assert pins(BUILD_LOCK.read_text()).items() <= locked(CPU).items()


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_the_bill_of_materials_is_cyclonedx_and_of_the_lock(lock):
    text = sbom(lock).decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    assert {component["name"]: component["version"] for component in bill["components"]} == locked(lock)
    digests = {component["hashes"][0]["content"] for component in bill["components"]}
    assert digests == set(re.findall(r"sha256:([0-9a-f]{64})", lock.path.read_text()))
    about = bill["metadata"]["component"]
    assert (about["version"], about["properties"][0]["value"]) == (__version__, package_hash())
    references = {component["bom-ref"] for component in bill["components"]} | {"fedimaging"}
    assert {entry["ref"] for entry in bill["dependencies"]} == references
    assert all(set(entry["dependsOn"]) <= references for entry in bill["dependencies"])
    needs = {entry["ref"].split("@")[0]: entry["dependsOn"] for entry in bill["dependencies"]}
    assert any(need.startswith("pkg:pypi/torch@") for need in needs["pkg:pypi/monai"])


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ({"license_expression": "MIT OR Apache-2.0"}, {"expression": "MIT OR Apache-2.0"}),
        ({"license": "BSD"}, {"license": {"name": "BSD"}}),
        ({"license": "long\ntext", "classifier": ["License :: OSI Approved :: MIT"]}, {"license": {"name": "MIT"}}),
        ({}, {"license": {"name": "as stated in the package's own licence text"}}),
    ],
)  # fmt: skip
def test_a_licence_is_said_as_well_as_its_package_says_it(metadata, licence):
    packages = {"a": {"metadata": {"name": "a", "version": "1+cpu", **metadata}, "sha256": "0" * 64}}
    bill = bill_of_materials(packages)
    assert bill["components"][0]["licenses"] == [licence]
    assert bill["components"][0]["purl"] == "pkg:pypi/a@1%2Bcpu"
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill)) is None


def wheel(folder, body):
    """A wheel of one module. Returns the SHA-256 of its file."""
    files = {
        "tiny_example.py": body,
        "tiny_example-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny-example\nVersion: 1.0\n",
        "tiny_example-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}\n"
        for name, text in files.items()
    )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in {**files, "tiny_example-1.0.dist-info/RECORD": record}.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    folder.mkdir(exist_ok=True)
    (folder / "tiny_example-1.0-py3-none-any.whl").write_bytes(packed.getvalue())
    return hashlib.sha256(packed.getvalue()).hexdigest()


@pytest.fixture
def without_internet(tmp_path, monkeypatch):
    """pip sees one folder and nothing else. Returns it, and a lock file of the one package in it."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "source"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    digest = wheel(tmp_path / "source", "x = 1\n")
    lock = tmp_path / "tiny.lock"
    packages = {"tiny-example": {"metadata": {"version": "1.0"}, "sha256": digest}}
    lock.write_text(lock_text("One package", packages))
    return tmp_path / "source", lock


def pip_install(lock, wheelhouse, to):
    """As the guide says it, but into a folder instead of an environment."""
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", wheelhouse, "--no-deps",
         "--no-build-isolation", "--require-hashes", "-r", lock, "--target", to],
        env={name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_wheelhouse_is_made_and_installed_from_and_a_changed_wheel_is_refused(without_internet, tmp_path, capfd):
    _, lock = without_internet
    assert main(["wheelhouse", str(lock), "--to", str(tmp_path / "wheelhouse")]) == 0
    assert "1 files" in capfd.readouterr().out
    done = pip_install(lock, tmp_path / "wheelhouse", tmp_path / "good")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "good/tiny_example.py").read_text() == "x = 1\n"
    wheel(tmp_path / "wheelhouse", "x = 2\n")
    done = pip_install(lock, tmp_path / "wheelhouse", tmp_path / "bad")
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert not (tmp_path / "bad").exists()


def test_a_wheelhouse_is_not_made_of_a_changed_wheel(without_internet, tmp_path, capfd):
    source, lock = without_internet
    wheel(source, "x = 2\n")
    assert main(["wheelhouse", str(lock), "--to", str(tmp_path / "wheelhouse")]) == 2
    assert "not all was downloaded" in capfd.readouterr().err
    assert not list((tmp_path / "wheelhouse").glob("*.whl"))


def test_a_mistake_with_locks_is_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(KitError, match="no such lock file"):
        make_wheelhouse([tmp_path / "no.lock"], tmp_path)
    monkeypatch.setattr(sys, "platform", "win32")
    before = CPU.path.read_bytes()
    assert main(["lock"]) == 2
    assert "Python 3.11 on Linux" in capsys.readouterr().err
    assert CPU.path.read_bytes() == before


def test_locking_anew_keeps_what_is_locked_and_a_failing_pip_changes_nothing(tmp_path, monkeypatch):
    asked = {}

    def pip(command, **_):
        asked["pins"] = Path(command[command.index("--constraint") + 1]).read_text()
        asked["wanted"] = Path(command[command.index("--requirement") + 1]).read_text()
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no such version\n")

    monkeypatch.setattr(locks.subprocess, "run", pip)
    before = CPU.path.read_bytes()
    with pytest.raises(Exception, match=r"requirements\.lock: ERROR: no such version"):
        locks.write_locks(upgrade=False)
    assert CPU.path.read_bytes() == before
    assert f"grpcio=={locked(CPU)['grpcio']}\n" in asked["pins"]
    assert "torch" not in asked["pins"]
    assert f"torch==={locked(CPU)['torch']}" in asked["wanted"]
