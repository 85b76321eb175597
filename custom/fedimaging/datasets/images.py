"""Reading 2D images: DICOM, JPEG and PNG become floats whose meaning does not depend on the vendor.

DICOM follows the greyscale pipeline of PS3.3 C.11 and PS3.4 N.2: stored values, modality LUT or rescale, VOI LUT or
window, MONOCHROME1 inverted. 0 is black and 1 white on the display that the hospital's radiologist looks at. What maps
to 1 is the output range of the last transform (the window, or the LUT's bits), never the brightest pixel found.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydicom.pixels import apply_color_lut, pixel_array

from fedimaging.errors import FedImagingError, Reason

SUFFIXES = (".dcm", ".dicom", ".ima", ".jpg", ".jpeg", ".png")
MAX_PIXELS = 100_000_000

_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's grey
_DICOM_SUFFIXES = ("", ".dcm", ".dicom", ".ima")
_RUST_PANIC = "PanicException"  # of pylibjpeg-rle; no Exception, and its class can't be imported
_AGE_STEP = 20
_OLDEST = 80

# pydicom's warnings quote the values of data elements, names and identifiers among them: they belong in no log.
logging.getLogger("pydicom").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")

Floats = NDArray[np.float32]


class _UnreadableError(Exception):
    """Why an image can't be read and what to do, without its name."""


def read_image(path: Path, channels: int = 1) -> Floats:
    """Reads one 2D image.

    Args:
        path: a DICOM, JPEG or PNG file; DICOM is recognised by its content, or by its name if it has no preamble.
        channels: 1 for grey (the luminance of a colour image) or 3 for RGB (a grey image three times).

    Returns:
        float32, shape (channels, height, width), in [0, 1]: 0 is black and 1 white, whatever the vendor.

    Raises:
        FedImagingError: UNREADABLE_IMAGES, one line with the file, the reason and what to do.
    """
    if channels not in (1, 3):
        raise FedImagingError(f"channels is {channels}; an image has 1 (grey) or 3 (RGB)")
    with _told(path):
        image = _checked(_read_dicom(path) if is_dicom(path) else _read_picture(path))
    return _with_channels(np.clip(image, 0, 1), channels)


def read_slice(path: Path) -> Floats:
    """Reads one greyscale slice of a DICOM series, in its modality's units: Hounsfield units in CT.

    Only the modality LUT or rescale is applied; window, MONOCHROME1 and padding concern a display and are not.

    Returns:
        float32, shape (rows, columns).

    Raises:
        FedImagingError: UNREADABLE_IMAGES, one line with the file, the reason and what to do.
    """
    with _told(path):
        return _checked(_decode(path, _modality_units))


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns what goes wrong with a file into an error that names it."""
    try:
        yield
    except _UnreadableError as error:
        raise FedImagingError(f"{path}: {error}", Reason.UNREADABLE_IMAGES) from None
    except OSError as error:
        message = f"{path}: can't be read ({reason(error)}); restore it or allow this account to read it"
        raise FedImagingError(message, Reason.UNREADABLE_IMAGES) from None


def _checked(image: Floats) -> Floats:
    if image.size == 0 or not np.isfinite(image).all():
        raise _UnreadableError("has values that are no numbers after its transforms; correct its rescale or LUT")
    return image


def is_dicom(path: Path) -> bool:
    """Whether the file has DICOM's preamble or, without one, a name that only a DICOM file has.

    Raises:
        OSError: if the file can't be opened.
    """
    with path.open("rb") as file:
        start = file.read(132)
    if start[128:] == b"DICM":
        return True
    return path.suffix.lower() in _DICOM_SUFFIXES and not start.startswith((b"\xff\xd8\xff", b"\x89PNG"))


def image_files(folder: Path) -> list[Path]:
    """All images below a folder, sorted: by name, and DICOM files of any name by their preamble; hidden ones not."""
    files = (path for path in sorted(folder.rglob("[!.]*")) if path.is_file())
    visible = (path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return [path for path in visible if path.suffix.lower() in SUFFIXES or has_preamble(path)]


def has_preamble(path: Path) -> bool:
    """Whether a file is DICOM by its content, and no directory of DICOM files."""
    if path.name.upper() == "DICOMDIR":
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_header(path: Path) -> pydicom.Dataset:
    """The data elements of a DICOM file that precede its pixels.

    Raises:
        FedImagingError: UNREADABLE_IMAGES if it is no DICOM file.
    """
    try:
        return pydicom.dcmread(path, stop_before_pixels=True, force=True)
    except Exception as error:
        raise FedImagingError(f"{path}: {reason(error)}", Reason.UNREADABLE_IMAGES) from None


def covariates(header: pydicom.Dataset) -> dict[str, str]:
    """The coarse covariates of a DICOM header, as a manifest's case has them; those that are absent are left out."""
    found = {
        "age_group": age_group(element(header, "PatientAge")),
        "sex": element(header, "PatientSex").upper(),
        "vendor": element(header, "Manufacturer"),
        "view": element(header, "ViewPosition").upper(),
    }
    return {name: value for name, value in found.items() if value}


