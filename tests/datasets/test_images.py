"""Reading images: real samples from the pydicom wheel, and written ones for what it lacks."""

import subprocess
import sys

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing, pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    generate_uid,
)

from fedimaging.datasets import images
from fedimaging.datasets.images import read_image
from fedimaging.errors import FedImagingError, Reason

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:pydicom"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:pydicom"),
]


def sample(name):
    """A file inside the pydicom wheel."""
    path = get_testdata_file(name, download=False)
    assert path is not None, f"{name} is not in the wheel"
    return images.Path(path)


def ramp(bits=12, dtype=np.uint16):
    """Every stored value once, 64 columns wide."""
    return np.arange(2**bits, dtype=dtype).reshape(-1, 64)


def write(path, pixels, photometric="MONOCHROME2", syntax=ExplicitVRLittleEndian, **elements):
    """A DX file; `elements` override or add data elements, None removes one."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID = DigitalXRayImageStorageForPresentation
    data.SOPInstanceUID = generate_uid()
    data.Modality = "DX"
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel = 1 if pixels.ndim == 2 else pixels.shape[2]
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = photometric
    data.BitsAllocated = pixels.dtype.itemsize * 8
    data.BitsStored = data.BitsAllocated
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.astype(pixels.dtype.newbyteorder("<" if syntax.is_little_endian else ">")).tobytes()
    data["PixelData"].VR = "OW" if data.BitsAllocated > 8 else "OB"
    for keyword, value in elements.items():
        if value is None:
            delattr(data, keyword)
        else:
            setattr(data, keyword, value)
    data.HighBit = data.BitsStored - 1
    data.save_as(path, enforce_file_format=True)
    return path


def lut(table, first, bits):
    item = Dataset()
    item.LUTDescriptor = [len(table) % 65536, first, bits]
    item.LUTData = np.asarray(table, dtype="<u2").tobytes()
    item["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    item["LUTData"].VR = "OW"
    return Sequence([item])


def refused(path, reason=""):
    with pytest.raises(FedImagingError) as caught:
        read_image(path)
    message = str(caught.value)
    assert reason in message
    assert caught.value.reason is Reason.UNREADABLE_IMAGES
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("compressed", "uncompressed", "tolerance"),
    [
        ("MR_small_RLE.dcm", "MR_small.dcm", 0),
        ("MR_small_jp2klossless.dcm", "MR_small.dcm", 0),
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm", 0),
        ("MR_small_bigendian.dcm", "MR_small.dcm", 0),
        ("MR_small_implicit.dcm", "MR_small.dcm", 0),
        ("MR_small_padded.dcm", "MR_small.dcm", 0),
        ("rtdose_rle_1frame.dcm", "rtdose_1frame.dcm", 0),
        ("liver_expb_1frame.dcm", "liver_1frame.dcm", 0),
        ("SC_rgb_rle.dcm", "SC_rgb_rle_16bit.dcm", 0),
        ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb_rle.dcm", 0),  # JPEG lossless, process 14
        ("SC_rgb_gdcm_KY.dcm", "SC_rgb_rle.dcm", 0.01),  # JPEG 2000
        ("SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb_rle.dcm", 0.02),  # JPEG baseline, RGB
        ("SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_rle.dcm", 0.02),  # JPEG baseline, YBR_FULL_422
        ("SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_rle.dcm", 0.02),  # JPEG baseline, YBR_FULL
        ("SC_rgb_jls_lossy_line.dcm", "SC_rgb_rle.dcm", 0.02),  # JPEG-LS near-lossless
        ("SC_ybr_full_422_uncompressed.dcm", "SC_rgb_rle.dcm", 0.02),
        ("SC_rgb_small_odd_big_endian.dcm", "SC_rgb_small_odd.dcm", 0),
    ],
)
def test_transfer_syntax_does_not_change_the_image(compressed, uncompressed, tolerance):
    image, reference = read_image(sample(compressed), 3), read_image(sample(uncompressed), 3)
    assert image.shape == reference.shape
    assert np.abs(image - reference).mean() <= tolerance
    assert reference.std() > 0


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_written_and_compressed(tmp_path, syntax):
    plain = write(tmp_path / "plain.dcm", ramp(), BitsStored=12)
    data = pydicom.dcmread(plain)
    data.compress(syntax)
    data.save_as(tmp_path / "compressed.dcm")
    np.testing.assert_array_equal(read_image(tmp_path / "compressed.dcm"), read_image(plain))


@pytest.mark.parametrize("name", ["693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm", "image_dfl.dcm"])
def test_lossy_and_odd_samples_are_read(name):
    image = read_image(sample(name))
    data = pydicom.dcmread(sample(name))
    assert image.shape == (1, data.Rows, data.Columns)
    assert image.std() > 0


def test_a_syntax_without_a_decoder_is_told():
    refused(sample("JPGExtended.dcm"), "damaged or unsupported DICOM file")


@pytest.mark.parametrize("name", ["MR_small.dcm", "693_J2KI.dcm", "examples_overlay.dcm", "CT_small.dcm"])
def test_greyscale_pipeline_agrees_with_pydicom(name):
    data = pydicom.dcmread(sample(name))
    low, high = (-(2 ** (data.BitsStored - 1)), 2 ** (data.BitsStored - 1) - 1)
    if not data.PixelRepresentation:
        low, high = 0, 2**data.BitsStored - 1
    slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
    shown = apply_voi_lut(apply_modality_lut(pixel_array(data), data), data)
    expected = (shown - (low * slope + intercept)) / ((high - low) * slope)
    stored = pixel_array(data)
    expected[stored == data.get("PixelPaddingValue", 10**9)] = 0
    np.testing.assert_allclose(read_image(sample(name))[0], expected, atol=1e-5)


def test_colour_becomes_luminance_or_rgb():
    path = sample("examples_rgb_color.dcm")
    colour, grey = read_image(path, 3), read_image(path)
    expected = pixel_array(path).astype(np.float32).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(colour, expected, atol=1e-6)
    np.testing.assert_allclose(grey[0], np.tensordot([0.299, 0.587, 0.114], expected, 1), atol=1e-5)


def test_palette_colour():
    colour = read_image(sample("examples_palette.dcm"), 3)
    assert colour.shape == (3, 350, 800)
    assert np.abs(colour[0] - colour[2]).max() > 0.1


def test_image_is_float32_of_the_wanted_channels(tmp_path):
    path = write(tmp_path / "1.dcm", ramp(), BitsStored=12)
    for channels in (1, 3):
        image = read_image(path, channels)
        assert image.dtype == np.float32
        assert image.shape == (channels, 64, 64)
        assert image.flags.c_contiguous and image.flags.writeable
        np.testing.assert_array_equal(image[0], image[-1])
    with pytest.raises(FedImagingError, match="channels is 2"):
        read_image(path, 2)


def test_bits_stored_give_the_scale(tmp_path):
    image = read_image(write(tmp_path / "1.dcm", ramp(12), BitsStored=12))
    assert (image.min(), image.max()) == (0, 1)
    half = read_image(write(tmp_path / "2.dcm", ramp(12), BitsStored=13))
    assert half.max() == pytest.approx(4095 / 8191)


def test_bits_above_those_stored_are_no_part_of_the_image(tmp_path):
    overlay = ramp(12) | np.where(ramp(12) % 3 == 0, 0x8000, 0).astype(np.uint16)
    image = read_image(write(tmp_path / "1.dcm", overlay, BitsStored=12))
    np.testing.assert_allclose(image[0], ramp(12) / 4095, atol=1e-6)


def test_signed_values(tmp_path):
    pixels = (ramp(12).astype(np.int16)) - 2048
    image = read_image(write(tmp_path / "1.dcm", pixels, BitsStored=12))
    np.testing.assert_allclose(image[0], ramp(12) / 4095, atol=1e-6)


def test_monochrome1_is_inverted(tmp_path):
    elements = {"BitsStored": 12, "WindowCenter": 1500, "WindowWidth": 1000}
    second = read_image(write(tmp_path / "2.dcm", ramp(), "MONOCHROME2", **elements))
    mirrored = elements | {"WindowCenter": 4095 - 1500 + 1}  # a LINEAR window is centred half a value lower
    first = read_image(write(tmp_path / "1.dcm", 4095 - ramp(), "MONOCHROME1", **mirrored))
    np.testing.assert_allclose(first, second, atol=1e-5)
    assert second.flat[0] == 0 and second.flat[-1] == 1


def test_vendors_with_other_bits_and_units_agree(tmp_path):
    """The same scene as 12 bits MONOCHROME2, 10 bits MONOCHROME1 and rescaled 16 bits."""
    scene = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    a = write(tmp_path / "a.dcm", np.rint(scene * 4095).astype(np.uint16), BitsStored=12)
    b = write(tmp_path / "b.dcm", np.rint((1 - scene) * 1023).astype(np.uint16), "MONOCHROME1", BitsStored=10)
    stored = np.rint(scene * 40000).astype(np.uint16)
    window = {"WindowCenter": 1000.5, "WindowWidth": 4001}
    c = write(tmp_path / "c.dcm", stored, RescaleSlope="0.1", RescaleIntercept="-1000", RescaleType="US", **window)
    for path in (a, b, c):
        np.testing.assert_allclose(read_image(path)[0], scene, atol=1e-3)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize("width", [2, 777.5])
def test_window_functions_agree_with_pydicom(tmp_path, function, width):
    elements = {"BitsStored": 12, "WindowCenter": [900.5, 30], "WindowWidth": [width, 7]}
    elements |= {"RescaleSlope": 2, "RescaleIntercept": -100} | ({"VOILUTFunction": function} if function else {})
    path = write(tmp_path / "1.dcm", ramp(), **elements)
    data = pydicom.dcmread(path)
    windowed = apply_windowing(apply_modality_lut(data.pixel_array, data), data)
    if function == "SIGMOID":
        windowed = np.clip(windowed, -100, 8090)
    np.testing.assert_allclose(read_image(path)[0], (windowed + 100) / 8190, atol=1e-5)


def test_negative_slope_keeps_the_order_of_the_rescaled_values(tmp_path):
    elements = {"BitsStored": 12, "RescaleSlope": -1, "RescaleIntercept": 4095}
    image = read_image(write(tmp_path / "1.dcm", ramp(), **elements))
    np.testing.assert_allclose(image[0], 1 - ramp() / 4095, atol=1e-6)
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    image = read_image(write(tmp_path / "2.dcm", ramp(), **elements, **window))
    np.testing.assert_allclose(image[0], 1 - ramp() / 4095, atol=1e-6)


def test_modality_lut(tmp_path):
    table = np.arange(4096)[::-1] * 4
    image = read_image(write(tmp_path / "1.dcm", ramp(), BitsStored=12, ModalityLUTSequence=lut(table, 0, 14)))
    np.testing.assert_allclose(image[0], (16380 - 4 * ramp().astype(float)) / 16383, atol=1e-6)


def test_voi_lut_wins_over_the_window_and_clamps(tmp_path):
    table = np.arange(1000) + 24
    elements = {"BitsStored": 12, "VOILUTSequence": lut(table, 500, 10), "WindowCenter": 1, "WindowWidth": 2}
    image = read_image(write(tmp_path / "1.dcm", ramp(), **elements))
    np.testing.assert_allclose(image[0], (np.clip(ramp().astype(float) - 500, 0, 999) + 24) / 1023, atol=1e-6)


def test_voi_lut_with_more_entries_than_its_values_does_not_wrap(tmp_path):
    table = np.arange(4096) // 16
    path = write(tmp_path / "1.dcm", ramp(), BitsStored=12, VOILUTSequence=lut(table, 0, 8))
    np.testing.assert_allclose(read_image(path)[0], table.reshape(64, 64) / 255, atol=1e-6)


def test_voi_lut_of_packed_bytes_and_after_a_rescale(tmp_path):
    sequence = lut([0], -2048, 8)
    sequence[0].LUTDescriptor = [4096, -2048, 8]
    sequence[0].LUTData = (np.arange(4096) // 16).astype(np.uint8).tobytes()
    elements = {"BitsStored": 12, "RescaleSlope": 1, "RescaleIntercept": -2048, "VOILUTSequence": sequence}
    path = write(tmp_path / "1.dcm", ramp().astype(np.int16), PixelRepresentation=0, **elements)
    np.testing.assert_allclose(read_image(path)[0], (ramp() // 16) / 255, atol=1e-6)


def test_lut_with_too_few_entries(tmp_path):
    sequence = lut(np.arange(100), 0, 12)
    sequence[0].LUTDescriptor = [4096, 0, 12]
    refused(write(tmp_path / "1.dcm", ramp(), BitsStored=12, VOILUTSequence=sequence), "fewer than its 4096 entries")


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black(tmp_path, photometric):
    pixels = ramp().copy()
    pixels[:4] = 7
    elements = {"BitsStored": 12, "PixelPaddingValue": 7, "WindowCenter": 2048, "WindowWidth": 4096}
    image = read_image(write(tmp_path / "1.dcm", pixels, photometric, **elements))
    assert (image[0, :4] == 0).all()
    assert (image[0, 5:-1] > 0).all()


def test_big_endian_file_and_lut(tmp_path):
    table = np.arange(4096)[::-1]
    little = write(tmp_path / "1.dcm", ramp(), BitsStored=12, VOILUTSequence=lut(table, 0, 12))
    sequence = lut(table, 0, 12)
    sequence[0].LUTData = table.astype(">u2").tobytes()
    big = write(tmp_path / "2.dcm", ramp(), syntax=ExplicitVRBigEndian, BitsStored=12, VOILUTSequence=sequence)
    np.testing.assert_array_equal(read_image(big), read_image(little))
    np.testing.assert_allclose(read_image(big)[0], 1 - ramp() / 4095, atol=1e-6)


def test_multi_frame_is_refused(tmp_path):
    refused(sample("SC_rgb_rle_2frame.dcm"), "is multi-frame (2 frames)")
    refused(sample("examples_ybr_color.dcm"), "is multi-frame (30 frames)")


@pytest.mark.parametrize("name", ["test-SR.dcm", "rtplan.dcm", "waveform_ecg.dcm"])
def test_dicom_without_an_image_is_refused(name):
    refused(sample(name), "holds no image (no PixelData); leave it out of the dataset")


@pytest.mark.parametrize("name", ["MR_truncated.dcm", "badVR.dcm", "JPEG-lossy.dcm"])
def test_damaged_dicom_is_refused(name):
    refused(sample(name), "damaged or unsupported DICOM file")


def test_panic_of_the_rle_decoder_is_an_unreadable_image(tmp_path):
    """pylibjpeg-rle's panics are no Exception: one such file would end the process."""
    data = pydicom.dcmread(sample("MR_small_RLE.dcm"))
    frame = bytearray(next(generate_frames(data.PixelData, number_of_frames=1)))
    frame[64:] = b"\x81\x00" * ((len(frame) - 64) // 2)  # runs of 128 pixels, far more than the image has
    data.PixelData = encapsulate([bytes(frame)])
    data.save_as(tmp_path / "1.dcm")
    refused(tmp_path / "1.dcm", "damaged or unsupported DICOM file")


@pytest.mark.parametrize(
    "name", ["MR_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm"]
)
def test_file_cut_anywhere_is_refused(tmp_path, name):
    whole = sample(name).read_bytes()
    for length in (0, 100, 140, 400, len(whole) // 2):
        path = tmp_path / "cut.dcm"
        path.write_bytes(whole[:length])
        refused(path)


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"PhotometricInterpretation": "HSV"}, "has the photometric interpretation 'HSV'; supported are MONOCHROME1"),
        (
            {"PhotometricInterpretation": "RGB"},
            "photometric interpretation RGB with 1 samples per pixel, not 3",
        ),
        ({"PhotometricInterpretation": None}, "has the photometric interpretation ''"),
        ({"SamplesPerPixel": 3}, "with 3 samples per pixel, not 1"),
        ({"Rows": 0}, "0 pixels; at least 1"),
        ({"Rows": 65535, "Columns": 65535}, "at most 100000000"),
        ({"WindowCenter": 100, "WindowWidth": 0}, "has a window width of 0, too small for LINEAR"),
        ({"WindowCenter": 1, "WindowWidth": 9, "VOILUTFunction": "CUBIC"}, "unknown VOI LUT function 'CUBIC'"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "has a rescale slope of 0"),
        ({"BitsStored": 17}, "damaged or unsupported DICOM file"),
    ],
)
def test_wrong_header_is_refused(tmp_path, elements, reason):
    refused(write(tmp_path / "1.dcm", ramp(), **({"BitsStored": 12} | elements)), reason)


