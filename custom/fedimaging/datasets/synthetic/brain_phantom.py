"""A brain MRI phantom in numpy: anatomy, white matter lesions, what looks like them elsewhere, and a FLAIR acquisition.

Lengths are millimetres in the patient's frame: x to the right, y to the front, z to the head, the origin in the middle
of the brain. The anatomy is a function of a point, so that any grid, thickness or obliquity samples the same patient.

Lesions lie in white matter and nowhere else. Spots as bright and as large lie in cortex, fluid and skull, scalp fat is
as bright again and the coil's sensitivity varies: brightness alone tells little. What decides the lesions never touches
the random streams of anatomy, spots and acquisition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates

Floats = NDArray[np.float32]

EXTENT = (168.0, 208.0, 152.0)
"""Field of view in mm: right to left, back to front, feet to head."""

MOST_LESIONS = 16

_LATTICE = 4.0
_MARGIN = 40.0
_SULCUS_DEPTH = 15.0
_RELAXATION = {
    "white": ((610.0, 860.0), 72.0, 0.70),
    "grey": ((1050.0, 1380.0), 95.0, 0.82),
    "lesion": ((1150.0, 1450.0), 165.0, 0.88),
    "fluid": ((3900.0, 4200.0), 1500.0, 1.0),
    "fat": ((280.0, 370.0), 95.0, 0.9),
    "muscle": ((950.0, 1350.0), 38.0, 0.8),
    "bone": ((400.0, 500.0), 8.0, 0.15),
    "marrow": ((350.0, 420.0), 55.0, 0.45),
}
"""Tissue -> T1 at 1.5 and 3 tesla, T2 (ms), proton density; of the order that the literature gives."""


@dataclass(frozen=True)
class Scanner:
    """How a department takes a FLAIR volume.

    Args:
        field: in tesla; T1 is interpolated between 1.5 and 3.
        repetition: TR in ms.
        echo: TE in ms.
        inversion: TI in ms; the fluid's null is near 0.65 of its T1.
        bias: standard deviation of the coil's logarithmic sensitivity over the head.
        noise: standard deviation in each channel, relative to white matter.
        blur: width of the point spread in voxels (standard deviation).
        scale: stored value of white matter.
    """

    field: float = 3.0
    repetition: float = 9000.0
    echo: float = 110.0
    inversion: float = 2500.0
    bias: float = 0.12
    noise: float = 0.05
    blur: float = 0.4
    scale: float = 400.0


@dataclass(frozen=True)
class Subject:
    """What a volume depends on besides the scanner: the same `patient` seed gives the same anatomy and lesions.

    Args:
        lesions: how many of the patient's lesions, `MOST_LESIONS` in a life, there are at the time of the study.
    """

    patient: tuple[int, ...]
    study: tuple[int, ...]
    age: int = 50
    lesions: int = 0


@dataclass(frozen=True)
class Grid:
    """Where voxels lie in the scanner's world.

    Args:
        shape: voxels along right, front and head.
        voxel: their sides in mm; the largest is sampled more densely and averaged, as a thick slice is.
        affine: (4, 4) from voxel indices to RAS+ mm.
    """

    shape: tuple[int, int, int]
    voxel: tuple[float, float, float]
    affine: NDArray[np.float64]

    def fine(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """How many samples there are along each axis, and how many of them make a voxel."""
        inner = min(self.voxel)
        parts = [max(1, math.ceil(side / inner - 0.25)) for side in self.voxel]
        x, y, z = (count * part for count, part in zip(self.shape, parts, strict=True))
        return (x, y, z), (parts[0], parts[1], parts[2])

    def points(self) -> Floats:
        """World coordinates (3, X, Y, Z) of the fine samples."""
        shape, parts = self.fine()
        axes = [(np.arange(count) + 0.5) / part - 0.5 for count, part in zip(shape, parts, strict=True)]
        matrix = self.affine[:3]
        places = [matrix[:, axis, None] * values for axis, values in enumerate(axes)]
        x, y, z = places[0][:, :, None, None], places[1][:, None, :, None], places[2][:, None, None, :]
        return np.asarray(x + y + z + matrix[:, 3, None, None, None], dtype=np.float32)

    def averaged(self, values: Floats) -> Floats:
        """Fine samples -> voxels."""
        _, (a, b, c) = self.fine()
        x, y, z = self.shape
        return np.asarray(values.reshape(x, a, y, b, z, c).mean((1, 3, 5)), dtype=np.float32)


def flair(grid: Grid, subject: Subject, scanner: Scanner) -> tuple[Floats, NDArray[np.bool_]]:
    """One volume and the mask of its lesions, both (X, Y, Z); a study with lesions has a mask that is not empty."""
    brain = _Brain(subject)
    points = _patient_frame(grid.points(), subject)
    soft = min(grid.voxel)
    tissue = brain.tissue(points, soft)
    for growth in (1.0, 1.4, 2.0, 2.8):  # a lesion that falls between the voxels is made larger
        lesions = brain.lesions(points, subject.lesions, soft, growth * max(grid.voxel)) * tissue.white
        mask = grid.averaged(lesions) > 0.5
        if mask.any() or not subject.lesions:
            break
    signal = _signal(scanner)
    values = tissue.signal(signal)
    for weight, brightness in brain.spots(points, soft, max(grid.voxel)):
        values += weight * (1 - tissue.white) * tissue.inside * (brightness * signal["lesion"] - values)
    values += lesions * (brain.lesion_contrast * signal["lesion"] - values)
    return _acquired(grid, grid.averaged(values), subject, scanner), mask


def _signal(scanner: Scanner) -> dict[str, float]:
    """Signal of each tissue in an inversion recovery spin echo, white matter being 1."""
    share = float(np.clip((scanner.field - 1.5) / 1.5, 0, 1.2))
    values: dict[str, float] = {}
    for name, ((low, high), t2, density) in _RELAXATION.items():
        t1 = low + share * (high - low)
        recovered = 1 - 2 * math.exp(-scanner.inversion / t1) + math.exp(-scanner.repetition / t1)
        values[name] = abs(recovered) * math.exp(-scanner.echo / t2) * density
    return {name: value / values["white"] for name, value in values.items()}


def _patient_frame(world: Floats, subject: Subject) -> Floats:
    """The head lies turned and shifted in the scanner, otherwise in each study."""
    rng = np.random.default_rng((*subject.study, 31))
    turned = rotation(rng.normal(0, 4, 3)).T.astype(np.float32)
    shift = rng.normal(0, 3, 3).astype(np.float32)
    return np.tensordot(turned, world - shift[:, None, None, None], axes=1)


def rotation(degrees: NDArray[np.float64] | tuple[float, float, float]) -> NDArray[np.float64]:
    """(3, 3) turns about x, then y, then z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        a, b = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
        matrix = turn @ matrix
    return matrix


