"""Reading volumes: DICOM series against SimpleITK, NIfTI against nibabel, and what must be refused."""

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (the name that its own documentation gives it)
from nibabel.orientations import axcodes2ornt, ornt_transform
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    MRImageStorage,
    RLELossless,
    generate_uid,
)

from fedimaging.datasets.images import Path
from fedimaging.datasets.volumes import Volume, read_label, read_volume, series_files
from fedimaging.errors import FedImagingError, Reason

TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


def rotation(degrees, axis):
    a, c, s = axis / np.linalg.norm(axis), np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    cross = np.array([[0, -a[2], a[1]], [a[2], 0, -a[0]], [-a[1], a[0], 0]])
    return c * np.eye(3) + s * cross + (1 - c) * np.outer(a, a)


ORIENTATIONS = {
    "axial": np.eye(3),
    "coronal": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]).T,
    "sagittal": np.array([[0, 1, 0], [0, 0, -1], [-1, 0, 0]]).T,
    "oblique": rotation(25, np.array([1.0, 2.0, -0.5])),
    "feet first": np.diag([-1.0, 1.0, -1.0]),
}
"""Columns: where the column index, the row index and the slice index grow to, in LPS+."""


def series(folder, axes=None, *, shape=(5, 12, 10), modality="MR", spacing=(0.8, 1.1, 2.5), changes=None, **both):
    """Writes a DICOM series of 16 bit slices under shuffled names. `changes`: slice number -> its own elements."""
    axes = np.eye(3) if axes is None else axes
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 2000, shape, dtype=np.uint16)
    folder.mkdir(parents=True, exist_ok=True)
    uid, frame = generate_uid(), generate_uid()
    for number, name in enumerate(rng.permutation(len(stored))):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
        data.SOPInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = generate_uid(), uid, frame
        data.Modality, data.PatientID, data.InstanceNumber = modality, "P1", int(name) + 1
        data.PhotometricInterpretation, data.SamplesPerPixel = "MONOCHROME2", 1
        data.Rows, data.Columns = shape[1:]
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 0
        data.PixelSpacing = [f"{spacing[1]:.6f}", f"{spacing[0]:.6f}"]
        data.SliceThickness = spacing[2]
        data.ImageOrientationPatient = [f"{value:.10f}" for value in axes[:, :2].T.ravel()]
        position = np.array([-40.0, 31.5, 12.25]) + axes[:, 2] * spacing[2] * number
        data.ImagePositionPatient = [f"{value:.8f}" for value in position]
        data.PixelData = stored[number].tobytes()
        for keyword, value in (both | (changes or {}).get(number, {})).items():
            if value is None:
                delattr(data, keyword)
            else:
                setattr(data, keyword, value)
        data.save_as(folder / f"IM{name:04d}.dcm", enforce_file_format=True)
    return folder


