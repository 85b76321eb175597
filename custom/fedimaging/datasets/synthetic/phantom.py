"""A chest radiograph phantom in numpy: anatomy, findings, X-ray exposure and image processing.

Lengths are centimetres. The patient frame has its origin in the middle of the chest, x to the patient's left (the
image's right), y to the feet. A projection is a map of water-equivalent path lengths; `expose` turns it into an image
by the Beer-Lambert law.

What decides the finding never touches the random streams of anatomy, positioning, distractors and exposure, so that
two radiographs of one patient and study that differ in the finding are equal outside of it, up to the automatic
ranging of the grey scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.floating[Any]]
FINDINGS = ("consolidation", "effusion")
AIR_IN_LUNG = 0.78
ATTENUATION = 0.19
LEAD = 8.0


@dataclass(frozen=True)
class Imaging:
    """How a department takes and processes radiographs.

    Args:
        exposure: photons that reach an unshadowed pixel, relative to 1.0; less is noisier.
        scatter: share of scattered radiation, 0 to 1.
        blur: width of the detector's point spread, in cm (standard deviation).
        local_contrast: strength of the equalisation of large structures, 0 (none) to 1.
        gamma: exponent of the display curve.
        collimated: probability of visible collimator blades.
        devices: probability of lines, electrodes and tubes.
    """

    exposure: float = 1.0
    scatter: float = 0.2
    blur: float = 0.08
    local_contrast: float = 0.3
    gamma: float = 1.0
    collimated: float = 0.2
    devices: float = 0.15


@dataclass(frozen=True)
class Subject:
    """What a projection depends on besides the finding: the same `patient` seed gives the same anatomy."""

    patient: tuple[int, ...]
    study: tuple[int, ...]
    sex: str = "F"
    age: int = 50
    view: str = "PA"


@dataclass(frozen=True)
class _Frame:
    """The pixel grid in patient coordinates: `x`, `y` (rows, cols) and the affine from patient to pixel."""

    x: Image
    y: Image
    to_pixel: NDArray[np.float64]
    pitch: float

    def pixels(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, 2) points as x, y in cm -> (n, 2) as column, row."""
        return points @ self.to_pixel[:, :2].T + self.to_pixel[:, 2]


@dataclass(frozen=True)
class _Anatomy:
    """One patient's measures and the positioning of one study, all in cm where a length."""

    width: float
    depth: float
    apex: float
    wall: float
    fat: float
    dome: tuple[float, float]
    heart: tuple[float, float, float]
    heart_half: float
    mediastinum: float
    knob: float
    bend: float
    rib_spacing: float
    rib_first: float
    rib_radius: Image
    rib_shift: Image
    bone: float
    clavicle_rise: float
    scapula: float
    breast: float
    arms: float
    stomach: tuple[float, float, float]

    def thorax(self, y: Image) -> Image:
        """Inner half width of the rib cage at height y."""
        v = np.clip((y - self.apex) / 24.0, 0.0, 1.2)
        return (
            self.width
            * np.maximum(1.0 - np.clip(1.0 - v, 0.0, 1.0) ** 2.6, 1e-4) ** 0.55
            * (1.0 - 0.06 * np.clip(v - 0.75, 0, 1))
        )

    def diaphragm(self, x: Image) -> Image:
        """Height of the domes: flat medially, steep at the costophrenic angles."""
        side = self.dome[0] + (self.dome[1] - self.dome[0]) * _step(x, 6.0)
        r = np.abs(x) / self.width
        return side + 1.1 * (r - 0.42) ** 2 / 0.18 + 4.2 * np.clip(r - 0.55, 0, 1) ** 2 / 0.2

    def costophrenic(self, side: int) -> float:
        """Height of the costophrenic angle on the patient's right (-1) or left (1)."""
        return float(self.diaphragm(np.array([side * self.width * 0.96]))[0])


