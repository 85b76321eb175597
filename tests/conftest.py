"""Fixtures of all tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from pydicom import dcmread

from fedimaging.datasets.manifest import SPLITS, Manifest
from fedimaging.datasets.synthetic import synthesize

REPOSITORY = Path(__file__).parents[1]
JOB = REPOSITORY / "jobs" / "chest_xray_fedavg"
SITES = ["hospital-a", "hospital-b", "hospital-c"]

# A busy machine is no failure.
hypothesis.settings.register_profile("fedimaging", deadline=None)
hypothesis.settings.load_profile("fedimaging")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public images beside the repository; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder shared/data beside the repository: it holds the real images")
    return folder


def fedimaging(*arguments, cwd=REPOSITORY, **named):
    """`python -m fedimaging` in a process of its own."""
    environment = {**os.environ, "COLUMNS": "250"}
    environment.pop("FEDIMAGING_DATA", None)
    return subprocess.run(
        [sys.executable, "-m", "fedimaging", *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False, **named,
    )  # fmt: skip


@pytest.fixture(scope="session")
def hospitals(tmp_path_factory):
    """Three small synthetic hospitals of different size."""
    root = tmp_path_factory.mktemp("data")
    synthesize(root, hospitals=3, cases=(220, 180, 140), longer=96, seed=3)
    return root


@pytest.fixture(scope="session")
def case_names(hospitals):
    """A pattern of all that names a case of these hospitals: files, patients, UIDs."""
    names = set()
    for site in SITES:
        folder = hospitals / site / "chest_xray"
        manifest = Manifest.read(folder / "manifest.json")
        for split in SPLITS:
            for case in manifest.split(split):
                names |= {case.image, Path(case.image).name, case.patient}
        header = dcmread(folder / manifest.test[0].image, stop_before_pixels=True)
        names |= {header.SOPInstanceUID, header.StudyInstanceUID, header.PatientName.family_name}
    return re.compile("|".join(re.escape(str(name)) for name in sorted(names)).encode())


@pytest.fixture(scope="session")
def plain_run(hospitals, tmp_path_factory):
    """The committed job folder in the simulator, run as the README of jobs/ says, by FLARE's own command."""
    workspace = tmp_path_factory.mktemp("runs") / "sim"
    made = fedimaging("workspace", workspace, "--data", hospitals)
    assert made.returncode == 0, made.stderr
    command = made.stdout.split()
    assert command[:2] == ["nvflare", "simulator"]
    before = {path: path.read_bytes() for path in JOB.rglob("*.json")}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("FEDIMAGING_DATA", None)
    done = subprocess.run(
        [sys.executable, "-m", "nvflare.cli", *command[1:]],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert {path: path.read_bytes() for path in JOB.rglob("*.json")} == before
    return workspace, done.stdout + done.stderr