@dataclass(frozen=True)
class _Tissue:
    """What is where, as layers of (share of the voxel, tissue), a later one over the ones before."""

    layers: tuple[tuple[Floats, str], ...]
    white: Floats
    """Share of white matter."""
    inside: Floats
    """Share of the head."""

    def signal(self, of: dict[str, float]) -> Floats:
        values = np.zeros_like(self.white)
        for share, name in self.layers:
            values += share * (of[name] - values)
        return values


class _Brain:
    """One patient's head."""

    def __init__(self, subject: Subject) -> None:
        rng = np.random.default_rng((*subject.patient, 30))
        aged = float(np.clip((subject.age - 20) / 60, 0, 1.2))
        self.size = np.array([1 + rng.normal(0, 0.03) for _ in range(3)], dtype=np.float32)
        self.ventricle = float((0.85 + 0.45 * aged) * rng.lognormal(0, 0.12))
        self.sulcus = float(0.7 + 0.5 * aged + rng.uniform(0, 0.2))
        self.cortex = float(rng.uniform(3.6, 4.4))
        self.scalp = float(rng.uniform(4, 7))
        self.lesion_contrast = float(rng.uniform(0.85, 1.05))
        self._fields = [_smooth(rng, sigma) for sigma in (22.0, 22.0, 22.0)]
        self._fold = _sheets(_smooth(rng, 5.0))
        self._detail = _smooth(rng, 5.0)
        self._patient = subject.patient

    def tissue(self, points: Floats, soft: float) -> _Tissue:
        """Layers at points (3, ...), their edges `soft` mm wide."""
        p = self._warped(points)
        brain, head = self._brain(p), _ellipsoid(p, (0, -2, -4), (79, 99, 92))
        head = np.minimum(head, _ellipsoid(p, (0, 10, -75), (58, 75, 60)))
        fluid = self._fluid(p)
        depth = np.minimum(np.minimum(-brain, self._sulci(points, p, -brain)), fluid + self.sulcus + self.cortex)
        nuclei = np.minimum.reduce([_ellipsoid(_mirrored(p), *place) for place in _NUCLEI])
        below = brain - 2.5
        white = _step(self.sulcus + self.cortex - depth, soft) * (1 - _step(nuclei, soft)) * (1 - _step(fluid, soft))
        layers = (
            (_step(head, soft), "fat"),
            (_step(np.maximum(head + self.scalp, -below), soft), "muscle"),
            (_step(below - 6.5, soft), "bone"),
            (_step(np.abs(below - 3.2) - 1.0, soft), "marrow"),
            (_step(below, soft), "fluid"),
            (_step(self.sulcus - depth, soft), "grey"),
            (_step(self.sulcus + self.cortex - depth, soft), "white"),
            (_step(np.maximum(nuclei, self.sulcus - depth), soft), "grey"),
            (_step(fluid, soft), "fluid"),
        )
        return _Tissue(layers, white, _step(head, soft))

    def lesions(self, points: Floats, count: int, soft: float, largest_voxel: float) -> Floats:
        """Share of lesion (...), white matter or not: the first `count` of the patient's lesions."""
        blobs = _Blobs(points, self._warp(self._detail, points), soft)
        if count:
            rng = np.random.default_rng((*self._patient, 32))
            for place in self._places(rng, "white", MOST_LESIONS)[:count]:
                radius = max(float(np.clip(rng.lognormal(1.85, 0.35), 4.5, 14)), 0.8 * largest_voxel)
                blobs.add(place, radius, rng)
        return blobs.shares

    def spots(self, points: Floats, soft: float, largest_voxel: float) -> list[tuple[Floats, float]]:
        """What is as bright as a lesion without being one: shares (...) and brightness, by where it lies."""
        rng = np.random.default_rng((*self._patient, 33))
        detail = self._warp(self._detail, points)
        found: list[tuple[Floats, float]] = []
        for where, usual in (("grey", 4.0), ("fluid", 3.0), ("skull", 3.0)):
            blobs = _Blobs(points, detail, soft)
            for place in self._places(rng, where, 1 + rng.poisson(usual)):
                radius = max(float(np.clip(rng.lognormal(1.75, 0.35), 3.5, 12)), 0.7 * largest_voxel)
                blobs.add(place, radius, rng)
            found.append((blobs.shares, float(rng.uniform(0.85, 1.15))))
        return found

    def _places(self, rng: np.random.Generator, where: str, count: int) -> Floats:
        """(count, 3) points of the patient's frame in one tissue, those in white matter rather near the ventricles."""
        points = rng.uniform((-65, -85, -45), (65, 85, 75), (6000, 3)).astype(np.float32).T
        p = self._warped(points)
        brain, fluid = self._brain(p), self._fluid(p)
        depth = np.minimum(-brain, self._sulci(points, p, -brain))
        edge = self.sulcus + self.cortex
        nuclei = np.minimum.reduce([_ellipsoid(_mirrored(p), *place) for place in _NUCLEI])
        inside = {
            "white": (depth > edge + 1.5) & (fluid > 2.5) & (nuclei > 2.5) & (p[2] > -30),
            "grey": (depth > self.sulcus) & (depth < edge) & (fluid > edge) & (brain < -1) & (p[2] > -30),
            "fluid": (fluid < -1) | ((brain < 0) & (depth < self.sulcus) & (fluid > edge)),
            "skull": (brain > 4) & (brain < 9),
        }[where]
        weights = np.where(inside, 1.0, 0.0)
        if where == "white":
            weights = weights * (0.25 + np.exp(-((fluid - 6) ** 2) / 60))
        chosen = rng.choice(points.shape[1], count, replace=False, p=weights / weights.sum())
        return np.asarray(points[:, chosen].T)

    def _warped(self, points: Floats) -> Floats:
        """Points in the frame of the usual brain."""
        moved = np.stack([self._warp(field, points) for field in self._fields]) * np.float32(3.5)
        size = self.size.reshape(3, *[1] * (points.ndim - 1))
        return np.asarray(points / size + moved, dtype=np.float32)

    def _warp(self, field: Floats, points: Floats) -> Floats:
        """A field's values at points (3, ...)."""
        middle = np.array(field.shape, dtype=np.float32).reshape(3, *[1] * (points.ndim - 1)) / 2
        return np.asarray(map_coordinates(field, points / np.float32(_LATTICE) + middle, order=1, mode="nearest"))

    def _brain(self, p: Floats) -> Floats:
        """Signed distance to cerebrum, cerebellum and brainstem; negative inside."""
        cerebrum = np.maximum(_ellipsoid(p, (0, 0, 4), (66, 84, 66)), -34 - p[2] + 0.1 * np.abs(p[1]))
        cerebellum = _ellipsoid(p, (0, -42, -44), (46, 33, 24))
        stem = np.maximum(np.sqrt(p[0] ** 2 + (p[1] + 16) ** 2) - 13, p[2] + 10)
        return np.minimum(np.minimum(cerebrum, cerebellum), stem)

    def _sulci(self, points: Floats, p: Floats, depth: Floats) -> Floats:
        """Distance to the nearest sulcus or to the fissure between the hemispheres."""
        folds = np.abs(self._warp(self._fold, points)) + np.maximum(depth - _SULCUS_DEPTH, 0)
        stem = _ellipsoid(p, (0, -20, -45), (18, 22, 60))
        folds += np.maximum(-stem, 0)
        callosum = _ellipsoid(p, (0, -6, 8), (26, 44, 24))
        fissure = np.abs(p[0] + 1.5 * np.sin(p[1] / 23)) + 1.5 * np.maximum(-callosum, 0) + np.maximum(-28 - p[2], 0)
        sylvian = np.abs(p[2] + 4 - 0.25 * p[1]) + np.maximum(42 - np.abs(p[0]), 0) + np.maximum(np.abs(p[1]) - 40, 0)
        return np.minimum(np.minimum(folds, fissure), sylvian)

    def _fluid(self, p: Floats) -> Floats:
        """Signed distance to the ventricles."""
        size, m = self.ventricle, _mirrored(p)
        body = _ellipsoid(_turned(m, (11 * size, -6, 15), (-8, 0, -13)), (0, 0, 0), (5.5 * size, 31 * size, 7.5 * size))
        horn = _ellipsoid(_turned(m, (25, -38, -2), (25, 0, -14)), (0, 0, 0), (4.5 * size, 22 * size, 5.5 * size))
        third = _ellipsoid(m, (0, -6, -2), (2.4 * size, 13, 9))
        fourth = _ellipsoid(m, (0, -29, -38), (6 * size, 5 * size, 9))
        return np.minimum(np.minimum(body, horn), np.minimum(third, fourth))


