"""Where a site's dataset is found, and what it is told where it is not."""

import json
import re

import pytest

from fedimaging.datasets import site as site_module
from fedimaging.datasets.site import resolve
from fedimaging.errors import FedImagingError, Reason


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch, tmp_path):
    """No variable of the operator's and no study mount of this machine."""
    monkeypatch.delenv("FEDIMAGING_DATA", raising=False)
    monkeypatch.setattr(site_module, "STUDY_MOUNT", tmp_path / "mount")


def make(folder, name="chest_xray", file="manifest.json"):
    folder.mkdir(parents=True)
    (folder / "1.png").touch()
    case = {"image": "1.png", "label": "normal", "patient": "P1"}
    header = {"name": name, "modality": "DX", "task": "classification", "classes": ["normal", "pneumonia"]}
    (folder / file).write_text(json.dumps(header | {"training": [case]}))
    return folder


def site_file(tmp_path, text):
    local = tmp_path / "local"
    local.mkdir()
    (local / "datasets.yml").write_text(text)
    return local


def test_environment_names_a_root(tmp_path, monkeypatch):
    folder = make(tmp_path / "root" / "hospital-a" / "chest_xray")
    monkeypatch.setenv("FEDIMAGING_DATA", str(tmp_path / "root"))
    found = resolve("chest_xray", "hospital-a", None)
    assert (found.root, found.manifest_path) == (folder, folder / "manifest.json")
    assert (found.name, found.site) == ("chest_xray", "hospital-a")
    assert found.manifest.class_counts("training") == {"normal": 1, "pneumonia": 0}
    assert "FEDIMAGING_DATA" in found.source


def test_site_file_is_relative_to_itself_and_may_hold_the_site(tmp_path):
    folder = make(tmp_path / "xray-hospital-a", file="list.json")
    local = site_file(tmp_path, 'chest_xray: {path: "../xray-{site}", manifest: list.json}\n')
    found = resolve("chest_xray", "hospital-a", local)
    assert found.root.resolve() == folder
    assert found.manifest_path.name == "list.json"
    assert found.source.endswith("datasets.yml")


def test_environment_wins_over_the_site_file(tmp_path, monkeypatch):
    make(tmp_path / "file")
    folder = make(tmp_path / "root" / "hospital-a" / "chest_xray")
    monkeypatch.setenv("FEDIMAGING_DATA", str(tmp_path / "root"))
    assert resolve("chest_xray", "hospital-a", site_file(tmp_path, "chest_xray: {path: ../file}")).root == folder


def test_environment_without_the_dataset_is_no_reason_to_use_other_data(tmp_path, monkeypatch):
    make(tmp_path / "file")
    monkeypatch.setenv("FEDIMAGING_DATA", str(tmp_path / "root"))
    with pytest.raises(FedImagingError, match="environment variable FEDIMAGING_DATA") as caught:
        resolve("chest_xray", "hospital-a", site_file(tmp_path, "chest_xray: {path: ../file}"))
    assert caught.value.reason is Reason.NO_DATASET


def test_study_mount_is_the_fallback(tmp_path):
    folder = make(tmp_path / "mount" / "lungs" / "chest_xray")
    assert resolve("chest_xray", "hospital-a", site_file(tmp_path, "hippocampus: {path: x}")).root == folder
    default = make(tmp_path / "mount" / "default" / "chest_xray")
    assert resolve("chest_xray", "hospital-a", None).root == default


def test_two_studies_need_a_decision(tmp_path):
    make(tmp_path / "mount" / "lungs" / "chest_xray")
    make(tmp_path / "mount" / "hearts" / "chest_xray")
    with pytest.raises(FedImagingError, match="the studies hearts, lungs all hold 'chest_xray'"):
        resolve("chest_xray", "hospital-a", None)


def test_site_without_the_dataset_is_told_what_to_write_where(tmp_path):
    local = site_file(tmp_path, "")
    with pytest.raises(FedImagingError) as caught:
        resolve("chest_xray", "hospital-a", local)
    message = str(caught.value)
    assert caught.value.reason is Reason.NO_DATASET
    assert "write the line `chest_xray: {path: /folder/of/the/images, manifest: manifest.json}` into" in message
    assert str(local / "datasets.yml") in message
    assert "\n" not in message


def test_missing_manifest_names_the_rule(tmp_path):
    local = site_file(tmp_path, "chest_xray: {path: ../nowhere}")
    with pytest.raises(FedImagingError, match=r"no such manifest.*datasets\.yml says") as caught:
        resolve("chest_xray", "hospital-a", local)
    assert caught.value.reason is Reason.NO_DATASET


def test_missing_image_is_told_at_once(tmp_path):
    folder = make(tmp_path / "file")
    (folder / "1.png").unlink()
    with pytest.raises(FedImagingError, match=r"manifest\.json: training\[0\]: '1.png' does not exist") as caught:
        resolve("chest_xray", "hospital-a", site_file(tmp_path, "chest_xray: {path: ../file}"))
    assert caught.value.reason is Reason.BAD_MANIFEST


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("chest_xray: /srv/xray", "chest_xray must be {path: FOLDER"),
        ("chest_xray: {path: x, folder: y}", "chest_xray must be {path: FOLDER"),
        ("chest_xray: {manifest: m.json}", "chest_xray must be {path: FOLDER"),
        ("chest_xray: {path: 7}", "must be texts"),
        ("- chest_xray", "must hold lines such as"),
        ("chest_xray: {path: [", "is not YAML in line 1"),
        ("chest_xray: !!python/object/apply:os.getcwd []", "is not YAML in line 1"),
    ],
)
def test_wrong_site_file_is_told_in_one_line(tmp_path, text, reason):
    local = site_file(tmp_path, text)
    with pytest.raises(FedImagingError, match=re.escape(reason)) as caught:
        resolve("chest_xray", "hospital-a", local)
    assert str(caught.value).startswith(str(local / "datasets.yml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../hospital-b/chest_xray", "/etc", "..", "", "a/b", "*", "{site}", "a\n", "$HOME"])
def test_name_from_a_job_can_be_no_path(tmp_path, monkeypatch, name):
    make(tmp_path / "root" / "hospital-b" / "chest_xray")
    monkeypatch.setenv("FEDIMAGING_DATA", str(tmp_path / "root"))
    with pytest.raises(FedImagingError, match="is no dataset name"):
        resolve(name, "hospital-a", None)
    with pytest.raises(FedImagingError, match="is no site name"):
        resolve("chest_xray", name, None)