def _draw_anatomy(subject: Subject) -> _Anatomy:
    """The patient's body from its seed, changed by the study's inspiration and by the view."""
    rng, now = np.random.default_rng(subject.patient), np.random.default_rng((*subject.study, 1))
    woman, supine = subject.sex == "F", subject.view == "AP"
    size = rng.normal(0.96 if woman else 1.03, 0.045)
    habitus = float(np.clip(rng.normal(0, 1), -2, 2.4))
    width = 13.4 * size * rng.normal(1, 0.03)
    breath = now.normal(-0.9 if supine else 0.3, 0.9)
    right = 9.2 * size + rng.normal(0, 0.6) + breath
    ratio = rng.normal(0.48, 0.045) + (0.035 if supine else 0) - 0.012 * breath
    turn = now.normal(0, 0.5)
    half = width * min(max(ratio, 0.38), 0.62)
    tilt = rng.uniform(0.3, 0.75)
    sits = right + 0.9 - math.hypot(half * math.sin(tilt), 0.74 * half * math.cos(tilt))
    heart = (half * rng.uniform(0.28, 0.4) + turn, sits, tilt)
    return _Anatomy(
        width=width,
        depth=15.5 * size,
        apex=-13.2 * size - 0.4 * breath,
        wall=1.6 + 0.5 * (habitus + 2),
        fat=3.0 + 1.6 * (habitus + 2),
        dome=(right, right + rng.normal(1.3, 0.5)),
        heart=heart,
        heart_half=half,
        mediastinum=rng.uniform(2.1, 3.0) * (1.15 if supine else 1),
        knob=rng.uniform(0.5, 1.6) + 0.012 * (subject.age - 50),
        bend=rng.normal(0, 0.5),
        rib_spacing=2.45 * size * rng.normal(1, 0.04),
        rib_first=-12.2 * size + rng.uniform(-0.8, 0.8),
        rib_radius=rng.normal(0.62, 0.05, 16).astype(np.float32),
        rib_shift=rng.normal(0, 0.12, 16).astype(np.float32),
        bone=float(np.clip(rng.normal(1.1, 0.15) - 0.004 * (subject.age - 50), 0.6, 1.5)),
        clavicle_rise=(0.22 if supine else 0.1) + now.normal(0, 0.05),
        scapula=now.uniform(-2.5, -0.3) if supine else now.uniform(-0.5, 1.5),
        breast=max(0.0, rng.normal(2.4, 0.9) + 0.4 * habitus) if woman else 0.0,
        arms=now.uniform(0.5, 2.5) if supine else 30.0,
        stomach=(width * now.uniform(0.3, 0.6), now.uniform(2.0, 3.5), max(0.5, now.normal(2.6, 1.2))),
    )


def _frame(shape: tuple[int, int], field: tuple[float, float], study: tuple[int, ...]) -> _Frame:
    """Positioning: the patient's shift, tilt and magnification on a field (height, width) of `shape` pixels."""
    rng = np.random.default_rng((*study, 2))
    angle, scale = np.deg2rad(rng.normal(0, 2.2)), rng.normal(1.0, 0.035)
    shift = rng.normal((0, -1.6), (0.9, 0.9))
    pitch = field[0] / shape[0]
    forward = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    back = np.linalg.inv(forward)
    u = (np.arange(shape[1], dtype=np.float32) - (shape[1] - 1) / 2) * pitch - shift[0]
    v = (np.arange(shape[0], dtype=np.float32) - (shape[0] - 1) / 2) * pitch - shift[1]
    x = back[0, 0] * u[None, :] + back[0, 1] * v[:, None]
    y = back[1, 0] * u[None, :] + back[1, 1] * v[:, None]
    offset = np.array([shift[0] / pitch + (shape[1] - 1) / 2, shift[1] / pitch + (shape[0] - 1) / 2])
    affine = np.concatenate([forward / pitch, offset[:, None]], axis=1)
    return _Frame(x.astype(np.float32), y.astype(np.float32), affine, pitch)


def _step(distance: Image, width: float) -> Image:
    """Smooth step from 0 to 1 over `width` cm around 0."""
    t = np.clip(distance / width + 0.5, 0.0, 1.0)
    return t * t * (3 - 2 * t)


def _dome(*squares: Image) -> Image:
    """Height of a unit ellipsoid over its normalised, squared coordinates."""
    return np.sqrt(np.clip(1.0 - sum(squares), 0.0, None))


def _tube(distance: Image, radius: Any) -> Image:
    """Path length through the cortex of a hollow bone at `distance` from its axis."""
    square = distance * distance
    outer = np.sqrt(np.clip(radius * radius - square, 0.0, None))
    return outer - 0.75 * np.sqrt(np.clip((0.72 * radius) ** 2 - square, 0.0, None))


