"""`data index --split-sites`: one source as several sites of chosen sizes."""

import csv
import hashlib

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedimaging.cli import main
from fedimaging.datasets.index import Options, build_sites
from fedimaging.datasets.index.model import Candidate
from fedimaging.datasets.index.sites import assign_sites
from fedimaging.datasets.manifest import SPLITS, Manifest
from fedimaging.datasets.site import resolve
from fedimaging.errors import FedImagingError, Reason

SITES = {"hospital-a": 20, "hospital-b": 10, "hospital-c": 6}


@pytest.fixture
def source(tmp_path):
    """40 pairs of image and mask."""
    folder = tmp_path / "source" / "organ"
    for number in range(40):
        values = np.random.default_rng(number).normal(size=(4, 5, 3)).astype(np.float32)
        for name, array in (("images", values), ("masks", (values > 0).astype(np.uint8))):
            (folder / name).mkdir(parents=True, exist_ok=True)
            nib.Nifti1Image(array, np.eye(4)).to_filename(folder / name / f"p{number:02}.nii.gz")
    return folder


def options(source, root, **changes):
    given = {"masks": source / "masks", "classes": ("organ",), "sites": SITES, "out": root}
    return Options(source, **given | changes)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def patients(manifest):
    return {case.patient for split in SPLITS for case in manifest.split(split)}


def test_sites_have_their_sizes_and_no_patient_in_common(source, tmp_path):
    results = build_sites(options(source, tmp_path / "root"))
    assert [result.path for result in results] == [
        tmp_path / "root" / site / "organ" / "manifest.json" for site in SITES
    ]
    seen = set()
    for result, (site, count) in zip(results, SITES.items(), strict=True):
        manifest = Manifest.read(result.path)
        manifest.check_files(result.path.parent)
        assert sum(len(manifest.split(split)) for split in SPLITS) == count
        assert min(len(manifest.split(split)) for split in SPLITS) >= 1
        assert not patients(manifest) & seen
        seen |= patients(manifest)
        assert manifest.made["site"] == site and manifest.made["sites"] == SITES
        files = list(result.path.parent.rglob("*.nii.gz"))
        assert len(files) == 2 * count
        assert all(not path.is_symlink() and path.stat().st_nlink == 1 for path in files)
        case = manifest.training[0]
        assert (result.path.parent / case.image).read_bytes() == (source / case.image).read_bytes()
    assert "4 of 40 usable cases are in no site" in results[0].warnings


def test_the_datasets_are_found_by_a_site(source, tmp_path, monkeypatch):
    build_sites(options(source, tmp_path / "root", name="liver_ct"))
    monkeypatch.setenv("FEDIMAGING_DATA", str(tmp_path / "root"))
    assert len(patients(resolve("liver_ct", "hospital-b", None).manifest)) == 10


def test_same_arguments_change_nothing_and_others_are_refused(source, tmp_path):
    root = tmp_path / "root"
    build_sites(options(source, root))
    before = contents(root)
    build_sites(options(source, root))
    assert contents(root) == before
    for changes in ({"seed": 1}, {"sites": SITES | {"hospital-a": 19}}, {"fractions": (0.5, 0.25, 0.25)}):
        with pytest.raises(FedImagingError, match="holds another split or other data"):
            build_sites(options(source, root, **changes))
    assert contents(root) == before


