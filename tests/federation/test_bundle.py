"""A bundle holds the job, the package's source files and nothing else, the same bytes each time."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from fedimaging.cli import main
from fedimaging.errors import FedImagingError
from fedimaging.federation.bundle import bundle
from fedimaging.version import PACKAGE, SOURCE_SUFFIXES, package_sources

JOB = Path(__file__).parents[2] / "jobs" / "chest_xray_fedavg"


@pytest.fixture
def package(tmp_path):
    """A copy of the package, to put something into."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "fedimaging", ignore=shutil.ignore_patterns("__pycache__")))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_is_the_job_and_the_sources_with_their_hashes(tmp_path, capsys):
    assert main(["bundle", str(JOB), "--out", str(tmp_path / "b")]) == 0
    files = contents(tmp_path / "b")
    job = {name: value for name, value in files.items() if not name.startswith("app/custom/")}
    assert job == contents(JOB)
    code = {name.removeprefix("app/custom/fedimaging/"): value for name, value in files.items() if name not in job}
    assert code == {name: path.read_bytes() for name, path in package_sources().items()}
    assert {Path(name).suffix for name in code} <= SOURCE_SUFFIXES
    listed = dict(reversed(line.split("  ")) for line in capsys.readouterr().out.splitlines())
    assert listed == {name: hashlib.sha256(value).hexdigest() for name, value in files.items()}


def test_the_same_job_gives_the_same_bytes(tmp_path, package):
    first = bundle(JOB, tmp_path / "a", package)
    for path in package.rglob("*.py"):
        os.utime(path, (1, 1))
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "cli.cpython-311.pyc").write_bytes(b"cache")
    assert bundle(JOB, tmp_path / "b", package) == first
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    "harm",
    [
        lambda package: (package / "patients.csv").write_text("name"),
        lambda package: (package / "datasets" / "scan.dcm").write_bytes(b"DICM"),
        lambda package: (package / "federation" / "model.pt").write_bytes(b"x"),
        lambda package: (package / ".env").write_text("TOKEN=1"),
        lambda package: (package / "link.py").symlink_to("/etc/passwd"),
        lambda package: (package / "data").symlink_to("/etc"),
    ],
    ids=["table", "image", "model", "hidden", "linked file", "linked folder"],
)
def test_whatever_is_no_source_file_stops_the_bundle_before_anything_is_written(tmp_path, package, harm):
    harm(package)
    with pytest.raises(FedImagingError, match="no source file of the package"):
        bundle(JOB, tmp_path / "b", package)
    assert not (tmp_path / "b").exists()


def test_a_faulty_job_and_a_folder_that_holds_something_are_refused(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("three years of work")
    assert main(["bundle", str(JOB), "--out", str(tmp_path / "full")]) == 2
    assert "holds something already" in capsys.readouterr().err
    assert main(["bundle", str(tmp_path / "no-job"), "--out", str(tmp_path / "b")]) == 2
    assert not (tmp_path / "b").exists()
