"""`data index`: manifests from a CSV, from DICOM files, from a folder per class and from arrays."""

import argparse
import csv
import json
import os
import shutil
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid
from rich.console import Console

from fedimaging.datasets import index
from fedimaging.datasets.index import Options, add_commands, build_index
from fedimaging.datasets.manifest import SPLITS, Manifest
from fedimaging.errors import FedImagingError, Reason


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (12, 10), dtype=np.uint8)


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path)
    return path


def table(path, rows, delimiter=","):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def dicom(path, seed, **elements):
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = DigitalXRayImageStorageForPresentation, generate_uid()
    data.Modality, data.PhotometricInterpretation, data.SamplesPerPixel = "CR", "MONOCHROME2", 1
    data.Rows, data.Columns = 12, 10
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data.PixelData = pixels(seed).tobytes()
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


LABELS = ("normal", "pneumonia")


@pytest.fixture
def folder(tmp_path):
    """24 images of 12 patients with labels.csv, as in the shared data."""
    source = tmp_path / "chest_xray"
    rows = []
    for number in range(24):
        picture(source / "images" / f"{number}.png", number)
        rows.append({"file": f"images/{number}.png", "patient_id": f"P{number // 2}", "label": LABELS[number // 2 % 2]})
    table(source / "labels.csv", rows)
    return source


def rows_of(folder):
    with (folder / "labels.csv").open() as file:
        return list(csv.DictReader(file))


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def images_of(manifest):
    return {case.image: case for split in SPLITS for case in manifest.split(split)}


def no_links(source, target):
    raise OSError(18, "Invalid cross-device link")


def refused(options, reason, text):
    with pytest.raises(FedImagingError) as caught:
        build_index(options)
    assert caught.value.reason is reason
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_csv_of_files_and_labels(folder):
    result = build_index(Options(folder))
    manifest = Manifest.read(folder / "manifest.json")
    assert manifest == result.manifest
    manifest.check_files(folder)
    assert (manifest.name, manifest.modality, manifest.classes) == ("chest_xray", "DX", list(LABELS))
    cases = images_of(manifest)
    assert {name: (case.patient, case.label) for name, case in cases.items()} == {
        row["file"]: (row["patient_id"], row["label"]) for row in rows_of(folder)
    }
    assert all(manifest.class_counts(split)[name] for split in SPLITS for name in LABELS)
    assert result.left_out == {} and result.warnings == [] and result.kept_patients == 0
    assert not manifest.synthetic


def test_same_seed_same_manifest(folder):
    first = build_index(Options(folder, keep=False, seed=3)).manifest
    table(folder / "labels.csv", rows_of(folder)[::-1])
    assert build_index(Options(folder, keep=False, seed=3)).manifest == first
    assert build_index(Options(folder, keep=False, seed=4)).manifest.assignments() != first.assignments()


def test_old_splits_are_kept_when_cases_are_added(folder):
    old = build_index(Options(folder)).manifest.assignments()
    rows = rows_of(folder)
    for number in range(24, 60):
        picture(folder / "images" / f"{number}.png", number)
        rows.append({"file": f"images/{number}.png", "patient_id": f"Q{number}", "label": LABELS[number % 2]})
    table(folder / "labels.csv", rows)
    result = build_index(Options(folder, seed=9))
    new = result.manifest.assignments()
    assert len(new) == 48
    assert {patient: new[patient] for patient in old} == old
    assert result.kept_patients == 12
    again = build_index(Options(folder, seed=9, keep=False)).manifest.assignments()
    assert {patient: again[patient] for patient in old} != old


def test_columns_delimiter_covariates_and_renaming(folder, tmp_path):
    rows = [
        {
            "Bild": row["file"].removeprefix("images/"),
            "Fall": row["patient_id"],
            "Befund": {"normal": "o.B.", "pneumonia": "COVID-19"}[row["label"]],
            "Alter": 30 + number,
            "sex": "F",
        }
        for number, row in enumerate(rows_of(folder))
    ]
    (folder / "labels.csv").unlink()
    labels = table(tmp_path / "befunde.csv", rows, delimiter=";")
    columns = {"image": "Bild", "label": "Befund", "patient": "Fall", "age_group": "Alter"}
    rename = {"o.B.": "normal", "COVID-19": "pneumonia"}
    manifest = build_index(Options(folder, labels=labels, columns=columns, rename=rename)).manifest
    case = images_of(manifest)["images/20.png"]
    assert (case.label, case.patient, case.age_group, case.sex, case.vendor) == ("normal", "P10", "40-59", "F", None)


def test_chosen_classes_and_their_order(folder):
    rows = rows_of(folder)
    rows[0]["label"] = rows[1]["label"] = "fracture"
    rows[2]["label"] = ""
    table(folder / "labels.csv", rows)
    result = build_index(Options(folder, classes=("pneumonia", "normal")))
    assert result.manifest.classes == ["pneumonia", "normal"]
    assert result.left_out == {
        "the class fracture is not among --classes": ["images/0.png", "images/1.png"],
        "no label": ["images/2.png"],
    }
    assert result.manifest.made["left_out"] == {reason: len(names) for reason, names in result.left_out.items()}


def test_multi_label(folder):
    rows = rows_of(folder)
    for number, row in enumerate(rows):
        row["label"] = ("No Finding", "effusion|mass", "effusion|fracture")[number // 2 % 3]
    table(folder / "labels.csv", rows)
    options = Options(folder, label_separator="|", rename={"No Finding": ""}, classes=("mass", "effusion"))
    result = build_index(options)
    manifest = Manifest.read(folder / "manifest.json")
    assert manifest.multi_label
    assert [images_of(manifest)[f"images/{number}.png"].label for number in (0, 2, 4)] == [
        (),
        ("effusion", "mass"),
        ("effusion",),
    ]
    assert result.warnings == ["findings that are not among --classes were dropped from their cases: fracture (8)"]


def test_unreadable_images_are_left_out_and_told(folder):
    (folder / "images" / "3.png").write_bytes((folder / "images" / "3.png").read_bytes()[:60])
    (folder / "images" / "4.png").unlink()
    picture(folder / "images" / "unlisted.png", 99)
    result = build_index(Options(folder))
    assert len(images_of(result.manifest)) == 22
    reasons = {name: reason for reason, names in result.left_out.items() for name in names}
    assert reasons.keys() == {"images/3.png", "images/4.png", "images/unlisted.png"}
    assert "damaged image" in reasons["images/3.png"]
    assert str(folder) not in reasons["images/3.png"]
    assert reasons["images/4.png"] == "no such file"
    assert reasons["images/unlisted.png"] == "not in labels.csv"


def test_duplicates_are_left_out(folder):
    rows = rows_of(folder)
    for copy, original in ((1, 0), (5, 2), (7, 6)):
        (folder / "images" / f"{copy}.png").write_bytes((folder / "images" / f"{original}.png").read_bytes())
    rows.append(rows[10])
    rows[7]["label"] = "normal"
    table(folder / "labels.csv", rows)
    result = build_index(Options(folder))
    assert result.left_out == {
        "a duplicate of another image": ["images/1.png", "images/10.png"],
        "the same image has two different labels or patients": [f"images/{n}.png" for n in (2, 5, 6, 7)],
    }
    assert "images/10.png" in images_of(result.manifest)


def test_too_many_unreadable_images_are_refused(folder):
    for number in range(13):
        (folder / "images" / f"{number}.png").write_text("no image")
    before = listing(folder)
    refused(Options(folder), Reason.UNREADABLE_IMAGES, "13 of 24 images are missing or can't be read: 13 x is no DICOM")
    assert listing(folder) == before


def test_no_usable_case_is_refused(folder):
    refused(Options(folder, classes=("mass",)), Reason.TOO_FEW_CASES, "no usable case: 12 x the class normal is not")
    (folder / "labels.csv").write_text("file,label,patient_id\n")
    refused(Options(folder), Reason.TOO_FEW_CASES, "24 x not in labels.csv")


def test_one_class_is_refused(folder):
    table(folder / "labels.csv", [row | {"label": "normal"} for row in rows_of(folder)])
    refused(Options(folder), Reason.ONE_CLASS, "all 24 usable cases are 'normal'; a classifier needs two classes")
    assert not (folder / "manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"columns": {"image": "path"}},
            "has no column 'path' (it has file, patient_id, label); name it with --i",
        ),
        (
            {"columns": {"age_group": "age"}},
            "has no column 'age' (it has file, patient_id, label); name it with --a",
        ),
        ({"patient_regex": "("}, "--patient-regex (: "),
        ({"patient_regex": "P"}, "put the part that is the patient in (parentheses)"),
        ({"match": "Nothing"}, "--match Nothing: no DICOM keyword"),
        ({"fractions": (0.5, 0.1, 0.1)}, "fractions 0.5, 0.1, 0.1: give three shares"),
    ],
)
def test_wrong_option_is_refused_by_name(folder, changes, text):
    before = listing(folder)
    with pytest.raises(FedImagingError) as caught:
        build_index(Options(folder, **changes))
    assert text in str(caught.value)
    assert listing(folder) == before


def test_csv_that_is_none(folder, tmp_path):
    refused(Options(tmp_path / "nowhere"), Reason.NO_DATASET, "no such folder or file")
    refused(Options(folder, labels=tmp_path / "no.csv"), Reason.NO_DATASET, "can't read the labels: No such file")
    (folder / "labels.csv").write_bytes(b"file,label\n\xff\n")
    refused(Options(folder), Reason.BAD_MANIFEST, "is not UTF-8 text")


def test_without_a_patient_column_the_patient_comes_from_the_name(folder):
    rows = [{"file": row["file"], "label": row["label"]} for row in rows_of(folder)]
    table(folder / "labels.csv", rows)
    refused(Options(folder), Reason.TOO_FEW_CASES, "24 x no patient; give --patient-column or --patient-regex")
    manifest = build_index(Options(folder, patient_regex=r"(\d+)\.png$")).manifest
    assert images_of(manifest)["images/7.png"].patient == "7"


def test_paths_of_the_csv_that_leave_the_folder(folder):
    picture(folder.parent / "outside.png", 99)
    rows = rows_of(folder)
    rows[0]["file"] = "../outside.png"
    rows[1]["file"] = str(folder.parent / "outside.png")
    rows[2]["file"] = str(folder / "images" / "2.png")
    table(folder / "labels.csv", rows)
    result = build_index(Options(folder))
    assert len(result.left_out["its path leaves the folder"]) == 2
    assert "images/2.png" in images_of(result.manifest)


def test_file_name_without_folder_or_ending(folder):
    rows = [row | {"file": row["file"].removeprefix("images/").removesuffix(".png")} for row in rows_of(folder)]
    table(folder / "labels.csv", rows)
    picture(folder / "other" / "5.png", 99)
    result = build_index(Options(folder))
    assert len(images_of(result.manifest)) == 23
    assert result.left_out["several files have this name"] == ["5"]


def test_images_elsewhere_need_copy(folder, tmp_path):
    out = tmp_path / "root" / "hospital-a" / "chest_xray" / "manifest.json"
    refused(Options(folder, out=out), Reason.BAD_SETTING, "give --copy or leave out --out")
    assert not (tmp_path / "root").exists()
    before = listing(folder)
    manifest = build_index(Options(folder, out=out, copy=True)).manifest
    manifest.check_files(out.parent)
    assert listing(folder) == before
    assert len(images_of(manifest)) == 24
    again = build_index(Options(folder, out=out, copy=True))
    assert again.kept_patients == 12


def test_copy_works_where_links_do_not(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    out = tmp_path / "root" / "manifest.json"
    build_index(Options(folder, out=out, copy=True)).manifest.check_files(out.parent)
    assert (out.parent / "images" / "0.png").read_bytes() == (folder / "images" / "0.png").read_bytes()


def test_failed_copy_leaves_nothing(folder, tmp_path, monkeypatch):
    copied = []

    def full(source, target):
        copied.append(target)
        target.write_bytes(b"half")
        if len(copied) > 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(shutil, "copyfile", full)
    refused(Options(folder, out=tmp_path / "a" / "b" / "m.json", copy=True), Reason.NO_DISK_SPACE, "No space left")
    assert not (tmp_path / "a").exists()


def test_another_file_of_the_same_name_is_not_overwritten(folder, tmp_path):
    other = picture(tmp_path / "root" / "images" / "9.png", 1000)
    before = other.read_bytes()
    out = tmp_path / "root" / "manifest.json"
    refused(Options(folder, out=out, copy=True), Reason.BAD_SETTING, "another file of this name exists")
    assert other.read_bytes() == before
    assert listing(tmp_path / "root") == ["images", "images/9.png"]


def test_links_out_of_the_folder_need_copy(folder, tmp_path):
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").mkdir()
    for number in range(24):
        (folder / "images" / f"{number}.png").symlink_to(tmp_path / "elsewhere" / f"{number}.png")
    refused(Options(folder), Reason.TOO_FEW_CASES, "24 x a link out of the manifest's folder; give --copy")
    out = tmp_path / "root" / "manifest.json"
    build_index(Options(folder, out=out, copy=True)).manifest.check_files(out.parent)


def test_failure_keeps_the_old_manifest(folder):
    build_index(Options(folder))
    before = (folder / "manifest.json").read_bytes()
    table(folder / "labels.csv", [row | {"label": "normal"} for row in rows_of(folder)])
    refused(Options(folder), Reason.ONE_CLASS, "a classifier needs two classes")
    assert (folder / "manifest.json").read_bytes() == before


@pytest.fixture
def study(tmp_path):
    """16 DICOM files of 8 patients and accession numbers, without endings, and labels by accession number."""
    source = tmp_path / "dicom"
    rows = []
    for number in range(16):
        tags = {"PatientID": f"D{number // 2}", "AccessionNumber": f"A{number // 2}", "PatientSex": "F"}
        tags |= {"PatientAge": "061Y", "Manufacturer": "ACME", "ViewPosition": "PA"}
        dicom(source / f"PAT{number // 2}" / f"IM{number}", number, **tags)
        if number % 2 == 0:
            rows.append({"accession": f"A{number // 2}", "label": LABELS[number // 4 % 2]})
    return source, table(tmp_path / "findings.csv", rows)


def test_dicom_by_accession_number(study):
    source, labels = study
    options = Options(source, labels=labels, match="AccessionNumber", columns={"image": "accession"})
    manifest = build_index(options).manifest
    assert manifest.modality == "CR"
    cases = images_of(manifest)
    assert len(cases) == 16
    case = cases["PAT3/IM7"]
    assert (case.patient, case.label) == ("D3", "pneumonia")
    assert (case.age_group, case.sex, case.vendor, case.view) == ("60-79", "F", "ACME", "PA")


def test_dicom_by_file_name_and_with_bad_files(study, tmp_path):
    source, _ = study
    rows = [{"file": f"IM{number}", "label": LABELS[number // 4 % 2]} for number in range(16)]
    multi_frame = pydicom.dcmread(source / "PAT7" / "IM15")
    multi_frame.NumberOfFrames, multi_frame.PixelData = 2, multi_frame.PixelData * 2
    multi_frame.save_as(source / "PAT7" / "IM15")
    nobody = pydicom.dcmread(source / "PAT7" / "IM14")
    nobody.PatientID = ""
    nobody.save_as(source / "PAT7" / "IM14")
    result = build_index(Options(source, labels=table(tmp_path / "files.csv", rows)))
    reasons = {names[0]: reason for reason, names in result.left_out.items()}
    assert reasons["PAT7/IM15"].startswith("is multi-frame (2 frames)")
    assert reasons["PAT7/IM14"].startswith("no patient;")
    assert len(images_of(result.manifest)) == 14


def test_accession_number_without_a_file(study, tmp_path):
    source, _ = study
    rows = [{"accession": f"A{number}", "label": LABELS[number % 2]} for number in range(9)]
    labels = table(tmp_path / "more.csv", rows)
    options = Options(source, labels=labels, match="AccessionNumber", columns={"image": "accession"})
    assert build_index(options).left_out == {"no DICOM file with this AccessionNumber": ["A8"]}


def test_folder_per_class(tmp_path):
    for number in range(20):
        picture(tmp_path / "x" / LABELS[number % 2] / f"P{number // 4}_{number}.png", number)
    result = build_index(Options(tmp_path / "x"))
    cases = images_of(result.manifest)
    assert cases["pneumonia/P0_1.png"].label == "pneumonia"
    assert cases["pneumonia/P0_1.png"].patient == "P0_1"
    assert "each image counts as a patient of its own" in result.warnings[0]
    result = build_index(Options(tmp_path / "x", patient_regex="([^/_]+)_[^/]*$", keep=False))
    assert images_of(result.manifest)["pneumonia/P0_1.png"].patient == "P0"
    assert result.warnings == []


def test_folder_without_anything(tmp_path):
    (tmp_path / "x").mkdir()
    refused(Options(tmp_path / "x"), Reason.NO_DATASET, "holds neither labels.csv nor a folder of images per class")


def arrays(path, columns=1, **more):
    content: dict[str, Any] = {}
    for number, split in enumerate(("train", "val", "test")):
        labels = np.arange(8 * columns).reshape(8, columns) % 2
        content |= {f"{split}_images": np.stack([pixels(number * 8 + k) for k in range(8)]), f"{split}_labels": labels}
    np.savez(path, **content | more)
    return path


def test_arrays_are_unpacked(tmp_path):
    source = arrays(tmp_path / "pneumoniamnist.npz")
    options = Options(source, rename={"0": "normal", "1": "pneumonia"})
    manifest = build_index(options).manifest
    folder = tmp_path / "pneumoniamnist"
    assert Manifest.read(folder / "manifest.json") == manifest
    assert [len(manifest.split(split)) for split in SPLITS] == [8, 8, 8]
    assert manifest.class_counts("test") == {"normal": 4, "pneumonia": 4}
    assert np.array_equal(np.asarray(Image.open(folder / "images" / "validation_000002.png")), pixels(10))
    assert sorted(path.name for path in folder.iterdir()) == ["images", "manifest.json"]


def test_arrays_with_several_labels(tmp_path):
    source = arrays(tmp_path / "chest.npz", columns=2, val_labels=np.zeros((8, 2), int))
    manifest = build_index(Options(source, out=tmp_path / "out" / "manifest.json")).manifest
    assert manifest.multi_label
    assert {case.label for case in manifest.training} == {("1",)}
    assert {case.label for case in manifest.validation} == {()}


@pytest.mark.parametrize(
    "changes", [{"train_labels": np.zeros((3, 1))}, {"val_images": np.zeros((8, 4, 4))}, {"test_labels": object()}]
)
def test_wrong_arrays_are_refused(tmp_path, changes):
    source = arrays(tmp_path / "chest.npz", **changes)
    refused(Options(source), Reason.UNREADABLE_IMAGES, "can't unpack the arrays")
    assert not (tmp_path / "chest").exists()


def test_files_that_are_no_arrays_are_refused(tmp_path):
    (tmp_path / "a.npz").write_text("no arrays")
    refused(Options(tmp_path / "a.npz"), Reason.UNREADABLE_IMAGES, "can't unpack the arrays")
    np.savez(tmp_path / "b.npz", images=np.zeros(3))
    refused(Options(tmp_path / "b.npz"), Reason.NO_DATASET, "holds no train_images, val_images or test_images")
    assert not (tmp_path / "b").exists()


def run(*arguments):
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    args = parser.parse_args(["index", *map(str, arguments)])
    args.run(args)


def test_command_writes_the_manifest_and_prints_the_table(folder, capsys):
    (folder / "images" / "3.png").unlink()
    rename = ("--rename", "pneumonia=infiltrate")
    run(folder, "--classes", "infiltrate,normal", *rename, "--fractions", "0.5,0.25,0.25", "--name", "chest")
    data = json.loads((folder / "manifest.json").read_text())
    assert (data["name"], data["classes"]) == ("chest", ["infiltrate", "normal"])
    assert data["made"]["fractions"] == [0.5, 0.25, 0.25]
    printed = capsys.readouterr().out
    for word in ("training", "validation", "test", "patients", "infiltrate", "left out 1", "no such file"):
        assert word in printed


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--fractions", "most"), "--fractions most: write three numbers"),
        (("--rename", "COVID-19"), "--rename COVID-19: write OLD=NEW"),
    ],
)
def test_command_refuses_wrong_options(folder, arguments, text):
    with pytest.raises(FedImagingError) as caught:
        run(folder, *arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize("hospital", ["nih", "spain"])
def test_real_hospital(shared_data, tmp_path, monkeypatch, hospital):
    monkeypatch.setattr(os, "link", no_links)  # so that nothing can change the shared files
    source = shared_data / "chest_xray" / hospital
    out = tmp_path / hospital / "chest_xray" / "manifest.json"
    rename = {"COVID-19": "pneumonia"}
    result = build_index(Options(source, out=out, copy=True, classes=LABELS, rename=rename))
    manifest = Manifest.read(out)
    manifest.check_files(out.parent)
    rows = rows_of(source)
    left_out = sum(map(len, result.left_out.values()))
    assert set(result.left_out) <= {"a duplicate of another image"}
    assert len(images_of(manifest)) == len(rows) - left_out
    assert left_out <= 0.01 * len(rows)
    assert len(manifest.assignments()) == len({row["patient_id"] for row in rows})
    assert all(manifest.class_counts(split)[name] >= 2 for split in SPLITS for name in LABELS)
    index.show(result, Console(quiet=True))