def by_simpleitk(folder):
    """Voxels (X, Y, Z) and affine (RAS+ mm) as SimpleITK orders them."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T.astype(np.float64), TO_RAS @ affine


def assert_same(volume, values, affine):
    """The volume holds these voxels at these places, in whatever order they are."""
    reference = nib.as_closest_canonical(nib.Nifti1Image(values, affine))
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert volume.array.dtype == np.float32 and volume.array.flags.c_contiguous
    np.testing.assert_allclose(volume.array[0], reference.get_fdata(), rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(volume.affine, reference.affine, atol=1e-4)


def refused(path, text, reason=Reason.UNREADABLE_IMAGES, read=read_volume):
    with pytest.raises(FedImagingError) as caught:
        read(path)
    assert caught.value.reason is reason
    message = str(caught.value)
    assert text in message and str(path) in message and "\n" not in message


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_series_is_what_simpleitk_reads(tmp_path, name):
    folder = series(tmp_path / "series", ORIENTATIONS[name])
    volume = read_volume(folder)
    assert_same(volume, *by_simpleitk(folder))
    assert volume.modality == "MR" and volume.path == folder
    assert sorted(volume.spacing) == pytest.approx([0.8, 1.1, 2.5], abs=1e-5)


def test_hounsfield_units_are_kept(tmp_path):
    folder = series(tmp_path / "ct", modality="CT", RescaleSlope="1", RescaleIntercept="-1024", RescaleType="HU")
    volume = read_volume(folder)
    assert_same(volume, *by_simpleitk(folder))
    assert volume.modality == "CT" and volume.array.min() < -1000 and volume.array.max() > 900


def test_each_slice_has_its_own_rescale(tmp_path):
    rescale = {n: {"RescaleSlope": f"{0.5 + n:.1f}", "RescaleIntercept": f"{n}"} for n in range(5)}
    plain, scaled = (read_volume(series(tmp_path / name, changes=c)) for name, c in (("a", None), ("b", rescale)))
    n = np.arange(5)
    np.testing.assert_allclose(scaled.array, plain.array * (0.5 + n) + n, rtol=1e-6)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compressed_series(tmp_path, syntax):
    folder = series(tmp_path / "series", shape=(3, 64, 48))
    plain = read_volume(folder)
    for path in folder.iterdir():
        data = dcmread(path)
        data.compress(syntax)
        data.save_as(path)
    np.testing.assert_array_equal(read_volume(folder).array, plain.array)


def test_window_monochrome1_and_padding_change_no_voxel(tmp_path):
    plain = read_volume(series(tmp_path / "plain"))
    shown = {"WindowCenter": "300", "WindowWidth": "100", "PhotometricInterpretation": "MONOCHROME1"}
    np.testing.assert_array_equal(read_volume(series(tmp_path / "shown", **shown)).array, plain.array)


def test_series_folder_may_hold_other_files(tmp_path):
    folder = series(tmp_path / "series")
    for name in ("label.nii.gz", "notes.txt", ".hidden.dcm", "DICOMDIR"):
        (folder / name).write_bytes(b"\0" * 200)
    (folder / "IM0001.dcm").rename(folder / "1.2.840.113619.77")
    assert len(series_files(folder)) == 5
    assert_same(read_volume(folder), *by_simpleitk(series(tmp_path / "same")))


REAL = {"98892001/CT5N": (), "77654033/CT2": ("17106",)}
"""Folders below dicomdirtests in pydicom's wheel -> files to leave out so that the rest is a volume."""


def wheel():
    return Path(get_testdata_file("DICOMDIR", download=False)).parent


@pytest.mark.parametrize("name", REAL)
def test_real_series_is_what_simpleitk_reads(tmp_path, name):
    for path in (wheel() / name).iterdir():
        if path.name not in REAL[name]:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    volume = read_volume(tmp_path)
    assert volume.modality == "CT" and volume.array.shape[-1] == len(list(tmp_path.iterdir())) > 2
    assert_same(volume, *by_simpleitk(tmp_path))


def test_real_folders_that_are_no_volume():
    refused(wheel() / "98892003" / "MR1", "holds 3 DICOM series; put each series into a folder of its own")
    refused(wheel() / "98892001" / "CT2N", "mixed orientations (6293 and 6924); leave out the localizer")
    refused(wheel() / "98892003" / "MR700", "mixed orientations (4467 and 4528)")
    refused(wheel() / "77654033", "holds no DICOM file")
    refused(wheel() / "77654033" / "CT2", "a gap of 202 mm between 17106 and 17136, where slices lie 1.25 mm apart")
    with pytest.raises(FedImagingError, match="has no PixelSpacing of 2 numbers"):
        read_volume(wheel() / "77654033" / "CR1")


OTHER = {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}


