"""Reading volumes: NIfTI files and folders with one DICOM series become arrays in RAS+ order with an affine in mm.

Intensities keep their meaning (Hounsfield units in CT) and voxels their size: equal spacing and normalisation are a
task's affair. What leaves the geometry in doubt is refused, since a mask that is flipped or shifted trains in silence.
"""

from __future__ import annotations

import gzip
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import nibabel as nib
import numpy as np
import pydicom
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from numpy.typing import NDArray

from fedimaging.datasets import images
from fedimaging.errors import FedImagingError, Reason

NIFTI_SUFFIXES = (".nii", ".nii.gz")
MAX_VOXELS = 1_000_000_000

_SLICE_SUFFIXES = (".dcm", ".dicom", ".ima")
_SAME = 0.25
"""Two geometries are the same if no corner moves further than this share of the smallest voxel side."""
_REGULAR = 0.05
"""Slices are regularly spaced if their distances differ by less than this share of their median."""
_SAME_POSITION = 1e-3
_HEADER = 540
"""Bytes of the longer of the two NIfTI headers."""
_LARGEST_OFFSET = 2**26
_CHUNK = 2**20
_DICOM_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_UNITS = {"meter": 1000.0, "micron": 0.001}

Floats = NDArray[np.float32]
Affine = NDArray[np.float64]


@dataclass(frozen=True)
class Volume:
    """One image volume.

    Attributes:
        array: float32, shape (C, X, Y, Z); X, Y and Z run closest to right, anterior and superior.
        affine: (4, 4) float64, from voxel indices to RAS+ world coordinates in mm.
        modality: as DICOM has it ("MR", "CT"); None for NIfTI, which does not say.
        path: the file or folder that it was read from, for errors.
    """

    array: Floats
    affine: Affine
    modality: str | None
    path: Path | None = None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """The voxel's sides in mm."""
        x, y, z = _sides(self.affine)
        return float(x), float(y), float(z)


def read_volume(path: Path) -> Volume:
    """Reads a volume from a NIfTI file or from a folder that holds one DICOM series.

    Raises:
        FedImagingError: UNREADABLE_IMAGES, one line with the file or folder, the reason and what to do.
    """
    try:
        return _read_series(path) if path.is_dir() else _read_nifti(path)
    except OSError as error:
        message = f"can't be read ({error.strerror or error}); restore it or allow this account to read it"
        raise _unreadable(path, message) from None


def read_label(path: Path, image: Volume, classes: int, *, allow_empty: bool = False) -> NDArray[np.uint8]:
    """Reads the mask of a volume, in the order of the volume's axes.

    Args:
        path: a NIfTI file with the shape and place of the image.
        image: the volume that the mask is of.
        classes: how many structures there are; the values are 0 (background) to `classes`.
        allow_empty: whether a mask without a structure is right, as in a brain without a lesion.

    Returns:
        uint8, shape (1, X, Y, Z).

    Raises:
        FedImagingError: UNREADABLE_IMAGES if it can't be read, BAD_MANIFEST if it is no mask of this image.
    """
    if not 1 <= classes <= 255:
        raise FedImagingError(f"classes is {classes}; a mask has 1 to 255")
    try:
        values, affine = _load_nifti(path)
    except OSError as error:
        message = f"can't be read ({error.strerror or error}); restore it or allow this account to read it"
        raise _unreadable(path, message) from None
    values, affine = _reoriented(values, affine, np.linalg.inv(image.affine) @ affine)
    _check_same_place(path, values.shape, affine, image)
    found = np.unique(values)
    wrong = found[(found != np.rint(found)) | (found < 0) | (found > classes)]
    if wrong.size:
        raise FedImagingError(
            f"{path}: has the value {wrong[0]:g}, but labels are whole numbers from 0 (background) to {classes}; "
            "correct the mask or the classes",
            Reason.BAD_MANIFEST,
        )
    if not allow_empty and not found.any():
        raise FedImagingError(
            f"{path}: empty mask, no voxel is labelled; leave the case out, or allow empty masks if this is right",
            Reason.BAD_MANIFEST,
        )
    return np.ascontiguousarray(values[np.newaxis].astype(np.uint8))


def is_nifti(path: Path) -> bool:
    """Whether the file has a NIfTI file's name."""
    return path.name.lower().endswith(NIFTI_SUFFIXES)


def is_series_folder(folder: Path) -> bool:
    """Whether DICOM files lie in a folder itself, by their content or their names' endings."""
    files = (path for path in folder.glob("[!.]*") if path.is_file())
    return any(path.suffix.lower() in _SLICE_SUFFIXES or images.has_preamble(path) for path in files)