def age_group(age: str) -> str:
    """A DICOM age string ("045Y", "011M") or a number of years as a group of 20 years: "40-59", "80+".

    Anything else is returned as it is: it is taken for a group.
    """
    number, unit = (age[:-1], age[-1:].upper()) if age[-1:].upper() in tuple("DWMY") else (age, "Y")
    try:
        years = float(number) / {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}[unit]
    except ValueError:
        return age
    if not 0 <= years < math.inf:
        return ""
    first = int(years) // _AGE_STEP * _AGE_STEP
    return f"{_OLDEST}+" if first >= _OLDEST else f"{first}-{first + _AGE_STEP - 1}"


def element(header: pydicom.Dataset, keyword: str) -> str:
    """One data element as text with single spaces; empty where it is absent or damaged."""
    try:
        value = header.get(keyword)
    except Exception:  # an element that can't be converted is as good as absent
        return ""
    return "" if value is None else " ".join(str(value).split())


def _read_dicom(path: Path) -> Floats:
    """Float values of one frame: (H, W), or (H, W, 3) in colour; black at 0 and white at 1."""
    return _decode(path, _display)


def _decode(path: Path, convert: Callable[[NDArray[Any], pydicom.Dataset, str], Floats]) -> Floats:
    """What `convert` makes of a DICOM file's stored values, its data elements and its photometric interpretation."""
    try:
        data = pydicom.dcmread(path, force=True)
        photometric = _check_dicom(data)
        return convert(pixel_array(data, raw=False), data, photometric)
    except (_UnreadableError, MemoryError):
        raise
    except BaseException as error:  # damaged files make pydicom and its decoders raise anything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if not isinstance(error, Exception) and type(error).__name__ != _RUST_PANIC:
            raise
        raise _UnreadableError(f"damaged or unsupported DICOM file ({reason(error)}); send it again") from None


def _display(stored: NDArray[Any], data: pydicom.Dataset, photometric: str) -> Floats:
    if photometric == "PALETTE COLOR":
        colour = apply_color_lut(stored, data)
        return np.asarray(colour[..., :3], dtype=np.float32) / np.float32(np.iinfo(colour.dtype).max)
    if photometric in _COLOUR:
        return np.asarray(stored, dtype=np.float32) / np.float32(2 ** int(data.BitsStored) - 1)
    return _grey(stored, data, photometric)


def _modality_units(stored: NDArray[Any], data: pydicom.Dataset, photometric: str) -> Floats:
    if photometric not in _GREY:
        raise _UnreadableError(f"is in colour ({photometric}), which has no place in a volume; leave it out")
    return _modality(stored, data, _precision(data))[0].astype(np.float32)


def _precision(data: pydicom.Dataset) -> type[np.floating[Any]]:
    return np.float32 if int(data.BitsAllocated) <= 16 else np.float64