@pytest.mark.parametrize(
    ("changes", "both", "text"),
    [
        ({2: {"SeriesInstanceUID": "1.2.3"}}, {}, "holds 2 DICOM series"),
        ({2: OTHER}, {}, "mixed orientations (IM"),
        ({2: {"Rows": 10, "PixelData": b"\0" * 200}}, {}, "mixed sizes, 10 x 12 and 10 x 10 (IM"),
        ({2: {"PixelSpacing": ["1.0", "0.8"]}}, {}, "mixed PixelSpacing (IM"),
        ({2: {"ImagePositionPatient": [-40, 31.5, 14.75]}}, {}, "two slices at the same position (IM"),
        ({4: {"ImagePositionPatient": [-40, 31.5, 24.75]}}, {}, "a gap of 5 mm between IM"),
        ({4: {"ImagePositionPatient": [-40, 31.5, 22.7]}}, {}, "irregular spacing, 2.95 mm between IM"),
        ({n: {"ImagePositionPatient": [-40, 31.5 + n, 2.5 * n]} for n in range(5)}, {}, "sideways (gantry tilt)"),
        ({2: {"ImagePositionPatient": [-40, 33.5, 17.25]}}, {}, "do not lie on one straight line"),
        ({}, {"ImageOrientationPatient": None}, "has no ImageOrientationPatient of 6 numbers"),
        ({}, {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "not two unit vectors at right angles"),
        ({}, {"PixelSpacing": ["0", "1"]}, "PixelSpacing is not positive"),
        ({3: {"ImagePositionPatient": ["1", "2"]}}, {}, "has no ImagePositionPatient of 3 numbers"),
        ({3: {"NumberOfFrames": 2}}, {}, "is multi-frame; convert it to NIfTI"),
        ({3: {"RescaleSlope": "0", "RescaleIntercept": "0"}}, {}, "has a rescale slope of 0"),
        ({3: {"PixelData": b"\0" * 100}}, {}, "damaged or unsupported DICOM file"),
        ({3: {"Rows": None}}, {}, "is no DICOM image"),
    ],
)
def test_series_that_is_no_volume_is_refused(tmp_path, changes, both, text):
    with pytest.raises(FedImagingError, match=r"^[^\n]+$") as caught:
        read_volume(series(tmp_path / "series", changes=changes, **both))
    assert text in str(caught.value) and str(tmp_path / "series") in str(caught.value)
    assert caught.value.reason is Reason.UNREADABLE_IMAGES


def test_series_of_one_slice_and_without_slices(tmp_path):
    refused(series(tmp_path / "one", shape=(1, 12, 10)), "holds one slice")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "holds no DICOM file")
    refused(tmp_path / "nowhere", "can't be read (No such file or directory)")


def test_colour_slice_is_refused(tmp_path):
    colour = {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3, "PlanarConfiguration": 0,
              "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": bytes(360)}  # fmt: skip
    with pytest.raises(FedImagingError, match="is in colour"):
        read_volume(series(tmp_path / "series", changes={1: colour}))


SHAPE = (7, 9, 11)


def values_of(seed=0, dtype=np.int16, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(dtype)


def nifti(path, values=None, affine=None, *, sform=1, qform=1, kind=nib.Nifti1Image, **fields):
    values = values_of() if values is None else values
    image = kind(values, np.diag([1.0, 1.2, 2.0, 1.0]) if affine is None else affine)
    image.set_sform(image.affine, sform)
    image.set_qform(image.affine, qform)
    for name, value in fields.items():
        image.header[name] = value
    image.to_filename(path)
    return path


def oriented(codes, angle=0.0):
    """An affine whose axes run to `codes`, turned by an angle; voxels of 1 x 1.2 x 2 mm."""
    affine = nib.orientations.inv_ornt_aff(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes)), SHAPE)
    affine = affine @ np.diag([1.0, 1.2, 2.0, 1.0])
    turn = np.eye(4)
    turn[:3, :3] = rotation(angle, np.array([1.0, 0.3, -0.7]))
    affine[:3, 3] = (-12, 30.5, 7)
    return turn @ affine


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "ASR", "SPL", "PIR"])
def test_nifti_is_what_nibabel_reads_in_every_orientation(tmp_path, codes, kind):
    for angle, name in ((0, "a.nii"), (20, "b.nii.gz")):
        path = nifti(tmp_path / name, affine=oriented(codes, angle), kind=kind)
        volume = read_volume(path)
        image = nib.load(path)
        assert_same(volume, image.get_fdata(), image.affine)
        assert volume.modality is None and volume.array.shape[0] == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64, ">i2"])