def _field(rng: np.random.Generator, shape: tuple[int, int], knots: int) -> Image:
    """A smooth random field of about unit variance: a cubic B-spline surface over knots x knots coefficients."""

    def taps(length: int) -> tuple[NDArray[np.intp], Image]:
        at = np.linspace(0.0, knots - 3.0, length, endpoint=False, dtype=np.float32)
        first = at.astype(np.intp)
        t = at - first
        weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
        return first, np.stack(weights).astype(np.float32) / np.float32(6)

    coefficients = rng.standard_normal((knots, knots), dtype=np.float32)
    (row, down), (col, across) = taps(shape[0]), taps(shape[1])
    lines = sum(down[k][:, None] * coefficients[row + k] for k in range(4))
    return np.float32(2.1) * sum(across[k] * lines[:, col + k] for k in range(4))


def _stroke(canvas: Image, start: NDArray[np.float64], end: NDArray[np.float64], radius: float, amount: float) -> None:
    """Add a round-ended line with a Gaussian profile; `start`, `end` as (column, row) and `radius` in pixels."""
    soft = max(radius, 0.45)
    amount *= min(1.0, radius / soft)
    if amount < 0.05:
        return
    reach = 2.2 * soft + 1
    low = np.maximum(np.floor(np.minimum(start, end) - reach), 0).astype(int)
    high = np.minimum(np.ceil(np.maximum(start, end) + reach) + 1, canvas.shape[::-1]).astype(int)
    if np.any(high <= low):
        return
    dx = np.arange(low[0], high[0], dtype=np.float32)[None, :] - start[0]
    dy = np.arange(low[1], high[1], dtype=np.float32)[:, None] - start[1]
    run = end - start
    t = np.clip((dx * run[0] + dy * run[1]) / max(float(run @ run), 1e-6), 0, 1)
    square = (dx - t * run[0]) ** 2 + (dy - t * run[1]) ** 2
    view = canvas[low[1] : high[1], low[0] : high[0]]
    np.maximum(view, amount * np.exp(-square / (soft * soft)), out=view)


def _polyline(
    canvas: Image, frame: _Frame, points: Iterable[tuple[float, float]], radius: float, amount: float
) -> None:
    """Draw a wire or tube through patient points; radius in cm, amount in cm of water."""
    at = frame.pixels(np.array(list(points)))
    for start, end in pairwise(at):
        _stroke(canvas, start, end, radius / frame.pitch, amount)


def _branches(rng: np.random.Generator, side: int, a: _Anatomy) -> Iterator[tuple[float, float, float, float, float]]:
    """The pulmonary vessels of one side as segments (x, y, x, y, radius) that fork away from the hilum."""
    stack = []
    for angle in np.linspace(-1.25, 1.35, 7) + rng.normal(0, 0.12, 7):
        stack.append((side * rng.uniform(3.0, 4.2), rng.uniform(-1.8, 1.8), float(angle), rng.uniform(0.3, 0.48), 0))
    while stack:
        x, y, angle, radius, depth = stack.pop()
        length = rng.uniform(1.2, 2.4)
        to_x, to_y = x + side * length * np.cos(angle), y + length * np.sin(angle)
        yield x, y, to_x, to_y, radius
        if depth < 4 and abs(to_x) < a.width:
            spread = rng.uniform(0.15, 0.5)
            stack.append((to_x, to_y, angle + spread * rng.uniform(0.1, 0.6), radius * 0.78, depth + 1))
            if rng.random() < 0.62:
                stack.append((to_x, to_y, angle - spread, radius * 0.62, depth + 1))


def _vessels(frame: _Frame, a: _Anatomy, patient: tuple[int, ...]) -> Image:
    rng = np.random.default_rng((*patient, 3))
    canvas = np.zeros(frame.x.shape, np.float32)
    for side in (-1, 1):
        segments = np.array(list(_branches(rng, side, a)))
        starts, ends = frame.pixels(segments[:, 0:2]), frame.pixels(segments[:, 2:4])
        for start, end, radius in zip(starts, ends, segments[:, 4], strict=True):
            _stroke(canvas, start, end, radius / frame.pitch, 4.5 * radius)
    return canvas