def _check_dicom(data: pydicom.Dataset) -> str:
    """Refuses what has no single 2D image of known meaning; returns the photometric interpretation."""
    if "PixelData" not in data:
        other = next((word for word in ("FloatPixelData", "DoubleFloatPixelData") if word in data), None)
        what = f"has {other}, which has no defined black and white" if other else "holds no image (no PixelData)"
        raise _UnreadableError(f"{what}; leave it out of the dataset")
    frames = int(data.get("NumberOfFrames") or 1)
    if frames != 1:
        raise _UnreadableError(f"is multi-frame ({frames} frames); export one image a file")
    photometric = str(data.get("PhotometricInterpretation") or "")
    samples = {**dict.fromkeys(_GREY, 1), **dict.fromkeys(_COLOUR, 3), "PALETTE COLOR": 1}
    if photometric not in samples:
        known = ", ".join(samples)
        raise _UnreadableError(f"has the photometric interpretation {photometric!r}; supported are {known}")
    if int(data.SamplesPerPixel) != samples[photometric]:
        raise _UnreadableError(
            f"has the photometric interpretation {photometric} with {data.SamplesPerPixel} samples per pixel, "
            f"not {samples[photometric]}; correct its header"
        )
    _check_size(int(data.Columns), int(data.Rows))
    return photometric


def _grey(stored: NDArray[Any], data: pydicom.Dataset, photometric: str) -> Floats:
    """Stored values (H, W) -> modality transform -> VOI transform -> [0, 1] with MONOCHROME1 inverted."""
    precision = _precision(data)
    values, low, high = _modality(stored, data, precision)
    if _has_lut(data, "VOILUTSequence"):
        looked_up, full = _look_up(values, data.VOILUTSequence[0])
        image = looked_up.astype(precision) / full
    elif (window := _window(data)) is not None:
        image = _apply_window(values, *window)
    else:
        image = (values - low) / (high - low)
    if photometric == "MONOCHROME1":
        image = 1 - image
    if (padding := _padding(stored, data)) is not None:
        image[padding] = 0
    return image.astype(np.float32)


def _modality(
    stored: NDArray[Any], data: pydicom.Dataset, precision: type[np.floating[Any]]
) -> tuple[NDArray[Any], float, float]:
    """Values after the modality LUT or rescale, and the smallest and largest that the header allows for."""
    if _has_lut(data, "ModalityLUTSequence"):
        values, full = _look_up(stored, data.ModalityLUTSequence[0])
        return values.astype(precision), 0.0, full
    bits = int(data.BitsStored)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if int(data.PixelRepresentation) else (0, 2**bits - 1)
    slope, intercept = _number(data, "RescaleSlope", 1.0), _number(data, "RescaleIntercept", 0.0)
    if slope == 0:
        raise _UnreadableError("has a rescale slope of 0; correct its header")
    ends = sorted((low * slope + intercept, high * slope + intercept))
    return stored.astype(precision) * precision(slope) + precision(intercept), ends[0], ends[1]


def _has_lut(data: pydicom.Dataset, keyword: str) -> bool:
    sequence = data.get(keyword)
    return bool(sequence) and all(sequence[0].get(word) is not None for word in ("LUTDescriptor", "LUTData"))


def _look_up(values: NDArray[Any], item: pydicom.Dataset) -> tuple[NDArray[Any], float]:
    """Applies a LUT (PS3.3 C.11.1.1): the mapped values, and the largest that its bits allow.

    pydicom's apply_voi_lut is not used: it keeps the index in the type of the LUT's output, so that a table of 4096
    entries of 8 bits wraps around every 256 values.
    """
    entries, first, bits = (int(value) for value in item.LUTDescriptor)
    entries = entries or 65536
    table = _lut_data(item.LUTData, entries, bits, ">u2" if item.original_encoding[1] is False else "<u2")
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, entries - 1)
    return table[index], max(2.0**bits - 1, float(table.max()))


