"""`data index` of volumes with masks: the Decathlon layout, pairs by name, DICOM series, and what is left out."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from rich.console import Console

from fedimaging.cli import main
from fedimaging.datasets.index import Options, build_index, show
from fedimaging.datasets.manifest import SPLITS, Manifest
from fedimaging.datasets.volumes import read_label, read_volume
from fedimaging.errors import FedImagingError, Reason

SHAPE = (6, 7, 5)
CLASSES = ("liver", "tumour")


def nifti(path, values, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(values, np.eye(4) if affine is None else affine).to_filename(path)
    return path


def image(path, seed, affine=None):
    return nifti(path, np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32), affine)


def mask(path, *values, affine=None):
    """A mask with a voxel of each value."""
    labels = np.zeros(SHAPE, np.int16)
    labels.ravel()[: len(values)] = values
    return nifti(path, labels, affine)


def series(folder, seed, patient="", slices=SHAPE[2]):
    """An axial CT series whose voxels lie where a mask with `FLIPPED` as its affine has them."""
    folder.mkdir(parents=True)
    uid = generate_uid()
    for number in range(slices):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = CTImageStorage, generate_uid(), uid
        data.Modality, data.PatientID, data.PatientSex, data.Manufacturer = "CT", patient, "F", "Vendor A"
        data.PhotometricInterpretation, data.SamplesPerPixel = "MONOCHROME2", 1
        data.Rows, data.Columns = SHAPE[1], SHAPE[0]
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 0
        data.RescaleIntercept, data.RescaleSlope = "-1024", "1"
        data.PixelSpacing, data.ImageOrientationPatient = [1, 1], [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = [0, 0, number]
        pixels = np.random.default_rng((seed, number)).integers(0, 2000, (SHAPE[1], SHAPE[0]), dtype=np.uint16)
        data.PixelData = pixels.tobytes()
        data.save_as(folder / f"IM{number}", enforce_file_format=True)
    return folder


FLIPPED = np.diag([-1.0, -1.0, 1.0, 1.0])


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def cases_of(manifest):
    return {case.image: case for split in SPLITS for case in manifest.split(split)}


def refused(options, reason, text):
    with pytest.raises(FedImagingError) as caught:
        build_index(options)
    assert caught.value.reason is reason
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


LABELS = {"0": "background", "1": "liver", "2": "tumour"}


def describe(folder, count=12, **changes):
    entries = [{"image": f"./imagesTr/c{n:02}.nii.gz", "label": f"./labelsTr/c{n:02}.nii.gz"} for n in range(count)]
    content = {"modality": {"0": "MRI"}, "labels": LABELS, "training": entries, "test": ["./imagesTs/c99.nii.gz"]}
    (folder / "dataset.json").write_text(json.dumps(content | changes))


@pytest.fixture
def decathlon(tmp_path):
    """12 pairs with dataset.json; every second mask has no tumour."""
    folder = tmp_path / "organs"
    for number in range(12):
        image(folder / "imagesTr" / f"c{number:02}.nii.gz", number)
        mask(folder / "labelsTr" / f"c{number:02}.nii.gz", *((1,), (1, 2))[number % 2])
    describe(folder)
    return folder


def test_decathlon_layout(decathlon):
    result = build_index(Options(decathlon))
    manifest = Manifest.read(decathlon / "manifest.json")
    assert manifest == result.manifest
    assert (manifest.name, manifest.modality, manifest.task) == ("organs", "MR", "segmentation")
    assert manifest.classes == list(CLASSES) and manifest.made["empty_masks"] == 0
    case = cases_of(manifest)["imagesTr/c07.nii.gz"]
    assert (case.label, case.patient) == ("labelsTr/c07.nii.gz", "c07")
    assert len(cases_of(manifest)) == 12 and result.left_out == {}
    assert result.warnings[0] == "1 images of the list 'test' have no masks and are not used"
    manifest.check_files(decathlon)
    for case in cases_of(manifest).values():
        read_label(decathlon / case.label, read_volume(decathlon / case.image), 2)


def test_splits_are_balanced_by_what_the_masks_hold(decathlon):
    manifest = build_index(Options(decathlon, fractions=(0.5, 0.25, 0.25))).manifest
    for split in SPLITS:
        with_tumour = [case for case in manifest.split(split) if int(case.patient[1:]) % 2]
        assert 2 * len(with_tumour) == pytest.approx(len(manifest.split(split)), abs=1)


def test_structures_can_be_renamed(decathlon):
    assert build_index(Options(decathlon, rename={"tumour": "lesion"})).manifest.classes == ["liver", "lesion"]
    assert build_index(Options(decathlon, classes=("a", "b"))).manifest.classes == ["a", "b"]
    refused(
        Options(decathlon, classes=("a",)), Reason.BAD_SETTING, "--classes names 1 structures, but dataset.json has 2"
    )
    refused(Options(decathlon, rename={"tumour": "liver"}), Reason.BAD_SETTING, "classes liver, liver: give 1 to 255")


def test_bad_cases_are_left_out_and_told(decathlon):
    images, labels = decathlon / "imagesTr", decathlon / "labelsTr"
    content = bytearray((images / "c00.nii.gz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (images / "c00.nii.gz").write_bytes(content)
    moved = np.eye(4)
    moved[0, 3] = 3
    mask(labels / "c01.nii.gz", 1, affine=moved)
    mask(labels / "c02.nii.gz", 1, 2, 3)
    mask(labels / "c03.nii.gz")
    (labels / "c04.nii.gz").unlink()
    result = build_index(Options(decathlon))
    reasons = {name: reason for reason, names in result.left_out.items() for name in names}
    assert reasons.pop("imagesTr/c00.nii.gz").startswith("damaged NIfTI file")
    assert reasons.pop("imagesTr/c01.nii.gz") == (
        "its mask labelsTr/c01.nii.gz: lies 3 mm from imagesTr/c01.nii.gz by its affine; give the mask that was drawn "
        "on this image, of the same patient"
    )
    assert reasons.pop("imagesTr/c02.nii.gz").startswith(
        "its mask: has the value 3, but labels are whole numbers from 0"
    )
    assert reasons.pop("imagesTr/c03.nii.gz").startswith("its mask: empty mask")
    assert reasons.pop("./imagesTr/c04.nii.gz") == "its mask: no such file"
    assert reasons == {}
    assert len(cases_of(result.manifest)) == 7
    assert str(decathlon) not in (decathlon / "manifest.json").read_text()
    show(result, Console(quiet=True))
    manifest = build_index(Options(decathlon, allow_empty=True)).manifest
    assert "imagesTr/c03.nii.gz" in cases_of(manifest) and manifest.made["empty_masks"] == 1


def test_too_many_bad_cases_are_refused(decathlon):
    for number in range(7):
        mask(decathlon / "labelsTr" / f"c{number:02}.nii.gz", 7)
    before = listing(decathlon)
    refused(Options(decathlon), Reason.UNREADABLE_IMAGES, "7 of 12 images are missing or can't be read: 7 x its mask")
    assert listing(decathlon) == before


def test_the_same_image_twice(decathlon):
    shutil.copyfile(decathlon / "imagesTr" / "c01.nii.gz", decathlon / "imagesTr" / "c03.nii.gz")
    volume = nib.load(decathlon / "imagesTr" / "c04.nii.gz")
    nib.Nifti1Image(volume.get_fdata().astype(np.float32), volume.affine).to_filename(
        decathlon / "imagesTr" / "c05.nii.gz"
    )
    result = build_index(Options(decathlon))
    assert result.left_out == {
        "a duplicate of another image": ["imagesTr/c03.nii.gz"],
        "the same image has two different labels or patients": ["imagesTr/c04.nii.gz", "imagesTr/c05.nii.gz"],
    }


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"labels": {"0": "background", "1": "a", "4": "b"}},
            "'labels' must name the values 0 (background), 1, 2, ...",
        ),
        ({"labels": {"0": "background"}}, "'labels' must name"),
        ({"labels": ["a", "b"]}, "'labels' must name"),
        ({"training": None}, "has no list 'training'"),
        ({"training": [{"image": "a"}]}, "training[0] is not an object with the texts 'image' and 'label'"),
    ],
)
def test_wrong_dataset_json_is_refused(decathlon, changes, text):
    describe(decathlon, **changes)
    refused(Options(decathlon), Reason.BAD_MANIFEST, text)
    (decathlon / "dataset.json").write_text("{")
    refused(Options(decathlon), Reason.BAD_MANIFEST, "can't be read as JSON")


def test_paths_that_leave_the_folder(decathlon):
    entries = json.loads((decathlon / "dataset.json").read_text())["training"]
    image(decathlon.parent / "outside.nii.gz", 99)
    entries[0]["image"] = "../outside.nii.gz"
    describe(decathlon, training=entries)
    assert build_index(Options(decathlon)).left_out == {"its path leaves the folder": ["../outside.nii.gz"]}


def test_pairs_by_suffix_in_one_folder(tmp_path):
    for number in range(8):
        image(tmp_path / "x" / f"p{number}_0000.nii.gz", number)
        mask(tmp_path / "x" / f"p{number}.nii.gz", 1)
    (tmp_path / "x" / "p7.nii.gz").unlink()
    options = Options(tmp_path / "x", image_suffix="_0000.nii.gz", label_suffix=".nii.gz", classes=("liver",))
    result = build_index(options)
    cases = cases_of(result.manifest)
    assert {name: (case.label, case.patient) for name, case in cases.items()} == {
        f"p{n}_0000.nii.gz": (f"p{n}.nii.gz", f"p{n}") for n in range(7)
    }
    assert result.left_out == {"no mask fits its name; see --label-suffix and --masks": ["p7_0000.nii.gz"]}
    assert result.manifest.modality == "MR"


def test_pairs_where_masks_end_longer_than_images(tmp_path):
    for number in range(8):
        image(tmp_path / "x" / f"p{number}" / "t1.nii.gz", number)
        mask(tmp_path / "x" / f"p{number}" / "t1_seg.nii.gz", 1)
    result = build_index(Options(tmp_path / "x", label_suffix="_seg.nii.gz", classes=("liver",)))
    cases = cases_of(result.manifest)
    assert cases["p3/t1.nii.gz"].label == "p3/t1_seg.nii.gz" and len(cases) == 8
    assert cases["p3/t1.nii.gz"].patient == "p3/t1"  # t1 is no name of a patient where all images have it
    by_name = build_index(Options(tmp_path / "x", label_suffix="_seg.nii.gz", classes=("a",), patient_regex="^(p.)/"))
    assert cases_of(by_name.manifest)["p3/t1.nii.gz"].patient == "p3"


def test_pairs_in_separate_folders(tmp_path):
    root = tmp_path / "x"
    for number in range(8):
        image(root / "scans" / f"p{number}.nii.gz", number)
        mask(root / "masks" / f"p{number}.nii.gz", 1)
    mask(root / "masks" / "extra.nii.gz", 1)
    result = build_index(Options(root, masks=root / "masks", classes=("liver",)))
    cases = cases_of(result.manifest)
    assert {name: case.label for name, case in cases.items()} == {
        f"scans/p{n}.nii.gz": f"masks/p{n}.nii.gz" for n in range(8)
    }
    assert "1 masks belong to no image and are not used" in result.warnings
    apart = Options(root / "scans", masks=root / "masks", classes=("liver",))
    refused(apart, Reason.BAD_SETTING, "does not hold the images, which lie in")
    out = tmp_path / "out" / "manifest.json"
    copied = build_index(Options(root / "scans", masks=root / "masks", classes=("liver",), out=out, copy=True)).manifest
    assert cases_of(copied)["p2.nii.gz"].label == "masks/p2.nii.gz"
    copied.check_files(out.parent)


def test_one_mask_for_two_images_is_no_pair(tmp_path):
    for number in range(6):
        image(tmp_path / "x" / "a" / f"p{number}.nii.gz", number)
        mask(tmp_path / "masks" / f"p{number}.nii.gz", 1)
    image(tmp_path / "x" / "b" / "p5.nii.gz", 99)
    options = Options(tmp_path / "x", masks=tmp_path / "masks", classes=("a",), out=tmp_path / "o.json", copy=True)
    assert build_index(options).left_out == {"its mask is that of another image too": ["a/p5.nii.gz", "b/p5.nii.gz"]}


@pytest.mark.parametrize("place", ["{}.nii.gz", "{}/mask.nii.gz", "patients/{}/mask.nii.gz"])
def test_dicom_series_with_masks(tmp_path, place):
    root = tmp_path / "ct"
    for number in range(8):
        series(root / ("patients/{}/dicom" if "patients" in place else "{}").format(f"s{number}"), number, f"P{number}")
        mask(root / place.format(f"s{number}"), 1, affine=FLIPPED)
    result = build_index(Options(root, task="segmentation", classes=("liver",)))
    assert result.left_out == {} and result.warnings == []
    assert result.manifest.modality == "CT"
    case = next(case for case in cases_of(result.manifest).values() if case.patient == "P3")
    assert (case.sex, case.vendor, case.label) == ("F", "Vendor A", place.format("s3"))
    volume = read_volume(root / case.image)
    assert read_label(root / case.label, volume, 1).sum() == 1
    result.manifest.check_files(root)


def test_copied_series_are_complete_and_only_theirs(tmp_path):
    for number in range(6):
        folder = series(tmp_path / "ct" / f"s{number}", number, f"P{number}")
        mask(folder / "mask.nii.gz", 1, affine=FLIPPED)
        (folder / "report.txt").write_text("confidential")
    out = tmp_path / "root" / "ct" / "manifest.json"
    before = listing(tmp_path / "ct")
    manifest = build_index(Options(tmp_path / "ct", task="segmentation", classes=("a",), out=out, copy=True)).manifest
    assert listing(tmp_path / "ct") == before
    assert [path.name for path in sorted((out.parent / "s2").iterdir())] == [
        *(f"IM{n}" for n in range(5)),
        "mask.nii.gz",
    ]
    np.testing.assert_array_equal(read_volume(out.parent / "s2").array, read_volume(tmp_path / "ct" / "s2").array)
    manifest.check_files(out.parent)
    (out.parent / "s2" / "IM0").unlink()
    (out.parent / "s2" / "IM0").symlink_to(tmp_path / "ct" / "s2" / "IM0")
    with pytest.raises(FedImagingError, match="'s2/IM0' is a link out of the manifest's folder"):
        manifest.check_files(out.parent)
    shutil.rmtree(out.parent / "s3")
    with pytest.raises(FedImagingError, match=r"does not exist|is a link"):
        manifest.check_files(out.parent)


def test_series_with_a_gap_is_left_out(tmp_path):
    for number in range(6):
        series(tmp_path / "ct" / f"s{number}", number, f"P{number}")
        mask(tmp_path / "ct" / f"s{number}.nii.gz", 1, affine=FLIPPED)
    (tmp_path / "ct" / "s1" / "IM2").unlink()
    result = build_index(Options(tmp_path / "ct", task="segmentation", classes=("a",)))
    (reason,) = result.left_out
    assert result.left_out[reason] == ["s1"] and reason.startswith("a gap of 2 mm between IM1 and IM3")


def test_wrong_options_are_refused_by_name(tmp_path, decathlon):
    image(tmp_path / "x" / "a.nii.gz", 1)
    refused(
        Options(tmp_path / "x", task="segmentation"), Reason.BAD_SETTING, "give --classes with the names of the values"
    )
    options = Options(tmp_path / "x", task="segmentation", classes=("a",), image_suffix="_0000.nii.gz")
    refused(options, Reason.NO_DATASET, "no NIfTI image whose name ends in _0000.nii.gz")
    refused(
        Options(tmp_path / "x", masks=tmp_path / "no", classes=("a",)), Reason.NO_DATASET, "no such folder of masks"
    )
    refused(Options(decathlon, task="detection"), Reason.BAD_SETTING, "--task detection: choose from classification")
    options = Options(decathlon, task="segmentation", labels=tmp_path / "a.csv")
    refused(options, Reason.BAD_SETTING, "is for classification; leave it out")
    refused(
        Options(decathlon, task="classification"), Reason.NO_DATASET, "holds neither labels.csv nor a folder of images"
    )


def test_command(decathlon, capsys):
    assert main(["data", "index", str(decathlon), "--fractions", "0.5,0.25,0.25", "--rename", "tumour=lesion"]) == 0
    printed = capsys.readouterr().out
    assert "structures: liver, lesion; empty masks: 0" in printed
    assert main(["data", "index", str(decathlon), "--task", "segmentation", "--masks", str(decathlon / "no")]) == 2


def test_real_hippocampus(shared_data):
    source = shared_data / "hippocampus"
    before = listing(source)
    with pytest.raises(FedImagingError, match=r"--copy|can't be written"):
        build_index(Options(source, out=source.parent.parent.parent / "x" / "manifest.json"))
    assert listing(source) == before
