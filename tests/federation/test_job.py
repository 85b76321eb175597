"""A job folder: what is wrong with one is told before FLARE sees it, and a change leaves the folder as it is."""

import json
import shutil
from pathlib import Path

import pytest

from fedimaging.errors import FedImagingError
from fedimaging.federation.job import JobFolder, parse_changes

JOB = Path(__file__).parents[2] / "jobs" / "chest_xray_fedavg"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(JOB, tmp_path / "job"))


def edit(folder, name, change):
    path = folder / name
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


SERVER, CLIENT = "app/config/config_fed_server.json", "app/config/config_fed_client.json"


def test_changes_reach_server_and_sites_and_leave_the_folder_as_it_is(folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    job = JobFolder(folder)
    job.override(parse_changes(["rounds=3", "min_clients=1", "task.classes=a,b", "training.epochs=2", "seed=5"]))
    job.write(tmp_path / "copy")
    changed = JobFolder(tmp_path / "copy")
    assert (changed.rounds, changed.min_clients, changed.meta["min_clients"]) == (3, 1, 1)
    assert changed.settings().to_dict()["training"]["epochs"] == 2
    assert changed.settings().task.settings.classes == ["a", "b"]
    assert '"seed": 5' in (tmp_path / "copy" / SERVER).read_text()
    assert before == {path: path.read_bytes() for path in folder.rglob("*.json")}


@pytest.mark.parametrize(
    ("changes", "sites"),
    [
        (["leave_out=hospital-c"], 3),
        (["leave_out=hospital-c", "min_clients=3"], 4),
        (["leave_out="], 2),
        (["min_clients=1"], 1),
    ],
)
def test_flare_is_told_how_many_sites_the_job_needs_with_the_one_left_out(folder, changes, sites):
    job = JobFolder(folder)
    job.override(parse_changes(changes))
    assert job.meta["min_clients"] == job.sites_needed == sites


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("epochs=3", "no such setting"),
        ("training.epoch=3", "unknown setting"),
        ("training.epochs=many", "training.epochs"),
        ("rounds=0", "num_rounds"),
        ("rounds=three", "num_rounds"),
        ("min_clients=two", "min_clients"),
        ("required_sites=hospital-a", "required_sites"),
        ("network.name=VGG", "network.name"),
        ("training.epochs.deep=1", "training"),
        ("rounds", "NAME=VALUE"),
    ],
)
def test_a_wrong_change_is_refused_by_name(folder, change, words):
    with pytest.raises(FedImagingError, match=words) as caught:
        job = JobFolder(folder)
        job.override(parse_changes([change]))
        job.settings()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            SERVER,
            lambda c: c["components"].append({"id": "x", "path": "subprocess.Popen"}),
            "subprocess.Popen is not on",
        ),
        (
            SERVER,
            lambda c: c["components"][0]["args"].update(network={"config_type": "dict", "path": "subprocess.Popen"}),
            "subprocess.Popen is not on",
        ),
        (
            SERVER,
            lambda c: c["components"].append(
                {"id": "p", "path": "nvflare.app_opt.pt.file_model_persistor.PTFileModelPersistor"}
            ),
            "PTFileModelPersistor is not on",
        ),
        (CLIENT, lambda c: c["executors"][0]["executor"].update(path="os.system"), "os.system is not on"),
        (CLIENT, lambda c: c["executors"][0]["executor"]["args"].update(seed=7), "'seed' differs"),
        (
            CLIENT,
            lambda c: c["executors"][0]["executor"]["args"].update(dataset="{$AWS_SECRET}"),
            "environment variable",
        ),
        (CLIENT, lambda c: c["executors"][0]["executor"]["args"].update(dataset="/etc"), "dataset"),
        (CLIENT, lambda c: c["executors"].clear(), "names no"),
        (SERVER, lambda c: c["workflows"][0]["args"].update(num_rounds=0), "num_rounds"),
        (SERVER, lambda c: c["workflows"][1]["args"].update(timeout=-1), "timeout"),
        (SERVER, lambda c: c["workflows"][0]["args"].update(save_filename="/tmp/x"), "save_filename"),
    ],
)
def test_a_wrong_folder_is_refused(folder, name, change, words):
    edit(folder, name, change)
    with pytest.raises(FedImagingError, match=words) as caught:
        JobFolder(folder).settings()
    assert "AWS_SECRET" not in str(caught.value), "what a job asks of the environment is not echoed"


def test_code_that_comes_with_a_job_is_refused(folder):
    (folder / "app/custom").mkdir()
    with pytest.raises(FedImagingError, match="configuration only"):
        JobFolder(folder)


@pytest.mark.parametrize("name", ["meta.json", SERVER, CLIENT])
def test_a_missing_or_broken_file_is_named(folder, name):
    (folder / name).write_text("{")
    with pytest.raises(FedImagingError, match=f"{Path(name).name}: not JSON: line 1"):
        JobFolder(folder)
    (folder / name).unlink()
    with pytest.raises(FedImagingError, match=f"{Path(name).name}: no such file"):
        JobFolder(folder)


def test_an_escaped_placeholder_and_a_name_that_is_a_path_are_refused(folder):
    text = (folder / CLIENT).read_text().replace('"chest_xray"', '"{\\u0024TOKEN}"')
    (folder / CLIENT).write_text(text)
    with pytest.raises(FedImagingError, match="environment variable"):
        JobFolder(folder)
    for name in ("/tmp/elsewhere", "..", "a/b", ""):
        edit(folder, "meta.json", lambda c, name=name: c.update(name=name))
        with pytest.raises(FedImagingError, match="name: expected"):
            JobFolder(folder)
