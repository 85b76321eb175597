"""Synthetic colour photographs: ten classes of figures that differ in shape and, less surely, in hue.

Cameras differ from hospital to hospital in tint, sharpness, noise and compression.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from fedimaging.datasets.manifest import Case, Manifest
from fedimaging.datasets.synthetic.hospitals import (
    MOST_SITES,
    Plan,
    Request,
    make_manifest,
    patient_id,
    studies_per_patient,
)
from fedimaging.errors import FedImagingError

PHANTOM = 1
"""Version of the pictures: one more whenever the same seed gives other pixels."""

_LEAST_SECOND = 0.1
"""least share of a hospital's second most frequent class: nothing can be learned from one class"""


@dataclass(frozen=True)
class Camera:
    """What is typical of one hospital's photographs.

    Args:
        tint: gains of red, green and blue.
        blur: in thousandths of the image's side.
        noise: standard deviation, of 255.
        quality: of the JPEG files.
    """

    name: str
    vendor: str
    tint: tuple[float, float, float]
    blur: float
    noise: float
    quality: int


def cameras(count: int) -> list[Camera]:
    """hospital-a, hospital-b, ...: each with a camera of its own."""
    if not 1 <= count <= MOST_SITES:
        raise FedImagingError(f"sites {count}: give a number from 1 to {MOST_SITES}")
    return [_camera(index) for index in range(count)]


def _camera(index: int) -> Camera:
    rng, letter = np.random.default_rng((index, 79)), chr(ord("a") + index)
    red, green, blue = (float(gain) for gain in rng.uniform(0.8, 1.1, 3))
    return Camera(
        name=f"hospital-{letter}",
        vendor=f"Vendor {letter.upper()}",
        tint=(red, green, blue),
        blur=float(rng.uniform(2, 12)),
        noise=float(rng.uniform(3, 12)),
        quality=int(rng.integers(75, 96)),
    )


Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Pen:
    """Where and how a figure is drawn; centre (x, y) and radius in pixels."""

    canvas: ImageDraw.ImageDraw
    rng: np.random.Generator
    x: float
    y: float
    radius: float
    colour: Colour

    def box(self) -> tuple[float, float, float, float]:
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius

    def width(self, share: float) -> int:
        return max(2, int(self.radius * share))


Draw = Callable[[Pen], None]


def _polygon(corners: int, inner: float = 1.0) -> Draw:
    """A regular polygon; with ``inner`` below 1 a star."""

    def draw(pen: Pen) -> None:
        turn, steps = pen.rng.uniform(0, 2 * math.pi), corners * (2 if inner < 1 else 1)
        angles = [turn + 2 * math.pi * i / steps for i in range(steps)]
        radii = [pen.radius * (inner if i % 2 else 1) for i in range(steps)]
        pen.canvas.polygon(
            [
                (pen.x + r * math.cos(angle), pen.y + r * math.sin(angle))
                for angle, r in zip(angles, radii, strict=True)
            ],
            fill=pen.colour,
        )

    return draw


def _disc(pen: Pen) -> None:
    pen.canvas.ellipse(pen.box(), fill=pen.colour)


def _ring(pen: Pen) -> None:
    pen.canvas.ellipse(pen.box(), outline=pen.colour, width=pen.width(0.3))


def _crescent(pen: Pen) -> None:
    start = pen.rng.uniform(0, 360)
    pen.canvas.arc(pen.box(), start, start + 200, fill=pen.colour, width=pen.width(0.45))


def _cross(pen: Pen) -> None:
    turn = pen.rng.uniform(0, math.pi)
    for angle in (turn, turn + math.pi / 2):
        _bar(pen, pen.x, pen.y, angle, pen.width(0.4))


def _stripes(pen: Pen) -> None:
    turn = pen.rng.uniform(0, math.pi)
    for step in (-0.8, -0.27, 0.27, 0.8):
        away = step * pen.radius
        _bar(pen, pen.x - away * math.sin(turn), pen.y + away * math.cos(turn), turn, pen.width(0.2))


def _bar(pen: Pen, x: float, y: float, angle: float, width: int) -> None:
    dx, dy = pen.radius * math.cos(angle), pen.radius * math.sin(angle)
    pen.canvas.line((x - dx, y - dy, x + dx, y + dy), fill=pen.colour, width=width)