def test_nifti_voxel_types_and_scaling(tmp_path, dtype):
    values = values_of(dtype=dtype) if dtype != np.uint8 else (values_of() % 256).astype(np.uint8)
    image = nib.Nifti1Image(values, np.eye(4), header=nib.Nifti1Header(endianness=">" if dtype == ">i2" else "<"))
    image.header.set_slope_inter(2.5, -100)
    image.to_filename(tmp_path / "a.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").array[0], nib.load(tmp_path / "a.nii").get_fdata())


def test_nifti_with_one_form_or_other_units(tmp_path):
    affine = oriented("LPS")
    for name, sform, qform in (("s.nii", 2, 0), ("q.nii", 0, 1)):
        np.testing.assert_allclose(
            read_volume(nifti(tmp_path / name, affine=affine, sform=sform, qform=qform)).spacing, (1, 1.2, 2), rtol=1e-5
        )
    path = nifti(tmp_path / "micron.nii", affine=np.diag([1000.0, 1200.0, 2000.0, 1.0]), xyzt_units=3)
    np.testing.assert_allclose(read_volume(path).spacing, (1, 1.2, 2), rtol=1e-5)


def test_nifti_with_a_fourth_axis_of_one(tmp_path):
    path = nifti(tmp_path / "a.nii", values_of(shape=(*SHAPE, 1)))
    assert read_volume(path).array.shape == (1, *SHAPE)


def test_gzip_is_told_by_its_content(tmp_path):
    plain = nifti(tmp_path / "a.nii")
    (tmp_path / "b.nii.gz").write_bytes(plain.read_bytes())
    (tmp_path / "c.nii").write_bytes(gzip.compress(plain.read_bytes()))
    for name in ("b.nii.gz", "c.nii"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).array, read_volume(plain).array)


def with_sform(path, sform):
    """Another sform than the qform, in the file's header."""
    content = bytearray(path.read_bytes())
    content[280:328] = np.asarray(sform, dtype="<f4")[:3].tobytes()
    path.write_bytes(content)
    return path


def test_sform_and_qform_that_disagree(tmp_path):
    flipped = np.diag([-1.0, 1.2, 2.0, 1.0])
    refused(with_sform(nifti(tmp_path / "a.nii"), flipped), "sform and qform disagree by 12 mm")
    rounded = np.diag([1.0, 1.2, 2.0, 1.0])
    rounded[0, 3] = 0.1
    assert read_volume(with_sform(nifti(tmp_path / "b.nii"), rounded)).affine[0, 3] == pytest.approx(0.1)
    unused = with_sform(nifti(tmp_path / "c.nii", sform=0), flipped)
    assert read_volume(unused).spacing == pytest.approx((1, 1.2, 2))


def test_nifti_without_orientation_or_with_a_bad_affine(tmp_path):
    refused(nifti(tmp_path / "none.nii", sform=0, qform=0), "has neither sform nor qform")
    flat = np.diag([1.0, 0.0, 2.0, 1.0])
    refused(with_sform(nifti(tmp_path / "flat.nii", qform=0), flat), "has an affine (sform) that is not invertible")
    same = np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    refused(with_sform(nifti(tmp_path / "same.nii", qform=0), same), "that is not invertible")
    nan = np.full((4, 4), np.nan)
    refused(with_sform(nifti(tmp_path / "nan.nii", qform=0), nan), "that is not invertible")