@pytest.mark.parametrize("slope", ["nan", "inf"])
def test_rescale_that_is_no_number_is_refused(tmp_path, slope):
    path = write(tmp_path / "1.dcm", ramp(), RescaleSlope="1.0", RescaleIntercept="0")
    path.write_bytes(path.read_bytes().replace(b"DS\x04\x001.0 ", b"DS\x04\x00" + slope.encode() + b" "))
    refused(path, "RescaleSlope that is no finite number")


def test_float_pixel_data_is_refused(tmp_path):
    path = write(tmp_path / "1.dcm", ramp(), PixelData=None, FloatPixelData=b"\0" * 16)
    refused(path, "has FloatPixelData, which has no defined black and white")


def test_pydicom_warnings_with_values_reach_no_log():
    path = sample("badVR.dcm")  # its NumberOfFrames is "1A"
    code = "import sys, logging; logging.basicConfig(level=0); from pathlib import Path; import pydicom; "
    code += "{}; print(repr(pydicom.dcmread(sys.argv[1]).get('NumberOfFrames')))"
    for first, told in (("pass", True), ("import fedimaging.datasets.images", False)):
        command = [sys.executable, "-c", code.format(first), path]
        process = subprocess.run(command, capture_output=True, check=True)
        assert b"1A" in process.stdout
        assert (b"1A" in process.stderr) == told


