"""Synthetic hospitals: valid DICOM, anatomy and findings without shortcuts, seeded, and nothing overwritten."""

from __future__ import annotations

import argparse
import errno
import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from numpy.typing import NDArray
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fedimaging.datasets.images import read_image
from fedimaging.datasets.manifest import SPLITS, Manifest
from fedimaging.datasets.synthetic import add_commands, synthesize, typical_hospitals
from fedimaging.datasets.synthetic.hospitals import Request
from fedimaging.datasets.synthetic.phantom import Imaging, Subject, project, radiograph
from fedimaging.datasets.synthetic.radiographs import Radiograph, plan_chest
from fedimaging.errors import FedImagingError, Reason

TYPE_1 = """
    SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID Modality PresentationIntentType ImageType
    PixelIntensityRelationship PixelIntensityRelationshipSign RescaleIntercept RescaleSlope RescaleType
    PresentationLUTShape LossyImageCompression BurnedInAnnotation PatientOrientation ImageLaterality
    ImagerPixelSpacing AnatomicRegionSequence InstanceNumber Rows Columns BitsStored PixelData
"""
TYPE_2 = """
    PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime ReferringPhysicianName StudyID
    AccessionNumber SeriesNumber Manufacturer DetectorType AcquisitionContextSequence KVP PositionerType
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hospitals with 48 images each, of 64 pixels."""
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    synthesize(folder, cases=48, longer=64, seed=1)
    return folder


@pytest.fixture(scope="module")
def files(root: Path) -> dict[str, list[pydicom.Dataset]]:
    """Site -> its DICOM files, each value of each element checked against its VR."""
    read: dict[str, list[pydicom.Dataset]] = {}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.RAISE)
        warnings.simplefilter("error")
        for path in sorted(root.rglob("*.dcm")):
            dataset = pydicom.dcmread(path)
            for element in dataset.iterall():
                assert element.value is not None or element.VM == 0
            read.setdefault(path.relative_to(root).parts[0], []).append(dataset)
    return read


def _hashes(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def _planned(cases: int, longer: int = 64, seed: int = 0, multi_label: bool = False) -> list[list[Radiograph]]:
    request = Request("chest_xray", longer, multi_label, seed)
    plans = [plan_chest(hospital, site, cases, request) for site, hospital in enumerate(typical_hospitals(3))]
    return [[item for item in plan.items if isinstance(item, Radiograph)] for plan in plans]


def test_manifests_hold_every_image_by_patient_and_class(root: Path) -> None:
    for site in ("hospital-a", "hospital-b", "hospital-c"):
        folder = root / site / "chest_xray"
        manifest = Manifest.read(folder / "manifest.json")
        manifest.check_files(folder)
        assert manifest.synthetic and manifest.made["seed"] == 1
        assert manifest.classes == ["normal", "consolidation", "effusion"]
        cases = [case for split in SPLITS for case in manifest.split(split)]
        assert len(cases) == len(list(folder.rglob("*.dcm"))) == 48
        assert len({case.patient for case in cases}) < 48
        for split in SPLITS:
            assert min(manifest.class_counts(split).values()) >= 1
        assert all(case.sex and case.age_group and case.vendor and case.view for case in cases)


def test_dicom_has_what_the_dx_iod_requires(files: dict[str, list[pydicom.Dataset]]) -> None:
    for dataset in (dataset for datasets in files.values() for dataset in datasets):
        assert [name for name in TYPE_1.split() if name not in dataset or dataset[name].is_empty] == []
        assert [name for name in TYPE_2.split() if name not in dataset] == []
        assert dataset.SOPClassUID == DigitalXRayImageStorageForPresentation
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
        assert (dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType) == (0, 1, "US")
        inverse = dataset.PhotometricInterpretation == "MONOCHROME1"
        assert dataset.PresentationLUTShape == ("INVERSE" if inverse else "IDENTITY")
        assert dataset.PixelIntensityRelationshipSign == (1 if inverse else -1)
        assert "VOILUTSequence" in dataset or {"WindowCenter", "WindowWidth"} <= set(dataset.dir())
        assert dataset.pixel_array.max() < 2**dataset.BitsStored


def test_uids_follow_patient_study_series_and_instance(files: dict[str, list[pydicom.Dataset]]) -> None:
    everything = [dataset for datasets in files.values() for dataset in datasets]
    for level in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "AccessionNumber"):
        assert len({dataset[level].value for dataset in everything}) == len(everything)
    uids = [pydicom.uid.UID(d[f"{n}InstanceUID"].value) for d in everything for n in ("Study", "Series", "SOP")]
    assert all(uid.is_valid for uid in uids) and len(set(uids)) == len(uids)
    of_patient: dict[str, set[tuple[str, str, str]]] = {}
    for dataset in everything:
        birth = (str(dataset.PatientName), dataset.PatientBirthDate, dataset.PatientSex)
        of_patient.setdefault(dataset.PatientID, set()).add(birth)
        years = int(dataset.StudyDate) // 10000 - int(dataset.PatientBirthDate) // 10000
        assert int(dataset.PatientAge[:3]) in (years - 1, years)
    assert all(len(seen) == 1 for seen in of_patient.values())
    assert len(of_patient) < len(everything)