def test_nifti_of_the_wrong_kind(tmp_path):
    refused(nifti(tmp_path / "4d.nii.gz", values_of(shape=(4, 5, 6, 3))), "is 4D (4 x 5 x 6 x 3), but a case is one 3D")
    refused(nifti(tmp_path / "2d.nii.gz", values_of(shape=(4, 5))), "has 2 dimensions, not 3")
    refused(nifti(tmp_path / "0.nii", np.zeros((4, 0, 5), np.int16)), "has 4 x 0 x 5 voxels; at least 1")
    rgb = np.zeros((3, 4, 5), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    refused(nifti(tmp_path / "rgb.nii", rgb), "colour or complex")
    refused(nifti(tmp_path / "complex.nii", np.zeros((3, 4, 5), np.complex64)), "colour or complex")
    bad = values_of(dtype=np.float32)
    bad[1, 2, 3], bad[2, 2, 2] = np.nan, np.inf
    refused(nifti(tmp_path / "nan.nii.gz", bad), "has 2 voxels that are not finite numbers")
    nib.Nifti1Pair(values_of(), np.eye(4)).to_filename(tmp_path / "pair.img")
    refused(tmp_path / "pair.hdr", "is the header of a pair")


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG" + bytes(600), bytes(1000), b"\x1f\x8b"])
def test_what_is_no_nifti(tmp_path, content):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(content)
    refused(path, "damaged NIfTI file" if content == b"\x1f\x8b" else "is not a NIfTI file")


def test_huge_header_is_refused_before_memory_is_taken(tmp_path):
    path = nifti(tmp_path / "a.nii")
    content = bytearray(path.read_bytes())
    content[40:56] = struct.pack("<8h", 3, 32000, 32000, 32000, 1, 1, 1, 1)
    path.write_bytes(content)
    refused(path, "has 32000 x 32000 x 32000 voxels")
    content[40:56] = struct.pack("<8h", 3, 30000, 30000, 1, 1, 1, 1, 1)
    path.write_bytes(content)
    refused(path, "damaged NIfTI file")


def test_damaged_nifti_anywhere_is_refused(tmp_path):
    whole = nifti(tmp_path / "a.nii.gz").read_bytes()
    path = tmp_path / "b.nii.gz"
    for end in (5, 15, 100, len(whole) // 2, len(whole) - 300, len(whole) - 1):
        path.write_bytes(whole[:end])
        refused(path, "damaged NIfTI file")
    for at in (40, len(whole) // 3, len(whole) // 2, len(whole) - 20, len(whole) - 6):
        corrupt = bytearray(whole)
        corrupt[at] ^= 0x55
        path.write_bytes(corrupt)
        refused(path, "")
    plain = nifti(tmp_path / "c.nii").read_bytes()
    for end in (353, 1000, len(plain) - 1):
        path.write_bytes(plain[:end])
        refused(path, "damaged NIfTI file")


def mask(path, affine=None, values=None, **options):
    labels = (values_of(5) % 3).astype(np.uint8) if values is None else values
    return nifti(path, labels, affine, **options)


@pytest.mark.parametrize("codes", ["RAS", "LPI", "SAR"])
def test_label_lies_on_its_image(tmp_path, codes):
    affine = oriented(codes, 15)
    image = read_volume(nifti(tmp_path / "image.nii.gz", affine=affine))
    label = read_label(mask(tmp_path / "label.nii.gz", affine), image, 2)
    assert label.dtype == np.uint8 and label.shape == image.array.shape and label.flags.c_contiguous
    reference = nib.as_closest_canonical(nib.load(tmp_path / "label.nii.gz"))
    np.testing.assert_array_equal(label[0], reference.get_fdata())


def test_label_in_another_storage_order_is_turned_to_the_image(tmp_path):
    image = read_volume(nifti(tmp_path / "image.nii.gz", affine=oriented("RAS", 15)))
    stored = nib.load(mask(tmp_path / "label.nii.gz", oriented("RAS", 15)))
    turned = stored.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt("SPL")))
    turned.to_filename(tmp_path / "turned.nii.gz")
    np.testing.assert_array_equal(
        read_label(tmp_path / "turned.nii.gz", image, 2), read_label(tmp_path / "label.nii.gz", image, 2)
    )


def test_label_of_a_dicom_series(tmp_path):
    folder = series(tmp_path / "series", ORIENTATIONS["oblique"])
    values, affine = by_simpleitk(folder)
    path = nifti(tmp_path / "label.nii.gz", (values > 1000).astype(np.uint8), affine)
    image = read_volume(folder)
    np.testing.assert_array_equal(read_label(path, image, 1), image.array > 1000)


def test_label_that_does_not_fit_names_both(tmp_path):
    image = read_volume(nifti(tmp_path / "image.nii.gz"))
    moved = np.diag([1.0, 1.2, 2.0, 1.0])
    moved[:3, 3] = (0, 0, 4)
    cases = {
        "moved": (mask(tmp_path / "moved.nii.gz", moved), f"lies 4 mm from {tmp_path / 'image.nii.gz'} by its affine"),
        "smaller": (
            mask(tmp_path / "smaller.nii.gz", values=np.ones((7, 9, 10), np.uint8)),
            f"has 7 x 9 x 10 voxels, but {tmp_path / 'image.nii.gz'} has 7 x 9 x 11",
        ),
        "coarser": (mask(tmp_path / "coarser.nii.gz", np.diag([1.0, 1.2, 2.5, 1.0])), "lies 5 mm from"),
    }
    for path, text in cases.values():
        refused(path, text, Reason.BAD_MANIFEST, lambda path: read_label(path, image, 2))
    near = np.diag([1.0, 1.2, 2.0, 1.0])
    near[0, 3] = 0.01
    assert read_label(mask(tmp_path / "near.nii.gz", near), image, 2).any()


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "has the value 3, but labels are whole numbers from 0 (background) to 2"), (-1, "has the value -1"),
     (0.5, "has the value 0.5")],
)  # fmt: skip
def test_label_values_outside_the_classes(tmp_path, value, text):
    image = read_volume(nifti(tmp_path / "image.nii.gz"))
    values = np.ones(SHAPE, np.float32)
    values[1, 1, 1] = value
    path = mask(tmp_path / "label.nii.gz", values=values)
    refused(path, text, Reason.BAD_MANIFEST, lambda path: read_label(path, image, 2))


def test_empty_mask(tmp_path):
    image = read_volume(nifti(tmp_path / "image.nii.gz"))
    path = mask(tmp_path / "label.nii.gz", values=np.zeros(SHAPE, np.uint8))
    refused(path, "empty mask", Reason.BAD_MANIFEST, lambda path: read_label(path, image, 2))
    assert not read_label(path, image, 2, allow_empty=True).any()


def test_unreadable_label(tmp_path):
    image = Volume(np.zeros((1, *SHAPE), np.float32), np.eye(4), None)
    refused(tmp_path / "no.nii.gz", "can't be read (No such file", read=lambda path: read_label(path, image, 2))
    (tmp_path / "bad.nii.gz").write_bytes(b"bad")
    refused(tmp_path / "bad.nii.gz", "is not a NIfTI file", read=lambda path: read_label(path, image, 2))


def test_shared_hippocampus_pairs(shared_data):
    folder = shared_data / "hippocampus"
    for path in sorted((folder / "imagesTr").iterdir())[:5]:
        volume = read_volume(path)
        assert_same(volume, nib.load(path).get_fdata(), nib.load(path).affine)
        assert set(np.unique(read_label(folder / "labelsTr" / path.name, volume, 2))) == {0, 1, 2}