def series_files(folder: Path) -> list[Path]:
    """The DICOM files that lie in a folder itself, sorted by name."""
    return sorted(path for path in folder.glob("[!.]*") if path.is_file() and _may_be_slice(path))


def _may_be_slice(path: Path) -> bool:
    if path.name.upper() == "DICOMDIR":
        return False
    return images.is_dicom(path) or path.suffix[1:].isdigit()  # a UID as the name


def _unreadable(path: Path, reason: str) -> FedImagingError:
    return FedImagingError(f"{path}: {' '.join(reason.split())}", Reason.UNREADABLE_IMAGES)


def _sides(affine: Affine) -> Affine:
    """The voxel's sides in mm (3,)."""
    sides: Affine = np.sqrt((affine[:3, :3] ** 2).sum(0))
    return sides


def _corners(shape: tuple[int, ...], affine: Affine) -> Affine:
    """World coordinates (8, 3) of the centres of the voxels in the corners."""
    indices = np.array([[*corner, 1] for corner in itertools.product(*((0, side - 1) for side in shape))])
    corners: Affine = (indices @ affine.T)[:, :3]
    return corners


def _largest_move(shape: tuple[int, ...], first: Affine, second: Affine) -> float:
    """How far apart two affines put a corner of a volume, in mm."""
    moves = _corners(shape, first) - _corners(shape, second)
    return float(np.sqrt((moves**2).sum(1)).max())


def _check_same_place(path: Path, shape: tuple[int, ...], affine: Affine, image: Volume) -> None:
    of_image = image.array.shape[1:]
    name = image.path or "its image"
    if shape != of_image:
        text = " x ".join(map(str, shape)), " x ".join(map(str, of_image))
        raise FedImagingError(
            f"{path}: has {text[0]} voxels, but {name} has {text[1]}; give the mask that was drawn on this image",
            Reason.BAD_MANIFEST,
        )
    move = _largest_move(shape, affine, image.affine)
    if move > _SAME * float(min(image.spacing)):
        raise FedImagingError(
            f"{path}: lies {move:.3g} mm from {name} by its affine; give the mask that was drawn on this image, of the "
            "same patient",
            Reason.BAD_MANIFEST,
        )


def _reoriented(values: NDArray[Any], affine: Affine, toward: Affine) -> tuple[NDArray[Any], Affine]:
    """Values and affine with axes turned and flipped so that they run closest to the axes that `toward` maps to."""
    orientation = io_orientation(toward)
    turned = apply_orientation(values, orientation)
    return turned, affine @ inv_ornt_aff(orientation, values.shape)


def _read_nifti(path: Path) -> Volume:
    values, affine = _load_nifti(path)
    values, affine = _reoriented(values, affine, affine)
    return Volume(np.ascontiguousarray(values[np.newaxis]), affine, None, path)


def _load_nifti(path: Path) -> tuple[Floats, Affine]:
    """Values (X, Y, Z) as the file orders them, and its affine in mm."""
    try:
        with _opened(path) as stream:
            start = stream.read(_HEADER)
            kind = _nifti_kind(path, start)
            header = kind.header_class(start[: kind.header_class.sizeof_hdr])
            shape, size = _shape(path, header)
            affine = _affine(path, header, shape)
            content = start + stream.read(max(0, size - len(start)))
            while stream.read(_CHUNK):  # to the end, where gzip's checksum is
                pass
        values = kind.from_bytes(content).get_fdata(dtype=np.float32).reshape(shape)
    except FedImagingError:
        raise
    except Exception as error:  # damaged files make gzip and nibabel raise anything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _unreadable(path, f"damaged NIfTI file ({images.reason(error)}); copy it again") from None
    if not (finite := np.isfinite(values)).all():
        count = values.size - int(finite.sum())
        raise _unreadable(path, f"has {count} voxels that are not finite numbers; correct them or leave the case out")
    return values, affine


def _opened(path: Path) -> IO[bytes]:
    """The file's content, inflated if it is a gzip, whatever its name says."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return cast("IO[bytes]", gzip.open(path)) if zipped else path.open("rb")


def _nifti_kind(path: Path, start: bytes) -> Any:
    """nibabel's class for the file, by its magic number."""
    if start[344:348] == b"n+1\0":
        return nib.Nifti1Image
    if start[4:8] == b"n+2\0":
        return nib.Nifti2Image
    if start[344:348] == b"ni1\0" or start[4:8] == b"ni2\0":
        raise _unreadable(path, "is the header of a pair (.hdr, .img); convert it to one .nii.gz file")
    raise _unreadable(path, "is not a NIfTI file; leave it out of the dataset, or convert it to .nii.gz")