def _ribs(frame: _Frame, a: _Anatomy, thorax: Image) -> Image:
    """Posterior ribs, which fall to the side, and anterior ribs, which fall to the middle, until the cartilage."""
    r = np.abs(frame.x) / np.maximum(thorax, 0.5 * a.width)
    inside = _step(1.06 - r, 0.04) * _step(np.abs(frame.x) - 1.4, 0.6)
    lateral = 1.0 / np.sqrt(np.clip(1.15 - r * r, 0.15, None))

    def rows(curve: Image, slope: Image, first: float, count: int) -> Image:
        phase = (frame.y - first - curve) / a.rib_spacing
        index = np.clip(np.rint(phase), 0, count).astype(np.intp)
        distance = ((phase - index) * a.rib_spacing + a.rib_shift[index]) / np.sqrt(1 + slope * slope)
        return _tube(distance, a.rib_radius[index])

    posterior = rows(3.6 * r**2.4 - 1.1 * np.sin(2.4 * r), 0.6 * r**1.4 - 0.1, a.rib_first, 10)
    anterior = rows(6.2 * (1 - r), np.full_like(r, 0.45), a.rib_first + 4.2, 6) * _step(r - 0.42, 0.2)
    return a.bone * inside * lateral * (1.9 * posterior + 1.2 * anterior)


def _bones(frame: _Frame, a: _Anatomy, thorax: Image) -> Image:
    """Ribs, spine, clavicles, scapulae and the heads of the humeri."""
    x, y, side = frame.x, frame.y, np.abs(frame.x)
    axis = x - a.bend * np.sin(y / 7.0)
    disc = 0.5 + 0.5 * np.cos(2 * np.pi * (y - a.rib_first) / a.rib_spacing)
    half = 1.75 + 0.035 * (y + 12) - 0.18 * disc
    spine = _step(half - np.abs(axis), 0.45) * (2.4 - 0.8 * disc**4)
    spinous = 0.9 * np.exp(-((axis / 0.35) ** 2)) * (1 - disc) ** 2
    pedicles = 0.8 * np.exp(-(((np.abs(axis) - 1.25) / 0.35) ** 2)) * (1 - disc) ** 3
    rise = -10.9 - a.clavicle_rise * side - 0.7 * np.sin((side - 2.0) * 0.42)
    clavicle = 3.2 * _tube((y - rise) * 0.92, 0.62) * _step(side - 1.7, 0.5) * _step(a.width + 2.2 - side, 1.0)
    border = a.width + a.scapula - 0.28 * (y + 4.0)
    blade = _step(side - border, 0.35) * _step(y + 11.5, 1.5) * _step(4.5 - y - 0.5 * (a.width + 4 - side), 1.0)
    scapula = blade * (0.55 + 0.5 * np.exp(-(((side - border) / 0.5) ** 2)))
    head = 2.4 * _dome(((side - a.width - 3.6) / 2.3) ** 2, ((y + 10.6) / 2.5) ** 2)
    return _ribs(frame, a, thorax) + a.bone * (spine + spinous + pedicles + clavicle + scapula + head)


def _body(frame: _Frame, a: _Anatomy) -> Image:
    """Soft tissue of trunk, neck, shoulders, arms and breasts."""
    y, side = frame.y, np.abs(frame.x)
    trunk = a.width + a.wall + 0.35 * np.clip(y - 6, 0, None)
    shoulder = _step(y + 13.6 + 0.16 * (side - 4), 4.0)
    outline = 5.2 + (trunk + 3.5 * _step(-4 - y, 12.0) - 5.2) * shoulder
    thickness = (a.depth + 2.2 + a.fat * (0.85 + 0.03 * y)) * (0.55 + 0.45 * _step(y + 11, 10.0))
    body = thickness * np.sqrt(np.clip(1 - (side / outline) ** 3, 0, None))
    near = (side - trunk - a.arms - 3.8) / 3.8
    body = np.maximum(body, 8.0 * _dome(near**2) * _step(y + 9, 3.0))
    if a.breast > 0:
        across, down = (side - 0.52 * a.width) / (0.5 * a.width), (y - 3.2 - 0.5 * a.breast) / (4.2 + 0.9 * a.breast)
        body = body + a.breast * _dome(across**2, down**2) * (0.75 + 0.25 * _step(down, 0.8))
    return body