_NUCLEI = (
    ((11.0, -18.0, 5.0), (8.0, 13.0, 9.0)),
    ((26.0, 3.0, 3.0), (5.5, 17.0, 10.0)),
    ((15.0, 17.0, 13.0), (4.5, 9.0, 9.0)),
)
"""Centre and radii of thalamus, lentiform nucleus and head of the caudate on the right."""


def _step(distance: Floats, soft: float) -> Floats:
    """1 where the distance is negative, 0 where it is positive, straight over `soft` mm between."""
    return np.clip(np.float32(0.5) - distance / np.float32(soft), 0, 1)


def _ellipsoid(p: Floats, center: tuple[float, float, float], radii: tuple[float, float, float]) -> Floats:
    """Distance to an ellipsoid with axes along the frame's, to first order; negative inside."""
    shape = (3, *[1] * (p.ndim - 1))
    q, r = p - np.array(center, dtype=np.float32).reshape(shape), np.array(radii, dtype=np.float32).reshape(shape)
    scaled = np.sqrt(((q / r) ** 2).sum(0))
    steep = np.sqrt(((q / r**2) ** 2).sum(0))
    return np.asarray(scaled * (scaled - 1) / np.maximum(steep, 1e-6), dtype=np.float32)


def _mirrored(p: Floats) -> Floats:
    return np.stack([np.abs(p[0]), p[1], p[2]])