def _shape(path: Path, header: Any) -> tuple[tuple[int, ...], int]:
    """The three sides in voxels, and the bytes of the file up to the last voxel."""
    shape = tuple(int(side) for side in header.get_data_shape())
    if math.prod(shape[3:]) > 1:
        what = f"is {len(shape)}D ({' x '.join(map(str, shape))})"
        raise _unreadable(path, f"{what}, but a case is one 3D volume; write each volume to a file of its own")
    if len(shape) < 3:
        raise _unreadable(path, f"has {len(shape)} dimensions, not 3; leave it out of the dataset")
    if not 0 < math.prod(shape) <= MAX_VOXELS:
        sides = " x ".join(map(str, shape))
        raise _unreadable(path, f"has {sides} voxels; at least 1 and at most {MAX_VOXELS} can be read")
    kind = header.get_data_dtype()
    if kind.kind not in "iuf":
        raise _unreadable(path, f"has voxels of the type {header['datatype']} (colour or complex), not plain numbers")
    offset = float(header["vox_offset"])
    if not 0 <= offset <= _LARGEST_OFFSET:
        raise _unreadable(path, f"damaged NIfTI file (its voxels begin at byte {offset:g}); copy it again")
    return shape[:3], int(offset) + math.prod(shape) * kind.itemsize


def _affine(path: Path, header: Any, shape: tuple[int, ...]) -> Affine:
    """From voxel indices to RAS+ mm: the sform, or else the qform."""
    sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    given = [np.asarray(matrix, dtype=np.float64) for matrix in (sform, qform) if matrix is not None]
    if not given:
        raise _unreadable(path, "has neither sform nor qform, so left and right are unknown; set one of the two")
    for name, matrix in (("sform", sform), ("qform", qform)):
        if matrix is not None and not _is_invertible(np.asarray(matrix, dtype=np.float64)):
            raise _unreadable(path, f"has an affine ({name}) that is not invertible; correct its header")
    move = _largest_move(shape, given[0], given[-1])
    if move > _SAME * float(_sides(given[0]).min()):
        raise _unreadable(
            path,
            f"sform and qform disagree by {move:.3g} mm, so where its voxels lie is in doubt; keep the right one and "
            "set the code of the other to 0",
        )
    scale = _UNITS.get(header.get_xyzt_units()[0], 1.0)
    return np.diag([scale, scale, scale, 1.0]) @ given[0]


def _is_invertible(affine: Affine) -> bool:
    if not np.isfinite(affine).all():
        return False
    sides = _sides(affine)
    return bool(sides.min() > 0 and abs(np.linalg.det(affine[:3, :3] / sides)) > 1e-3)


@dataclass(frozen=True)
class _Slice:
    """Where one file of a series lies; lengths in mm, in DICOM's LPS+ coordinates."""

    path: Path
    series: str
    modality: str
    shape: tuple[int, int]
    spacing: Affine
    """Between rows and between columns, (2,)."""
    position: Affine
    """Of the first voxel's centre, (3,)."""
    orientation: Affine
    """Direction of growing column and of growing row index, (2, 3)."""


def _read_series(folder: Path) -> Volume:
    files = series_files(folder)
    if not files:
        raise _unreadable(folder, "holds no DICOM file; give the folder of one series, or a NIfTI file")
    slices = [_slice(path) for path in files]
    _check_one_series(folder, slices)
    slices, step = _stacked(folder, slices)
    first = slices[0]
    rows, columns = first.shape
    if len(slices) * rows * columns > MAX_VOXELS:
        raise _unreadable(folder, f"has {len(slices)} slices of {columns} x {rows}; at most {MAX_VOXELS} can be read")
    values = np.empty((columns, rows, len(slices)), dtype=np.float32)
    for index, one in enumerate(slices):
        values[:, :, index] = images.read_slice(one.path).T
    affine = np.eye(4)
    affine[:3, 0] = first.orientation[0] * first.spacing[1]
    affine[:3, 1] = first.orientation[1] * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = first.position
    affine = _DICOM_TO_RAS @ affine
    turned, affine = _reoriented(values, affine, affine)
    return Volume(np.ascontiguousarray(turned[np.newaxis]), affine, first.modality or None, folder)