def _lungs(frame: _Frame, a: _Anatomy, thorax: Image) -> Image:
    """Depth of the lungs along the beam, where heart and mediastinum leave room for them (rows, cols)."""
    x, y = frame.x, frame.y
    r = np.abs(x) / np.maximum(thorax, 0.1)
    cavity = a.depth * np.clip(1 - r * r, 0, None) ** 0.42 * _step(a.diaphragm(x) - y, 0.5) * _step(y - a.apex, 0.8)
    hx, hy, tilt = a.heart
    ca, sa = math.cos(tilt), math.sin(tilt)
    dx, dy = x - hx, y - hy
    square = ((ca * dx + sa * dy) / a.heart_half) ** 2 + ((-sa * dx + ca * dy) / (0.74 * a.heart_half)) ** 2
    heart = 12.0 * np.sqrt(np.clip(1.06 - square, 0.0, None))
    knob = a.knob * np.exp(-(((y + 5.6) / 1.6) ** 2)) + 0.8 * np.exp(-(((y + 1.8) / 2.2) ** 2))
    cava = 0.5 * np.exp(-(((y + 3.0) / 4.0) ** 2))
    middle = a.mediastinum + 0.14 * np.clip(y, 0, None) + np.where(x > 0, knob, cava)
    mediastinum = 12.0 * _step(middle - np.abs(x - 0.25 * a.bend), 1.5)
    return np.clip(cavity - np.hypot(heart, mediastinum), 0.0, None)


def _hila(frame: _Frame, a: _Anatomy, air: Image) -> Image:
    x, y = frame.x, frame.y
    near = a.mediastinum + 1.2
    right = np.exp(-(((x + near) / 1.3) ** 2) - (((y - 0.6) / 2.1) ** 2))
    left = np.exp(-(((x - near - 0.2) / 1.2) ** 2) - (((y + 0.4) / 2.0) ** 2))
    return np.minimum(2.6 * (right + left), 0.6 * air)


def _airways(frame: _Frame, a: _Anatomy) -> Image:
    """Air of the trachea, the main bronchi and the stomach."""
    x, y = frame.x - 0.2 * a.bend, frame.y
    trachea = 2.4 * _dome((x / 0.95) ** 2) * _step(-3.6 - y, 1.0)
    bronchi = 0.9 * np.exp(-(((np.abs(x) - 0.9 * (y + 3.4)) / 0.6) ** 2)) * _step(y + 3.6, 0.8) * _step(0.2 - y, 1.0)
    across, down = (frame.x - a.stomach[0]) / a.stomach[2], (y - a.dome[1] - a.stomach[1]) / (0.5 * a.stomach[2])
    bubble = 5.0 * _dome(across**2, down**2)
    return trachea + bronchi + bubble


def _consolidation(frame: _Frame, a: _Anatomy, lung: Image, rng: np.random.Generator) -> Image:
    """Patches of fluid-filled lung with ill-defined edges and air bronchograms: one lobe, now and then two."""
    shape = frame.x.shape
    filled = np.zeros(shape, np.float32)
    for _ in range(1 + (rng.random() < 0.2)):
        side, level = rng.choice((-1, 1)), rng.uniform(-0.62, 0.8)
        cx = side * a.width * rng.uniform(0.42, 0.72) * (1.0 if level > -0.3 else 0.85)
        cy = level * (a.dome[0] - 1.0 if level > 0 else -a.apex)
        ragged = 0.22 * _field(rng, shape, 20) + 0.1 * _field(rng, shape, 40)
        for _ in range(rng.integers(2, 5)):
            px, py = cx + rng.normal(0, 1.3), cy + rng.normal(0, 1.5)
            radius = rng.uniform(2.8, 4.4)
            r = np.hypot(frame.x - px, (frame.y - py) * rng.uniform(0.75, 1.2)) / radius
            filled = np.maximum(filled, rng.uniform(0.75, 1.0) * _step(0.85 - r + ragged, 0.9))
        tree = np.zeros(shape, np.float32)
        for _ in range(5):
            angle = rng.uniform(-1.2, 1.2)
            at = (cx + rng.normal(0, 1.2), cy + rng.normal(0, 1.2))
            end = (at[0] + side * 1.6 * np.cos(angle), at[1] + 1.6 * np.sin(angle))
            _polyline(tree, frame, [at, end], rng.uniform(0.08, 0.14), 0.4)
        filled = filled * (1 - tree) * (1 + 0.07 * _field(rng, shape, 50))
    depth = rng.uniform(6.0, 9.0)
    return np.clip(filled, 0, 1.1) * np.minimum(AIR_IN_LUNG * lung * 0.9, depth)