def _turned(p: Floats, center: tuple[float, float, float], degrees: tuple[float, float, float]) -> Floats:
    """Points in a frame with another origin and direction."""
    moved = p - np.array(center, dtype=np.float32).reshape(3, *[1] * (p.ndim - 1))
    return np.tensordot(rotation(degrees).astype(np.float32), moved, axes=1)


def _smooth(rng: np.random.Generator, sigma: float) -> Floats:
    """A random field on the lattice with a correlation length in mm, of mean 0 and standard deviation 1."""
    shape = tuple(math.ceil((side + 2 * _MARGIN) / _LATTICE) for side in EXTENT)
    field = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma / _LATTICE, mode="wrap")
    return np.asarray((field - field.mean()) / field.std(), dtype=np.float32)


def _sheets(field: Floats) -> Floats:
    """Signed distance in mm to the surfaces where a field is 0, to first order."""
    slope = np.sqrt(sum(derivative**2 for derivative in np.gradient(field, _LATTICE)))
    return np.asarray(np.clip(field / np.maximum(slope, 0.02), -30, 30), dtype=np.float32)


class _Blobs:
    """Stretched, uneven balls at points (3, X, Y, Z); `shares` (X, Y, Z) is how much of each sample they fill."""

    def __init__(self, points: Floats, detail: Floats, soft: float) -> None:
        self.shares = np.zeros(points.shape[1:], dtype=np.float32)
        self._points, self._detail, self._soft = points, detail, soft

    def add(self, center: Floats, radius: float, rng: np.random.Generator) -> None:
        axes = rotation(rng.uniform(0, 180, 3)) / np.exp(rng.normal(0, 0.25, 3))[:, None]
        far = np.abs(self._points - center[:, None, None, None]).max(0)
        near = [np.flatnonzero(far.min(others) < 2.2 * radius + self._soft) for others in ((1, 2), (0, 2), (0, 1))]
        if not all(hit.size for hit in near):
            return
        box = tuple(slice(int(hit[0]), int(hit[-1]) + 1) for hit in near)
        places = self._points[(slice(None), *box)] - center[:, None, None, None]
        distance = np.sqrt((np.tensordot(axes.astype(np.float32), places, 1) ** 2).sum(0))
        edge = distance - radius * (1 + np.float32(0.18) * self._detail[box])
        np.maximum(self.shares[box], _step(edge, self._soft), out=self.shares[box])