def _lut_data(data: Any, entries: int, bits: int, word: str) -> NDArray[Any]:
    """The entries of a LUT, which come as numbers or as bytes, an entry of 8 bits in a byte or in a word."""
    raw = data if isinstance(data, bytes) else np.atleast_1d(np.asarray(data)).astype(word).tobytes()
    if len(raw) >= 2 * entries:
        return np.frombuffer(raw, word, entries)
    if bits <= 8 and len(raw) >= entries:
        return np.frombuffer(raw, np.uint8, entries)
    raise _UnreadableError(f"has a LUT with fewer than its {entries} entries; send it again")


def _window(data: pydicom.Dataset) -> tuple[float, float, str] | None:
    """Centre, width and function of the first window, or None."""
    if data.get("WindowCenter") in (None, "") or data.get("WindowWidth") in (None, ""):
        return None
    center, width = _number(data, "WindowCenter", 0.0), _number(data, "WindowWidth", 0.0)
    function = str(data.get("VOILUTFunction") or "LINEAR").upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise _UnreadableError(
            f"has the unknown VOI LUT function {function!r}; LINEAR, LINEAR_EXACT or SIGMOID are known"
        )
    if width < 1 if function == "LINEAR" else width <= 0:
        raise _UnreadableError(f"has a window width of {width:g}, too small for {function}; correct its header")
    return center, width, function


def _apply_window(values: NDArray[Any], center: float, width: float, function: str) -> NDArray[Any]:
    """Window to [0, 1] (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -80, 80)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if width == 0:
        return (values > center).astype(values.dtype)
    return np.clip((values - center) / width + 0.5, 0, 1)


def _padding(stored: NDArray[Any], data: pydicom.Dataset) -> NDArray[np.bool_] | None:
    """Where the detector saw nothing (PS3.3 C.7.5.1.1.2); such pixels are black, in MONOCHROME1 too."""
    value = data.get("PixelPaddingValue")
    if value is None:
        return None
    limit = data.get("PixelPaddingRangeLimit")
    low, high = sorted((int(value), int(value if limit is None else limit)))
    mask: NDArray[np.bool_] = (stored >= low) & (stored <= high)
    return mask


def _number(data: pydicom.Dataset, keyword: str, default: float) -> float:
    """The first value of a numeric data element."""
    value = data.get(keyword)
    if value in (None, ""):
        return default
    number = float(value[0] if isinstance(value, pydicom.multival.MultiValue) else value)
    if not math.isfinite(number):
        raise _UnreadableError(f"has a {keyword} that is no finite number; correct its header")
    return number


def _read_picture(path: Path) -> Floats:
    """A JPEG or PNG: (H, W), or (H, W, 3) in colour, scaled by its bits."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as opened:
            _check_size(*opened.size)
            image = ImageOps.exif_transpose(opened)
            if image.mode in ("I;16", "I;16B", "I"):
                return np.array(image, dtype=np.float32) / np.float32(65535)
            grey = image.mode in ("1", "L", "LA")
            return np.array(image.convert("L" if grey else "RGB"), dtype=np.float32) / np.float32(255)
    except Image.UnidentifiedImageError:
        raise _UnreadableError("is no DICOM, JPEG or PNG image; leave it out of the dataset") from None
    except (_UnreadableError, MemoryError):
        raise
    except Exception as error:  # damaged files make Pillow raise OSError, SyntaxError, ValueError, zlib.error, ...
        raise _UnreadableError(f"damaged image ({reason(error)}); copy it again") from None


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise _UnreadableError(f"has {width} x {height} pixels; at least 1 and at most {MAX_PIXELS} can be read")


def _with_channels(image: Floats, channels: int) -> Floats:
    """(H, W) or (H, W, 3) -> (channels, H, W)."""
    if image.ndim == 3 and channels == 1:
        image = image @ _LUMA
    if image.ndim == 2:
        return np.repeat(image[np.newaxis], channels, axis=0)
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def reason(error: BaseException) -> str:
    """One line of at most 200 characters."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200].rstrip(".") or type(error).__name__
