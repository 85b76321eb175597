"""The bundle runs on a plain FLARE POC that knows nothing of this project."""

import json
import os
import re
import subprocess
import sysconfig
import time
import venv
from pathlib import Path

import psutil
import pytest
import yaml

from fedimaging.datasets.synthetic import synthesize
from fedimaging.federation.bundle import bundle
from fedimaging.federation.job import JobFolder
from fedimaging.federation.policy import privacy, write_json
from fedimaging.governance.grants import grant_everything
from fedimaging.simulator import stop_process_tree
from poc.federation import free_port

pytestmark = [pytest.mark.federation, pytest.mark.timeout(1200)]

JOB = Path(__file__).parents[2] / "jobs" / "chest_xray_fedavg"
SITES = ["site-1", "site-2"]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python with the requirements and without this package: the .pth of an editable install is not followed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (packages / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    program = folder / "bin" / "python"
    absent = subprocess.run(
        [program, "-c", "import fedimaging"], env=plain_environment(folder), capture_output=True, check=False
    )
    assert b"ModuleNotFoundError" in absent.stderr, "the package is not there"
    subprocess.run([program, "-c", "import nvflare, torch, monai"], env=plain_environment(folder), check=True)
    return program


def plain_environment(home, **more):
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", **more}


@pytest.fixture
def plain_poc(python, tmp_path):
    """FLARE's own POC of two sites, running; its processes are ended by their ids."""
    synthesize(tmp_path / "made", hospitals=2, cases=(90, 80), longer=64, seed=7)
    for site, made in zip(SITES, sorted((tmp_path / "made").iterdir()), strict=False):
        (tmp_path / "data").mkdir(exist_ok=True)
        made.rename(tmp_path / "data" / site)
    environment = plain_environment(
        tmp_path, NVFLARE_POC_WORKSPACE=str(tmp_path / "poc"), FEDIMAGING_DATA=str(tmp_path / "data")
    )
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"

    def nvflare(*arguments):
        log = tmp_path / "said.txt"
        with log.open("wb") as file:
            code = subprocess.run(
                [python, "-m", "nvflare.cli", *map(str, arguments)], env=environment, cwd=tmp_path,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False,
            ).returncode  # fmt: skip
        said = log.read_text()
        assert code == 0, said
        return said

    make = "import sys, nvflare.lighter.provision as p; p.gen_default_project_config('dummy_project.yml', sys.argv[1])"
    subprocess.run([python, "-c", make, tmp_path / "plain.yml"], env=environment, check=True)
    project = yaml.safe_load((tmp_path / "plain.yml").read_text())
    port = free_port(8302)
    for participant in project["participants"]:
        if participant["type"] == "server":
            participant |= {"fed_learn_port": port, "admin_port": port}
    (tmp_path / "plain.yml").write_text(yaml.safe_dump(project, sort_keys=False))
    nvflare("poc", "prepare", "-i", tmp_path / "plain.yml", "--force")
    kits = tmp_path / "poc" / project["name"] / "prod_00"
    for site in SITES:
        local = kits / site / "local"
        grant_everything(local, ["chest_xray"])
        # What the sites insist on wherever they train: our filter on what leaves, and no log sent to the server.
        write_json(local / "privacy.json", privacy())
        resources = json.loads((local / "resources.json.default").read_text())
        write_json(local / "resources.json", resources | {"allow_log_streaming": False})
    assert not list(kits.rglob("custom/fedimaging"))
    try:
        nvflare("poc", "start", "--timeout", "300")
        yield nvflare, tmp_path
    finally:
        subprocess.run(
            [python, "-m", "nvflare.cli", "poc", "stop", "--no-wait"], env=environment, check=False, capture_output=True
        )
        end_all(f"{tmp_path / 'poc'}{os.sep}")


def end_all(mark):
    def left():
        return [p for p in psutil.process_iter(["cmdline"]) if any(mark in part for part in p.info["cmdline"] or [])]

    deadline = time.monotonic() + 60
    while left() and time.monotonic() < deadline:
        time.sleep(0.5)
    for process in left():
        stop_process_tree(process.pid)
    assert not left()


def test_the_bundle_runs_where_nothing_of_this_project_is(plain_poc):
    nvflare, folder = plain_poc
    job = JobFolder(JOB)
    job.override({
        "rounds": 1, "network.name": "MobileNetV2", "task.image_size": 32, "training.max_batches": 1, "min_clients": 2
    })  # fmt: skip
    job.write(folder / "job")
    bundle(folder / "job", folder / "bundle")
    job_id = re.search(r"job_id: (\S+)", nvflare("job", "submit", "-j", folder / "bundle"))[1]
    nvflare("job", "wait", job_id, "--timeout", "600", "--interval", "2")
    nvflare("job", "download", job_id, "-o", folder / "result")
    log = next((folder / "result").rglob("rounds.jsonl")).read_text()
    assert '"event": "end"' in log
    assert '"refused": {}' in log
    assert next((folder / "result").rglob("best_FL_global_model.pt")).stat().st_size > 10**6