def _effusion(frame: _Frame, a: _Anatomy, lung: Image, rng: np.random.Generator, view: str) -> Image:
    """Pleural fluid at one base or both: a meniscus that climbs the lateral wall; hazier when supine."""
    sides = [int(rng.choice((-1, 1)))]
    if rng.random() < 0.25:
        sides.append(-sides[0])
    fluid = np.zeros(frame.x.shape, np.float32)
    for side in sides:
        height = rng.uniform(6.0, 11.0)
        r = np.clip(side * frame.x / a.width, 0, 1.1)
        level = a.costophrenic(side) - height * (0.45 + 0.55 * r**3.5)
        edge = rng.uniform(1.4, 2.4) if view == "AP" else rng.uniform(0.6, 1.2)
        fluid = np.maximum(fluid, _step(frame.y - level, edge) * (side * frame.x > 0))
    depth = rng.uniform(7.0, 11.0)
    return fluid * np.minimum(AIR_IN_LUNG * lung, depth)


def _distractors(frame: _Frame, a: _Anatomy, subject: Subject, imaging: Imaging) -> Image:
    """Path lengths of what may mislead a network: devices, calcifications, skin folds and shadows outside the lungs."""
    rng, body = np.random.default_rng((*subject.study, 4)), np.random.default_rng((*subject.patient, 4))
    canvas = np.zeros(frame.x.shape, np.float32)
    if body.random() < (0.14 if subject.age > 60 else 0.03):
        _pacemaker(canvas, frame, a, body)
    if rng.random() < imaging.devices:
        _electrodes(canvas, frame, a, rng)
    if rng.random() < imaging.devices:
        _catheter(canvas, frame, a, rng)
    if rng.random() < 0.25:
        for _ in range(rng.integers(1, 4)):
            _dot(canvas, frame, (rng.uniform(-1, 1) * a.width, rng.uniform(-8, 8)), rng.uniform(0.15, 0.4), 1.2)
    if rng.random() < 0.5:
        beside = rng.choice((-1, 1)) * (a.width + rng.uniform(0.8, 3.5))
        _dot(canvas, frame, (beside, rng.uniform(-6, 12)), rng.uniform(0.8, 2.2), rng.uniform(1.5, 4.0))
    if rng.random() < 0.4:
        below = a.dome[0] + rng.uniform(4, 8)
        _dot(canvas, frame, (rng.uniform(-10, 10), below), rng.uniform(0.8, 2.2), rng.uniform(1.5, 4.0))
    if rng.random() < 0.2:
        x = rng.choice((-1, 1)) * a.width * rng.uniform(0.6, 1.0)
        canvas += 0.8 * _step(np.sign(x) * (frame.x - x - 0.2 * frame.y), 0.4)
    return canvas


def _dot(canvas: Image, frame: _Frame, point: tuple[float, float], radius: float, amount: float) -> None:
    at = frame.pixels(np.array([point]))[0]
    _stroke(canvas, at, at, radius / frame.pitch, amount)


def _pacemaker(canvas: Image, frame: _Frame, a: _Anatomy, rng: np.random.Generator) -> None:
    side = rng.choice((-1, 1), p=(0.15, 0.85))
    x, y = side * a.width * rng.uniform(0.68, 0.85), rng.uniform(-8.5, -6.0)
    across, down = np.abs(frame.x - x) / 2.1, np.abs(frame.y - y) / 1.9
    box = np.maximum(across, down) + 0.25 * np.hypot(across, down)
    np.maximum(canvas, LEAD * _step(1.1 - box, 0.1), out=canvas)
    lead = [(x, y), (side * 3.5, -10.2), (-1.5, -7.0), (-2.2, 0.0), (-1.0, 5.5), (a.heart[0] + 2.0, a.heart[1] + 2.5)]
    _polyline(canvas, frame, lead, 0.13, 4.0)


