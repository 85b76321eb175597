"""Every folder of jobs/, as it is committed, in the simulator and in one POC of real processes: `make every-job`."""

from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from fedimaging.cli import main as fedimaging
from fedimaging.datasets.manifest import SPLITS, Case, Manifest
from fedimaging.datasets.synthetic import synthesize
from fedimaging.federation.job import CLIENT_FILE, SERVER_FILE, JobFolder
from fedimaging.governance.grants import config_hash
from fedimaging.governance.ledger import read_records, verify
from poc.cli import main
from tests.conftest import REPOSITORY
from tests.poc.running import running_poc
from tests.rounds import assert_same_course, evaluated, events, rounds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SITES = ["hospital-a", "hospital-b", "hospital-c"]
JOBS = sorted(path.parent for path in (REPOSITORY / "jobs").glob("*/meta.json"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three hospitals with every dataset that a job asks for: few training cases, enough of others for the metrics."""
    root = tmp_path_factory.mktemp("data")
    for task, cases, training in (("classification", (300, 80, 60), 48), ("photographs", 60, 24)):
        for path in synthesize(root, task=task, hospitals=len(SITES), cases=cases, longer=64, seed=3):
            manifest = Manifest.read(path)
            manifest.model_copy(update={"training": manifest.training[:training]}).write(path)
    for seed, site in enumerate(SITES):
        write_volumes(root / site / "hippocampus", ["Anterior", "Posterior"], 1.0, seed)
        write_volumes(root / site / "brain_lesion", ["lesion"], 3.0, seed)
    return root


def write_volumes(folder, classes, spacing, seed):
    """MRI of bright boxes behind one another, one of each class, in noise; of another brightness at each hospital.

    Args:
        spacing: sides of a voxel, in mm.
    """
    folder.mkdir()
    generator = np.random.default_rng(seed)
    splits = {}
    for split, count in zip(SPLITS, (6, 5, 5), strict=True):
        names = [f"{split}-{i}" for i in range(count)]
        splits[split] = [Case(image=f"{name}.nii.gz", label=f"{name}-mask.nii.gz", patient=name) for name in names]
        for case in splits[split]:
            mask = np.zeros((34, 48, 34), np.uint8)
            x, y, z = generator.integers(4, 12, 3)
            for value in range(1, len(classes) + 1):
                mask[x : x + 14, y : y + 12, z : z + 14] = value
                y += 12
            image = (seed + 1) * (100 + 10 * generator.normal(0, 1, mask.shape) + 30.0 * mask)
            for name, values in ((case.image, image), (case.label, mask)):
                stored = nib.Nifti1Image(values.astype(np.float32), np.diag([spacing, spacing, spacing, 1]))
                nib.save(stored, folder / name)
    header = {"name": folder.name, "modality": "MR", "task": "segmentation", "classes": classes}
    Manifest(**header, made={"synthetic": True}, **splits).write(folder / "manifest.json")


@pytest.fixture(scope="module")
def poc(tmp_path_factory, data):
    """One POC for all jobs."""
    with running_poc(tmp_path_factory.mktemp("poc") / "federation", data, 8402) as poc:
        yield poc


@pytest.fixture(scope="module", params=JOBS, ids=lambda job: job.name)
def runs(request, poc, data, tmp_path_factory):
    """One job's two runs: exit codes, the server's folders, the sites' folders and the reports.

    One after the other: a job's processes take a gigabyte each.
    """
    job, before = request.param, _content(request.param)
    assert main(["submit", str(job), "--folder", str(poc.folder)]) == 0
    job_id = poc.last_job
    code = main(["result", "--folder", str(poc.folder)])
    log = next((poc.results / job_id).rglob("rounds.jsonl"))
    real = SimpleNamespace(code=code, server=log.parent, sites=poc.kits, report=poc.results / job_id / "report.html")
    workspace = tmp_path_factory.mktemp("runs") / job.name
    code = fedimaging(["simulate", str(job), "--data", str(data), "--workspace", str(workspace)])
    simulated = SimpleNamespace(
        code=code, server=workspace / "server/simulate_job", sites=workspace, report=workspace / "report.html"
    )
    assert _content(job) == before, "both ran the folder as it is"
    return SimpleNamespace(job=job, id=job_id, poc=real, simulator=simulated)


def _content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_job_is_finished_in_both_and_every_site_took_part_in_every_round(runs):
    trained = set(SITES) - {JobFolder(runs.job).leave_out}
    for run in (runs.poc, runs.simulator):
        assert run.code == 0
        assert [record["round"] for record in rounds(run.server)] == list(range(JobFolder(runs.job).rounds))
        assert all(set(record["sites"]) == trained and not record["refused"] for record in rounds(run.server))
        assert events(run.server)[-1]["event"] == "end"
        assert set(evaluated(run.server)) == set(SITES)
        assert all({"SRV_best", "SRV_last"} <= set(models) for models in evaluated(run.server).values())
        page = run.report.read_text()
        assert all(site in page for site in SITES)


def test_what_both_ran_has_the_hash_of_the_committed_configuration(runs):
    committed = config_hash((runs.job / CLIENT_FILE).read_bytes())
    for run, job_id in ((runs.poc, runs.id), (runs.simulator, "simulate_job")):
        for site in SITES:
            assert verify(run.sites / site).faults == []
            lines = [line for line in read_records(run.sites / site) if line["job_id"] == job_id]
            assert len(lines) > (0 if site == JobFolder(runs.job).leave_out else JobFolder(runs.job).rounds)
            assert {line["config"] for line in lines} == {committed}
        deployed = run.server / "app_server" / Path(SERVER_FILE).relative_to("app")
        assert config_hash(deployed.read_bytes()) == config_hash((runs.job / SERVER_FILE).read_bytes())


def test_both_learn_the_same(runs):
    assert any(record["key_metric"] is not None for record in rounds(runs.poc.server)), "there is something to compare"
    assert_same_course(runs.poc.server, runs.simulator.server)