def test_split_is_reproducible_and_seeded(source, tmp_path):
    first, again, other = (
        [result.manifest for result in build_sites(options(source, tmp_path / name, seed=seed))]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert [manifest.digest() for manifest in first] == [manifest.digest() for manifest in again]
    assert [patients(manifest) for manifest in first] != [patients(manifest) for manifest in other]


def test_failure_leaves_nothing(source, tmp_path):
    root = tmp_path / "root"
    (root / "hospital-b" / "organ").mkdir(parents=True)
    (root / "hospital-b" / "organ" / "mine.txt").write_text("mine")
    with pytest.raises(FedImagingError, match="hospital-b/organ: holds another split or other data"):
        build_sites(options(source, root))
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["mine.txt"]
    assert not (root / "hospital-a").exists()


@pytest.mark.parametrize(
    ("changes", "reason", "text"),
    [
        ({"sites": {"a": 41}}, Reason.TOO_FEW_CASES, "asks for 41 cases, but 40 are usable; ask for fewer"),
        ({"sites": {"../a": 4}}, Reason.BAD_SETTING, "--split-sites ../a=4"),
        ({"sites": {"a": 0}}, Reason.BAD_SETTING, "--split-sites a=0"),
        ({"out": None}, Reason.BAD_SETTING, "give the data root with --out FOLDER"),
        ({"name": "../x"}, Reason.BAD_SETTING, "give a --name of letters"),
    ],
)
def test_wrong_options_are_refused(source, tmp_path, changes, reason, text):
    with pytest.raises(FedImagingError) as caught:
        build_sites(options(source, tmp_path / "root", **changes))
    assert caught.value.reason is reason and text in str(caught.value)
    assert not (tmp_path / "root").exists()


def test_root_in_the_source_is_refused(source):
    with pytest.raises(FedImagingError, match="lies in the source itself"):
        build_sites(options(source, source / "root"))


def test_pictures_are_split_by_patient(tmp_path):
    folder = tmp_path / "xray"
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(60):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 10), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        rows.append({"file": f"images/{number}.png", "patient_id": f"P{number // 3}", "label": "ab"[number // 3 % 2]})
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    arguments = ["--split-sites", "one=30,two=18", "--out", str(tmp_path / "root"), "--name", "chest"]
    assert main(["data", "index", str(folder), *arguments]) == 0
    manifests = [Manifest.read(tmp_path / "root" / site / "chest" / "manifest.json") for site in ("one", "two")]
    assert [len(patients(manifest)) for manifest in manifests] == [10, 6]
    assert not patients(manifests[0]) & patients(manifests[1])
    assert all(manifest.classes == ["a", "b"] for manifest in manifests)


@pytest.mark.parametrize("text", ["a", "a=", "a=x", "a=1,a=2", "=3", "a=-1"])
def test_command_refuses_what_is_no_list_of_sites(source, tmp_path, text, capsys):
    assert main(["data", "index", str(source), "--split-sites", text, "--out", str(tmp_path / "root")]) == 2
    assert "write SITE=CASES" in capsys.readouterr().err


groups = st.lists(st.integers(1, 6), min_size=1, max_size=40)


@settings(max_examples=60)
@given(groups, st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 3))
def test_any_sizes_are_met_within_half_a_patient(sizes, wanted, seed):
    cases = [
        Candidate(f"{patient}-{n}", None, patient=str(patient))
        for patient, size in enumerate(sizes)
        for n in range(size)
    ]
    sites = {f"s{number}": count for number, count in enumerate(wanted)}
    if sum(wanted) > len(cases):
        with pytest.raises(FedImagingError):
            assign_sites(cases, sites, seed)
        return
    members = assign_sites(cases, sites, seed)
    names = [case.name for chosen in members.values() for case in chosen]
    assert len(names) == len(set(names))
    owners = {}
    for site, chosen in members.items():
        assert len(chosen) <= sites[site] + max(sizes) / 2
        for case in chosen:
            assert owners.setdefault(case.patient, site) == site
    if max(sizes) == 1:
        assert {site: len(chosen) for site, chosen in members.items()} == sites


def test_real_hippocampus_as_three_sites(shared_data, tmp_path):
    source = shared_data / "hippocampus"
    before = contents(source)
    sites = {"hospital-a": 80, "hospital-b": 50, "hospital-c": 30}
    results = build_sites(Options(source, sites=sites, out=tmp_path / "root"))
    assert contents(source) == before
    assert [len(patients(result.manifest)) for result in results] == [80, 50, 30]
    assert all(result.manifest.classes == ["Anterior", "Posterior"] for result in results)
    assert results[0].left_out == {}
