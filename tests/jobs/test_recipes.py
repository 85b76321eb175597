"""The committed job folders are what the recipes write, hold no Python, and are valid."""

import importlib.util
from pathlib import Path

import pytest

from fedimaging.federation.job import JobFolder

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture(scope="session")
def recipes():
    spec = importlib.util.spec_from_file_location("recipes", JOBS / "recipes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files(folder):
    return {path.relative_to(folder): path.read_text() for path in folder.rglob("*") if path.is_file()}


def job_folders():
    return sorted(path.parent for path in JOBS.glob("*/meta.json"))


def test_the_folders_are_what_the_recipes_write(recipes, tmp_path):
    recipes.write(tmp_path)
    assert [folder.name for folder in job_folders()] == sorted(path.name for path in tmp_path.iterdir())
    for folder in job_folders():
        assert files(folder) == files(tmp_path / folder.name)


@pytest.mark.parametrize("folder", job_folders(), ids=lambda folder: folder.name)
def test_a_job_is_configuration_only_and_valid(folder):
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json"}
    job = JobFolder(folder)
    settings = job.settings()
    assert settings.dataset and job.rounds >= 1
    assert job.meta["min_clients"] == job.min_clients + bool(job.leave_out)
    assert job.name == folder.name


def test_the_readme_lists_every_setting_as_the_code_has_it(recipes, tmp_path):
    written = tmp_path / "README.md"
    written.write_text((JOBS / "README.md").read_text())
    recipes.write_settings(written)
    assert written.read_text() == (JOBS / "README.md").read_text(), "run python jobs/recipes.py"
    rows = [line for line in written.read_text().splitlines() if line.startswith("| `")]
    listed = {line.split("`")[1] for line in rows}
    assert {"rounds", "round_timeout", "training.learning_rate", "task.image_size", "network.norm"} <= listed
    assert not [row for row in rows if row.endswith("|  |")], "a setting without a meaning"