def _slice(path: Path) -> _Slice:
    header = images.read_header(path)
    if "Rows" not in header or "Columns" not in header:
        raise _unreadable(path, "is no DICOM image; take it out of the series' folder")
    if int(images.element(header, "NumberOfFrames") or 1) > 1 or "PerFrameFunctionalGroupsSequence" in header:
        raise _unreadable(path, "is multi-frame; convert it to NIfTI or to one slice a file")
    spacing = _numbers(path, header, "PixelSpacing", 2)
    orientation = _numbers(path, header, "ImageOrientationPatient", 6).reshape(2, 3)
    if not np.allclose(orientation @ orientation.T, np.eye(2), atol=1e-3):
        raise _unreadable(path, "ImageOrientationPatient is not two unit vectors at right angles; correct its header")
    if spacing.min() <= 0:
        raise _unreadable(path, "PixelSpacing is not positive; correct its header")
    return _Slice(
        path,
        images.element(header, "SeriesInstanceUID"),
        images.element(header, "Modality"),
        (int(header.Rows), int(header.Columns)),
        spacing,
        _numbers(path, header, "ImagePositionPatient", 3),
        orientation,
    )


def _numbers(path: Path, header: pydicom.Dataset, keyword: str, count: int) -> Affine:
    try:
        numbers = np.array([float(value) for value in header[keyword].value], dtype=np.float64)
    except Exception:  # absent, empty, or an element that can't be converted
        numbers = np.zeros(0)
    if numbers.size != count or not np.isfinite(numbers).all():
        raise _unreadable(path, f"has no {keyword} of {count} numbers, so its place is unknown; leave the series out")
    return numbers


def _check_one_series(folder: Path, slices: list[_Slice]) -> None:
    """All slices are of one series, one size and one orientation, and there are enough for a volume."""
    first = slices[0]
    if (count := len({one.series for one in slices})) > 1:
        raise _unreadable(folder, f"holds {count} DICOM series; put each series into a folder of its own")
    for one in slices[1:]:
        names = f"{first.path.name} and {one.path.name}"
        if not np.allclose(one.orientation, first.orientation, atol=1e-3):
            raise _unreadable(folder, f"mixed orientations ({names}); leave out the localizer, or the series")
        if one.shape != first.shape:
            sizes = " and ".join(f"{columns} x {rows}" for rows, columns in (first.shape, one.shape))
            raise _unreadable(folder, f"mixed sizes, {sizes} ({names}); leave out what is not of the volume")
        if not np.allclose(one.spacing, first.spacing, rtol=1e-3):
            raise _unreadable(folder, f"mixed PixelSpacing ({names}); leave the series out")
    if len(slices) < 2:
        raise _unreadable(folder, "holds one slice, and a volume has two or more; send the whole series")


def _stacked(folder: Path, slices: list[_Slice]) -> tuple[list[_Slice], Affine]:
    """Slices in the order of their positions along the normal, and the step (3,) from one to the next in mm."""
    normal = np.cross(*slices[0].orientation)
    slices = sorted(slices, key=lambda one: float(one.position @ normal))
    positions = np.array([one.position for one in slices])
    distances = np.diff(positions @ normal)
    usual = float(np.median(distances))
    for place, distance in enumerate(distances):
        names = f"{slices[place].path.name} and {slices[place + 1].path.name}"
        if distance < max(_SAME_POSITION, _REGULAR * usual):
            raise _unreadable(
                folder, f"two slices at the same position ({names}); keep one of them, or one time point or echo"
            )
        if distance > 1.5 * usual:
            raise _unreadable(
                folder,
                f"a gap of {distance:.3g} mm between {names}, where slices lie {usual:.3g} mm apart; send the missing "
                "slices",
            )
        if abs(distance - usual) > _REGULAR * usual:
            raise _unreadable(
                folder,
                f"irregular spacing, {distance:.4g} mm between {names}, {usual:.4g} mm elsewhere; leave the series out",
            )
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    if float(np.linalg.norm(step - (step @ normal) * normal)) > 0.01 * usual:
        raise _unreadable(
            folder, "its slices are shifted sideways (gantry tilt); convert it to NIfTI with tilt correction"
        )
    straight = positions[0] + step * np.arange(len(slices))[:, np.newaxis]
    if float(np.linalg.norm(positions - straight, axis=1).max()) > _SAME * min(usual, slices[0].spacing.min()):
        raise _unreadable(folder, "its slices do not lie on one straight line; leave the series out")
    return slices, step