def test_hospitals_differ_as_real_ones_do(files: dict[str, list[pydicom.Dataset]]) -> None:
    def each(name: str) -> list[object]:
        return [files[site][0][name].value for site in sorted(files)]

    assert len(set(map(str, each("Manufacturer")))) == 3
    assert len(set(zip(each("Rows"), each("Columns"), strict=True))) == 3
    assert each("BitsStored") == [12, 10, 14]
    assert each("PhotometricInterpretation") == ["MONOCHROME2", "MONOCHROME1", "MONOCHROME2"]
    syntaxes = [files[site][0].file_meta.TransferSyntaxUID for site in sorted(files)]
    assert syntaxes == [ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless]
    bedside = {site: np.mean([dataset.ViewPosition == "AP" for dataset in files[site]]) for site in files}
    assert bedside["hospital-c"] > bedside["hospital-a"] + 0.3
    normal = [np.mean([not item.findings for item in items]) for items in _planned(100)]
    assert max(normal) - min(normal) > 0.05


@pytest.mark.parametrize("site", [0, 1, 2])
def test_reading_gives_the_picture_that_was_drawn(site: int, tmp_path: Path) -> None:
    study = _planned(12)[site][3]
    study.write(tmp_path)
    drawn = study.image()
    read = read_image(tmp_path / study.path)[0]
    assert read.shape == drawn.shape == study.hospital.matrix(64)
    assert np.abs(read - drawn).max() < 0.03
    assert drawn.std() > 0.15


def test_a_chest_has_white_heart_and_dark_lungs() -> None:
    dark, bright = [], []
    for patient in range(12):
        subject = Subject((0, patient, 1), (0, patient, 1, 1), sex="FM"[patient % 2])
        image = radiograph((128, 108), (42.0, 35.4), subject, ())
        rows, cols = slice(44, 74), 108 // 2
        bright.append(image[rows, cols - 3 : cols + 4].mean())
        dark.append(min(image[rows, 20:40].mean(), image[rows, 70:90].mean()))
    assert np.mean(bright) > 0.7 and np.mean(dark) < 0.5
    assert np.all(np.array(bright) - np.array(dark) > 0.15)