def test_dicom_is_known_by_content_or_without_preamble_by_name(tmp_path):
    path = write(tmp_path / "1.dcm", ramp(), BitsStored=12)
    for name in ("IM0001", "1.2.840.113", "wrong.png"):
        (tmp_path / name).write_bytes(path.read_bytes())
        np.testing.assert_array_equal(read_image(tmp_path / name), read_image(path))
    (tmp_path / "bare.dcm").write_bytes(path.read_bytes()[132:])
    np.testing.assert_array_equal(read_image(tmp_path / "bare.dcm"), read_image(path))


def test_jpeg_named_dcm_is_read_as_what_it_is(tmp_path):
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(tmp_path / "1.dcm", "JPEG")
    assert read_image(tmp_path / "1.dcm").mean() == pytest.approx(128 / 255, abs=0.01)


def test_png_of_8_and_16_bits(tmp_path):
    Image.fromarray(ramp(12)[:4].astype(np.uint8)).save(tmp_path / "8.png")
    np.testing.assert_allclose(read_image(tmp_path / "8.png")[0], ramp(12)[:4] / 255, atol=1e-6)
    Image.fromarray(ramp(12) * 16).save(tmp_path / "16.png")
    np.testing.assert_allclose(read_image(tmp_path / "16.png")[0], ramp(12) * 16 / 65535, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_of_any_mode(tmp_path, mode):
    grey = Image.fromarray(np.tile(np.array([[0, 255]], np.uint8), (4, 2)))
    grey.convert(mode).save(tmp_path / "1.png")
    for channels in (1, 3):
        np.testing.assert_allclose(read_image(tmp_path / "1.png", channels)[0], np.asarray(grey) / 255, atol=1e-5)


def test_colour_jpeg(tmp_path):
    red = Image.new("RGB", (16, 8), (255, 0, 0))
    red.save(tmp_path / "1.jpg", quality=95)
    assert read_image(tmp_path / "1.jpg", 3).mean(axis=(1, 2)) == pytest.approx([1, 0, 0], abs=0.02)
    assert read_image(tmp_path / "1.jpg").mean() == pytest.approx(0.299, abs=0.02)


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "1.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "1.jpg")[0]
    assert image.shape == (16, 8)
    assert image[:6].min() > 0.9 and image[10:].max() < 0.1


def test_damaged_pictures_are_refused(tmp_path):
    for suffix in ("jpg", "png"):
        whole = tmp_path / f"whole.{suffix}"
        Image.effect_noise((64, 64), 50).save(whole)
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        refused(cut, "damaged image")
    (tmp_path / "text.png").write_text("no image")
    refused(tmp_path / "text.png", "is no DICOM, JPEG or PNG image")
    Image.new("L", (8, 8)).save(tmp_path / "image.gif")
    refused(tmp_path / "image.gif", "is no DICOM, JPEG or PNG image")


def test_absent_file_is_refused(tmp_path):
    refused(tmp_path / "1.png", "can't be read (No such file or directory); restore it")


def test_covariates_are_coarse(tmp_path):
    path = write(
        tmp_path / "1.dcm", ramp(), PatientAge="045Y", PatientSex="f", Manufacturer=" ACME  Rays", ViewPosition="pa"
    )
    header = images.read_header(path)
    assert images.covariates(header) == {"age_group": "40-59", "sex": "F", "vendor": "ACME Rays", "view": "PA"}
    assert images.covariates(Dataset()) == {}


@pytest.mark.parametrize(
    ("age", "group"),
    [
        ("011M", "0-19"),
        ("019Y", "0-19"),
        ("020Y", "20-39"),
        ("79", "60-79"),
        ("080Y", "80+"),
        ("113", "80+"),
        ("400D", "0-19"),
        ("adult", "adult"),
        ("40-59", "40-59"),
        ("-1", ""),
        ("", ""),
    ],
)
def test_age_group(age, group):
    assert images.age_group(age) == group


def test_image_files_are_found_by_name_and_content(tmp_path):
    dicom = write(tmp_path / "IM0001", ramp(), BitsStored=12)
    (tmp_path / "DICOMDIR").write_bytes(dicom.read_bytes())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.JPG").touch()
    (tmp_path / ".hidden").mkdir()
    for name in (".hidden/b.png", "notes.txt", "labels.csv", ".c.png"):
        (tmp_path / name).touch()
    assert images.image_files(tmp_path) == [dicom, tmp_path / "sub" / "a.JPG"]