def _electrodes(canvas: Image, frame: _Frame, a: _Anatomy, rng: np.random.Generator) -> None:
    for side, level in ((-1, -7.0), (1, -7.5), (1, 6.0)):
        x, y = side * a.width * rng.uniform(0.5, 0.95), level + rng.normal(0, 1.2)
        _dot(canvas, frame, (x, y), 0.45, 4.0)
        _polyline(canvas, frame, [(x, y), (x * 0.6 + rng.normal(0, 1), y + 5), (rng.normal(0, 4), 19.0)], 0.08, 2.0)


def _catheter(canvas: Image, frame: _Frame, a: _Anatomy, rng: np.random.Generator) -> None:
    if rng.random() < 0.5:
        _polyline(canvas, frame, [(-3.0, -19), (-2.6, -12), (-1.8, -7), (-2.0, rng.uniform(-1, 2))], 0.13, 2.5)
    else:
        gastric = [(0.3, -20), (0.2, -8), (0.6, 2), (1.5, a.dome[1] + 1), (4.5, a.dome[1] + 4)]
        _polyline(canvas, frame, gastric, 0.16, 2.2)


_GLYPHS = {"L": ("100", "100", "100", "100", "111"), "R": ("110", "101", "110", "101", "101")}


def _marker(thickness: Image, frame: _Frame, study: tuple[int, ...]) -> None:
    """A lead letter for the patient's side, in one of the upper corners."""
    rng = np.random.default_rng((*study, 5))
    if rng.random() > 0.8:
        return
    letter = "L" if rng.random() < 0.6 else "R"
    glyph = np.array([[int(c) for c in row] for row in _GLYPHS[letter]], np.float32)
    cell = max(1, round(0.35 / frame.pitch))
    block = np.kron(glyph, np.ones((cell, cell), np.float32)) * LEAD
    rows, cols = thickness.shape
    top = int(rows * rng.uniform(0.04, 0.2))
    left = int(cols * rng.uniform(0.03, 0.1))
    left = cols - left - block.shape[1] if letter == "L" else left
    region = thickness[top : top + block.shape[0], left : left + block.shape[1]]
    np.maximum(region, block[: region.shape[0], : region.shape[1]] + 0.5 * region, out=region)


def _opacity(frame: _Frame, a: _Anatomy, lung: Image, subject: Subject, findings: Iterable[str]) -> Image:
    """Fluid that takes the place of air, as a path length (rows, cols)."""
    wanted, opacity = frozenset(findings), np.zeros(lung.shape, np.float32)
    if "consolidation" in wanted:
        opacity = _consolidation(frame, a, lung, np.random.default_rng((*subject.study, 8)))
    if "effusion" in wanted:
        fluid = _effusion(frame, a, lung, np.random.default_rng((*subject.study, 9)), subject.view)
        opacity = np.maximum(opacity, fluid)
    return opacity


def _texture(shape: tuple[int, int], study: tuple[int, ...]) -> Image:
    """Uneven aeration around 1."""
    coarse, fine = np.random.default_rng((*study, 6)), np.random.default_rng((*study, 7))
    return 1 + 0.05 * _field(coarse, shape, 9) + 0.035 * _field(fine, shape, 30)


def project(
    shape: tuple[int, int], field: tuple[float, float], subject: Subject, findings: Iterable[str], imaging: Imaging
) -> Image:
    """Path lengths through a chest, as centimetres of water.

    Args:
        shape: rows and columns of the result.
        field: height and width in cm of what it shows.
        findings: of `FINDINGS`; none for a normal chest.
    """
    a, frame = _draw_anatomy(subject), _frame(shape, field, subject.study)
    thorax = a.thorax(frame.y)
    lung = _lungs(frame, a, thorax)
    vessels = np.minimum(_vessels(frame, a, subject.patient), 0.8 * lung) + _hila(frame, a, lung)
    filled = vessels + _opacity(frame, a, lung, subject, findings)
    air = np.clip(AIR_IN_LUNG * lung * _texture(shape, subject.study) - filled, 0.0, None)
    body = _body(frame, a)
    covered = _step(body - 2.0, 4.0)
    thickness = body - np.minimum(_airways(frame, a), 0.5 * body) + covered * (_bones(frame, a, thorax) - air)
    thickness = np.clip(thickness, 0.0, None) + _distractors(frame, a, subject, imaging)
    _marker(thickness, frame, subject.study)
    return thickness.astype(np.float32)