def test_patients_differ_and_a_patient_keeps_the_anatomy() -> None:
    imaging = Imaging(devices=0)

    def path(patient: int, study: int) -> NDArray[np.floating]:
        subject = Subject((0, patient, 1), (0, patient, 1, study))
        return project((64, 64), (40.0, 40.0), subject, (), imaging)

    def closeness(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
        return max(
            float(np.corrcoef(a[8:-8, 8:-8].ravel(), np.roll(b, (y, x), (0, 1))[8:-8, 8:-8].ravel())[0, 1])
            for y in range(-4, 5)
            for x in range(-4, 5)
        )

    same = np.mean([closeness(path(at, 1), path(at, 2)) for at in range(8)])
    other = np.mean([closeness(path(at, 1), path(at + 1, 1)) for at in range(8)])
    assert same > other
    assert not np.array_equal(path(0, 1), path(0, 2))


@pytest.mark.parametrize("finding", ["consolidation", "effusion"])
@pytest.mark.parametrize("view", ["PA", "AP"])
def test_a_finding_adds_opacity_in_the_lungs_only(finding: str, view: str) -> None:
    shape, field = (96, 96), (40.0, 40.0)
    rows: list[float] = []
    for patient in range(12):
        subject = Subject((3, patient, 1), (3, patient, 1, 1), view=view)
        normal = project(shape, field, subject, (), Imaging())
        added = project(shape, field, subject, (finding,), Imaging()) - normal
        assert added.min() > -0.6
        assert 1.0 < added.max() < 12.0
        seen = added > 0.5
        assert 0.005 < seen.mean() < 0.3
        assert not seen[:8].any() and not seen[-8:].any() and not seen[:, :4].any() and not seen[:, -4:].any()
        rows.append(float(np.nonzero(seen)[0].mean() / shape[0]))
    assert np.mean(rows) > 0.55 if finding == "effusion" else np.ptp(rows) > 0.2


def test_the_same_seed_makes_the_same_bytes(tmp_path: Path) -> None:
    synthesize(tmp_path / "one", cases=12, longer=48, seed=7, workers=1)
    synthesize(tmp_path / "two", cases=12, longer=48, seed=7, workers=2)
    synthesize(tmp_path / "other", cases=12, longer=48, seed=8)
    one, two, other = (_hashes(tmp_path / name) for name in ("one", "two", "other"))
    assert len(one) == 3 * 13
    assert one == two
    assert not set(one.values()) & set(other.values())


def test_multi_label_has_none_one_and_both(tmp_path: Path) -> None:
    [path] = synthesize(tmp_path, hospitals=1, cases=40, longer=32, multi_label=True)
    manifest = Manifest.read(path)
    labels = {case.label for split in SPLITS for case in manifest.split(split)}
    assert manifest.multi_label and manifest.classes == ["consolidation", "effusion"]
    assert labels == {(), ("consolidation",), ("effusion",), ("consolidation", "effusion")}


def test_more_hospitals_are_variants_with_names_of_their_own() -> None:
    hospitals = typical_hospitals(7)
    assert [hospital.name for hospital in hospitals][3:] == ["hospital-d", "hospital-e", "hospital-f", "hospital-g"]
    assert len({hospital.vendor for hospital in hospitals}) == 7
    assert hospitals[3].imaging != hospitals[0].imaging
    assert hospitals[:3] == typical_hospitals(3)


def _auroc(features: NDArray[np.floating], truth: NDArray[np.bool_]) -> float:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    scores = cross_val_predict(model, features, truth, cv=folds, method="predict_proba")[:, 1]
    return float(roc_auc_score(truth, scores))


@pytest.fixture(scope="module")
def pictures() -> list[tuple[NDArray[np.float32], NDArray[np.bool_], list[Radiograph]]]:
    """Per hospital 150 images in a 64 px square, and whether there is a finding."""
    hospitals = []
    for items in _planned(150):
        square = np.zeros((len(items), 64, 64), np.float32)
        for at, item in enumerate(items):
            image = item.image()
            top, left = (64 - image.shape[0]) // 2, (64 - image.shape[1]) // 2
            square[at, top : top + image.shape[0], left : left + image.shape[1]] = image
        hospitals.append((square, np.array([bool(item.findings) for item in items]), items))
    return hospitals


@pytest.mark.parametrize("site", [0, 1, 2])
def test_grey_levels_do_not_give_the_finding_away(
    pictures: list[tuple[NDArray[np.float32], NDArray[np.bool_], list[Radiograph]]], site: int
) -> None:
    images, truth, _ = pictures[site]
    mean, spread = images.mean((1, 2)), images.std((1, 2))
    histograms = np.stack([np.histogram(image, 16, (0, 1))[0] for image in images]).astype(float)
    assert _auroc(mean[:, None], truth) < 0.65
    assert _auroc(np.stack([mean, spread], axis=1), truth) < 0.65
    assert _auroc(histograms, truth) < 0.65


@pytest.mark.parametrize("site", [0, 1, 2])
def test_tags_do_not_give_the_finding_away(site: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Radiograph, "image", lambda study: np.zeros((32, 32), np.float32))
    tags, truth = [], []
    for item in _planned(200)[site]:
        item.write(tmp_path)
        dataset = pydicom.dcmread(tmp_path / item.path)
        voi = [dataset.get("WindowCenter", 0), dataset.get("WindowWidth", 0)]
        numbers = [dataset.KVP, dataset.ExposureInuAs, dataset.ExposureTime, item.age, item.patient, item.number, *voi]
        texts = [dataset.PatientSex == "F", dataset.ViewPosition == "AP", dataset.Grid == "NONE"]
        dates = [int(dataset.StudyDate), int(dataset.StudyTime)]
        tags.append([float(value) for value in (*numbers, *texts, *dates)])
        truth.append(bool(item.findings))
    assert _auroc(np.array(tags), np.array(truth)) < 0.65


def _layers(channels: tuple[int, ...]) -> Iterator[torch.nn.Module]:
    for before, after in pairwise(channels):
        yield torch.nn.Conv2d(before, after, 3, padding=1, bias=False)
        yield torch.nn.BatchNorm2d(after)
        yield torch.nn.ReLU()
        yield torch.nn.MaxPool2d(2)


def test_a_network_that_sees_where_finds_it(
    pictures: list[tuple[NDArray[np.float32], NDArray[np.bool_], list[Radiograph]]],
) -> None:
    images = torch.from_numpy(np.concatenate([images for images, _, _ in pictures]))[:, None]
    images = (images - images.mean((2, 3), keepdim=True)) / images.std((2, 3), keepdim=True)
    truth = torch.from_numpy(np.concatenate([truth for _, truth, _ in pictures])).float()
    held_out = torch.arange(len(truth)) % 4 == 0
    training, epochs, size = torch.nonzero(~held_out)[:, 0], 10, 32
    torch.manual_seed(0)
    head = (torch.nn.AdaptiveMaxPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 1))
    network = torch.nn.Sequential(*_layers((1, 16, 32, 64, 64)), *head)
    optimizer = torch.optim.AdamW(network.parameters(), 4e-3, weight_decay=1e-3)
    steps = len(training) // size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        order = training[torch.randperm(len(training))]
        for step in range(steps):
            batch = order[step * size : (step + 1) * size]
            inputs = images[batch].flip(-1) if step % 2 else images[batch]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(network(inputs)[:, 0], truth[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        scores = network(images[held_out])[:, 0]
    assert roc_auc_score(truth[held_out].numpy(), scores.numpy()) > 0.8


def test_the_same_arguments_again_leave_the_files_alone(tmp_path: Path) -> None:
    paths = synthesize(tmp_path, hospitals=2, cases=12, longer=32)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert synthesize(tmp_path, hospitals=2, cases=12, longer=32) == paths
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_missing_image_is_made_again_when_forced(tmp_path: Path) -> None:
    [path] = synthesize(tmp_path, hospitals=1, cases=12, longer=32)
    before = _hashes(tmp_path)
    next(path.parent.rglob("*.dcm")).unlink()
    with pytest.raises(FedImagingError, match="--force"):
        synthesize(tmp_path, hospitals=1, cases=12, longer=32)
    synthesize(tmp_path, hospitals=1, cases=12, longer=32, force=True)
    assert _hashes(tmp_path) == before


def test_other_arguments_need_force_and_then_replace_all(tmp_path: Path) -> None:
    synthesize(tmp_path, hospitals=2, cases=12, longer=32)
    before = _hashes(tmp_path)
    with pytest.raises(FedImagingError, match=r"other arguments .*hospital-a, hospital-b.*--force"):
        synthesize(tmp_path, hospitals=1, cases=12, longer=32, seed=1)
    assert _hashes(tmp_path) == before
    [path] = synthesize(tmp_path, hospitals=1, cases=12, longer=32, seed=1, force=True)
    assert Manifest.read(path).made["seed"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["hospital-a"]


def test_another_dataset_goes_beside_the_first(tmp_path: Path) -> None:
    synthesize(tmp_path, hospitals=1, cases=12, longer=32)
    before = _hashes(tmp_path)
    synthesize(tmp_path, dataset="chest_two", hospitals=1, cases=12, longer=32)
    after = _hashes(tmp_path)
    assert before.items() < after.items()
    first, second = (after[f"hospital-a/{name}/manifest.json"] for name in ("chest_xray", "chest_two"))
    assert first != second


@pytest.mark.parametrize("force", [False, True])
def test_data_of_others_is_never_replaced(tmp_path: Path, force: bool) -> None:
    folder = tmp_path / "hospital-a" / "chest_xray"
    folder.mkdir(parents=True)
    (folder / "real.dcm").write_bytes(b"a patient's")
    with pytest.raises(FedImagingError, match="did not make"):
        synthesize(tmp_path, hospitals=1, cases=12, longer=32, force=force)
    assert (folder / "real.dcm").read_bytes() == b"a patient's"
    assert list(tmp_path.iterdir()) == [tmp_path / "hospital-a"]


def test_a_folder_that_is_no_data_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(FedImagingError, match="no data root"):
        synthesize(tmp_path, hospitals=1, cases=12, longer=32)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(FedImagingError, match="is a file"):
        synthesize(tmp_path / "thesis.txt", hospitals=1, cases=12, longer=32)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    write = Radiograph.write

    def full(self: Radiograph, folder: Path) -> None:
        if self.patient > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, folder)

    monkeypatch.setattr(Radiograph, "write", full)
    with pytest.raises(FedImagingError, match="No space left") as raised:
        synthesize(tmp_path / "data", hospitals=1, cases=12, longer=32, workers=workers)
    assert raised.value.reason is Reason.NO_DISK_SPACE
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_the_old_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthesize(tmp_path, hospitals=1, cases=12, longer=32)
    before = _hashes(tmp_path)

    def interrupted(self: Radiograph, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Radiograph, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path, hospitals=1, cases=12, longer=32, seed=1, force=True)
    assert _hashes(tmp_path) == before


def _command(*words: str) -> None:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["synth", *words])
    arguments.run(arguments)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sites", "0"], "sites 0"),
        (["--sites", "27"], "1 to 26"),
        (["--sites", "three"], "--sites 'three'"),
        (["--cases", "20,30"], "one for each of the 3 sites"),
        (["--cases", "20,,30"], "whole number"),
        (["--cases", "5"], "12 or more"),
        (["--cases", "-40"], "12 or more"),
        (["--matrix", "8"], "32 to 4096"),
        (["--matrix", "wide"], "--matrix 'wide'"),
        (["--seed", "-1"], "seed -1"),
        (["--task", "detection"], "choose from classification"),
        (["--dataset", "../chest"], "dataset '../chest'"),
    ],
)
def test_wrong_arguments_get_one_line_and_make_nothing(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(FedImagingError) as raised:
        _command("--out", str(tmp_path / "data"), *words)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_two_hospitals_of_one_name_are_refused(tmp_path: Path) -> None:
    hospital = typical_hospitals(1)[0]
    with pytest.raises(FedImagingError, match="a name of its own"):
        synthesize(tmp_path / "data", hospitals=[hospital, hospital], cases=12)
    with pytest.raises(FedImagingError, match="a name of its own"):
        synthesize(tmp_path / "data", hospitals=[replace(hospital, name="../a")], cases=12)


def test_the_command_tells_what_it_made_and_that_it_is_up_to_date(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    words = ("--out", str(tmp_path / "data"), "--sites", "2", "--cases", "12,15", "--matrix", "32")
    _command(*words)
    said = capsys.readouterr().out
    assert "hospital-a" in said and "hospital-b" in said and "consolidation" in said and "up to date" not in said
    assert len(list((tmp_path / "data").rglob("*.dcm"))) == 27
    _command(*words)
    assert "up to date" in capsys.readouterr().out.replace("\n", " ")