def _acquired(grid: Grid, values: Floats, subject: Subject, scanner: Scanner) -> Floats:
    """What the scanner stores: point spread, coil sensitivity, Rician noise, and units of its own."""
    rng = np.random.default_rng((*subject.study, 34))
    blurred = gaussian_filter(values, scanner.blur)
    sensitivity = np.exp(scanner.bias * _bias(grid.shape, rng))
    noise = scanner.noise * float(rng.lognormal(0, 0.15))
    real = blurred * sensitivity + rng.normal(0, noise, values.shape)
    magnitude = np.hypot(real, rng.normal(0, noise, values.shape))
    return np.asarray(magnitude * scanner.scale * rng.lognormal(0, 0.2), dtype=np.float32)


def _bias(shape: tuple[int, int, int], rng: np.random.Generator) -> Floats:
    """A random polynomial of the third degree over the field of view, of standard deviation 1."""
    axes = np.meshgrid(*(np.linspace(-1, 1, side, dtype=np.float32) for side in shape), indexing="ij", sparse=True)
    powers = [(i, j, k) for i in range(4) for j in range(4) for k in range(4) if 0 < i + j + k <= 3]
    field = sum(rng.normal() * axes[0] ** i * axes[1] ** j * axes[2] ** k for i, j, k in powers)
    field = np.asarray(field, dtype=np.float32)
    return np.asarray((field - field.mean()) / field.std(), dtype=np.float32)