def _smooth(image: Image, *filters: tuple[float, float]) -> Image:
    """Sum of Gaussian low-passes as (weight, sigma in pixels), with edges repeated."""
    pad = min(*image.shape, max(4, int(2 * max(sigma for _, sigma in filters)))) // 2
    padded = np.pad(image, pad, mode="edge")
    fy = np.fft.fftfreq(padded.shape[0]).astype(np.float32)[:, None]
    fx = np.fft.rfftfreq(padded.shape[1]).astype(np.float32)[None, :]
    square = -2 * np.pi**2 * (fx * fx + fy * fy)
    transfer = sum(weight * np.exp(square * sigma * sigma) for weight, sigma in filters)
    smooth = np.fft.irfft2(np.fft.rfft2(padded) * transfer, s=padded.shape)
    return smooth[pad : pad + image.shape[0], pad : pad + image.shape[1]].astype(np.float32)


def expose(thickness: Image, field: tuple[float, float], imaging: Imaging, study: tuple[int, ...]) -> Image:
    """Take the radiograph: attenuation, scatter, detector blur, quantum noise, logarithm, ranging and display curve.

    Returns:
        float32 (rows, cols) in [0, 1], 0 black and 1 white.
    """
    rng = np.random.default_rng((*study, 10))
    pitch = field[0] / thickness.shape[0]
    primary = np.exp(-ATTENUATION * thickness)
    reached = _smooth(primary, (1 - imaging.scatter, imaging.blur / pitch), (imaging.scatter, 2.5 / pitch))
    photons = 9e4 * imaging.exposure * (pitch / 0.15) ** 2
    noise = rng.standard_normal(thickness.shape, dtype=np.float32)
    reached = np.clip(reached + np.sqrt(np.clip(reached, 1e-5, None) / photons) * noise, 1e-4, None)
    density = -np.log(reached)
    density = density - imaging.local_contrast * _smooth(density, (1.0, 4.0 / pitch))
    return _blades(_display(density, imaging, rng), imaging, rng)


def _display(density: Image, imaging: Imaging, rng: np.random.Generator) -> Image:
    """Automatic ranging: fixed quantiles of the body go to drawn grey levels, as the modality's own software does."""
    rows, cols = density.shape
    middle = density[rows // 16 : -(rows // 16), cols // 16 : -(cols // 16)]
    shares = np.array([0.04, 0.13, 0.25, 0.38, 0.5, 0.62, 0.75, 0.87, 0.96])
    marks = np.quantile(middle[::2, ::2], shares)
    low, high = rng.normal(0.14, 0.03), rng.normal(0.86, 0.03)
    tone = [0.0, rng.normal(0.24, 0.03), rng.normal(0.5, 0.03), rng.normal(0.77, 0.03), 1.0]
    levels = low + (high - low) * np.interp(shares, shares[::2], tone)
    span = max(float(marks[-1] - marks[0]), 1e-3)
    xs = np.concatenate([[marks[0] - 0.45 * span], marks, [marks[-1] + 0.5 * span]])
    ys = np.concatenate([[0.0], levels, [1.0]])
    return np.clip(np.interp(density, xs, ys), 0, 1).astype(np.float32) ** np.float32(imaging.gamma)


def _blades(image: Image, imaging: Imaging, rng: np.random.Generator) -> Image:
    """Blacken what collimator blades cover."""
    if rng.random() < imaging.collimated:
        rows, cols = image.shape
        top, bottom, left, right = (rng.uniform(0, 0.07, 4) * (rows, rows, cols, cols)).astype(int)
        image[:top], image[rows - bottom :], image[:, :left], image[:, cols - right :] = 0.02, 0.02, 0.02, 0.02
    return image


def radiograph(
    shape: tuple[int, int],
    field: tuple[float, float],
    subject: Subject,
    findings: Iterable[str],
    imaging: Imaging | None = None,
) -> Image:
    """A chest radiograph of `subject` with `findings`: float32 (rows, cols) in [0, 1], 0 black and 1 white."""
    imaging = imaging or Imaging()
    return expose(project(shape, field, subject, findings, imaging), field, imaging, subject.study)
