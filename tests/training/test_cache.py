"""The cache: memory first, then disk, under byte budgets; owner-only; whole or not at all."""

import errno
import stat

import pytest
import torch

from fedimaging.errors import FedImagingError, Reason
from fedimaging.training import cache as cache_module
from fedimaging.training.cache import CaseCache, DiskCache, cache_folder, clear_cache, item_bytes


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def counted(toy, job):
    """The toy's task with a count of its loads."""
    task = job().task
    load, task.loads = task.load, []
    task.load = lambda root, case: (task.loads.append(case.image), load(root, case))[1]
    return task


def fill(task, toy, **budgets):
    return CaseCache(task, toy.root, toy.manifest.test, **budgets)


def test_what_fits_in_memory_is_loaded_once(toy, counted):
    cache = fill(counted, toy, memory_budget=10**9)
    assert len(cache) == len(counted.loads) == 24
    assert [tuple(cache[i]["image"].shape) for i in range(24)] == [(1, 32, 32)] * 24
    assert len(counted.loads) == 24
    assert cache.memory_bytes == sum(item_bytes(cache[i]) for i in range(24))


def test_the_rest_spills_to_disk_and_is_read_back_the_same(toy, counted):
    one = item_bytes(counted.load(toy.root, toy.manifest.test[0]))
    plain = fill(counted, toy, memory_budget=10**9)
    spilled = fill(counted, toy, memory_budget=10 * one, disk=DiskCache(10**9))
    assert spilled.memory_bytes == 10 * one
    counted.loads.clear()
    assert all(torch.equal(plain[i]["image"], spilled[i]["image"]) for i in range(24))
    assert counted.loads == []
    again = fill(counted, toy, memory_budget=0, disk=DiskCache(10**9))
    assert len(again) == 24
    assert len(counted.loads) == 10, "another process finds on disk what was spilled"


def test_budgets_are_kept(toy, counted):
    one = item_bytes(counted.load(toy.root, toy.manifest.test[0]))
    cache = fill(counted, toy, memory_budget=0, disk=DiskCache(5 * one))
    assert cache.memory_bytes == 0
    assert len(list(cache_folder().glob("*.pt"))) == 5
    assert all("image" in cache[i] for i in range(24))


def test_only_the_owner_can_read_it_and_a_command_deletes_it(toy, counted, capsys):
    from fedimaging.cli import main

    fill(counted, toy, memory_budget=0, disk=DiskCache(10**9))
    folder = cache_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert main(["data", "clear-cache"]) == 0
    assert str(folder) in capsys.readouterr().out
    assert not folder.exists()
    assert clear_cache() == 0


def test_a_changed_file_or_setting_is_loaded_anew(toy, counted, job):
    fill(counted, toy, memory_budget=0, disk=DiskCache(10**9))
    counted.loads.clear()
    (toy.root / "test-0.png").write_bytes((toy.root / "test-1.png").read_bytes())
    fill(counted, toy, memory_budget=0, disk=DiskCache(10**9))
    assert counted.loads == ["test-0.png"]
    other = job(task={"image_size": 40}).task
    assert fill(other, toy, memory_budget=0, disk=DiskCache(10**9))[0]["image"].shape == (1, 40, 40)


def test_a_broken_cache_file_is_loaded_anew(toy, counted):
    fill(counted, toy, memory_budget=0, disk=DiskCache(10**9))
    for path in cache_folder().glob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    assert fill(counted, toy, memory_budget=10**9, disk=DiskCache(10**9))[0]["image"].shape == (1, 32, 32)


def test_a_full_disk_is_told_and_leaves_nothing_half_written(toy, counted, monkeypatch):
    def full(item, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.torch, "save", full)
    with pytest.raises(FedImagingError, match="no space left") as caught:
        fill(counted, toy, memory_budget=0, disk=DiskCache(10**9))
    assert caught.value.reason is Reason.NO_DISK_SPACE
    assert list(cache_folder().iterdir()) == []