def _dots(pen: Pen) -> None:
    for _ in range(9):
        angle, away, r = (
            pen.rng.uniform(0, 2 * math.pi),
            pen.radius * math.sqrt(pen.rng.uniform(0, 1)),
            pen.radius * 0.2,
        )
        x, y = pen.x + away * math.cos(angle), pen.y + away * math.sin(angle)
        pen.canvas.ellipse((x - r, y - r, x + r, y + r), fill=pen.colour)


FIGURES: dict[str, Draw] = {
    "crescent": _crescent,
    "cross": _cross,
    "disc": _disc,
    "dots": _dots,
    "hexagon": _polygon(6),
    "ring": _ring,
    "square": _polygon(4),
    "star": _polygon(5, inner=0.4),
    "stripes": _stripes,
    "triangle": _polygon(3),
}


@dataclass(frozen=True)
class Photograph:
    """One photograph of a patient."""

    path: str
    camera: Camera
    site: int
    patient: int
    number: int
    figure: str
    request: Request

    def image(self) -> Image.Image:
        rng = np.random.default_rng((self.request.seed, self.site + 1, self.patient, self.number, 60))
        side = self.request.longer
        hue = list(FIGURES).index(self.figure) / len(FIGURES) + rng.normal(0, 0.12)
        ground = _colour(rng.uniform(0, 1), rng.uniform(0.1, 0.35), rng.uniform(0.45, 0.85))
        picture = Image.new("RGB", (side, side), ground)
        canvas = ImageDraw.Draw(picture)
        x, y = side * rng.uniform(0.35, 0.65, 2)
        colour = _colour(hue % 1, rng.uniform(0.5, 0.9), rng.uniform(0.35, 0.95))
        FIGURES[self.figure](Pen(canvas, rng, float(x), float(y), float(side * rng.uniform(0.2, 0.33)), colour))
        blurred = picture.filter(ImageFilter.GaussianBlur(self.camera.blur * side / 1000))
        pixels = np.asarray(blurred, dtype=np.float32) * np.array(self.camera.tint)
        pixels = pixels * rng.uniform(0.8, 1.15) + rng.normal(0, self.camera.noise, pixels.shape)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    def write(self, folder: Path) -> None:
        """Write the JPEG file below `folder`."""
        path = folder / self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.image().save(path, quality=self.camera.quality)


def _colour(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def plan_photographs(camera: Camera, site: int, cases: int, request: Request) -> Plan:
    """Photographs for classification: who has which of the ten figures, and in which split.

    A patient shows one figure, in one to three photographs.
    """
    if request.multi_label:
        raise FedImagingError("--multi-label: photographs show one figure each; leave it out")
    rng = np.random.default_rng((request.seed, site + 1, 61))
    counts = studies_per_patient(cases, rng)
    shares = class_shares(len(FIGURES), request.concentration, rng)
    wanted = np.round(np.cumsum(shares) * len(counts)).astype(int)
    figures = np.searchsorted(wanted, rng.permutation(len(counts)), side="right")
    names = list(FIGURES)
    items = [
        Photograph(
            f"images/{patient_id(site, patient)}/{number}.jpg", camera, site, patient, number, names[figure], request
        )
        for patient, (studies, figure) in enumerate(zip(counts, figures, strict=True), start=1)
        for number in range(1, studies + 1)
    ]
    return Plan(camera, _manifest(items, camera, request), items)


def class_shares(classes: int, concentration: float | None, rng: np.random.Generator) -> NDArray[np.floating]:
    """A site's share of each class, drawn from a symmetric Dirichlet distribution (Hsu et al. 2019); None for equal.

    The second largest is a tenth at least, since nothing can be learned from one class.
    """
    if concentration is None:
        return np.full(classes, 1 / classes)
    shares = rng.dirichlet(np.full(classes, concentration))
    first, second = np.argsort(-shares, kind="stable")[:2]
    lacking = max(0.0, _LEAST_SECOND - shares[second])
    shares[second] += lacking
    shares[first] -= lacking
    return shares


def _manifest(items: list[Photograph], camera: Camera, request: Request) -> Manifest:
    cases = [
        Case(image=item.path, label=item.figure, patient=patient_id(item.site, item.patient), vendor=camera.vendor)
        for item in items
    ]
    return make_manifest(
        camera,
        request,
        cases,
        {patient_id(item.site, item.patient): item.figure for item in items},
        phantom=PHANTOM,
        matrix=(request.longer, request.longer),
        modality="XC",
        task="classification",
        classes=list(FIGURES),
    )
