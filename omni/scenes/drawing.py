"""Draw a scene, and tell which object covers which patch.

Shapes: H = W = 224 pixels, h and w the sides of the region around one object, P = 14 patches of 16 pixels a side.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from .scene import NOISE_BANK, Scene, SceneObject, Texture
from .vocabulary import PATCH, PICTURE, SHAPES

Floats = NDArray[np.float32]
Polygon = NDArray[np.complex128]

_OVERSAMPLING = 4


def render(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, 224x224."""
    return _paint(scene, [_Mask.of(thing) for thing in scene.objects])


def object_map(scene: Scene) -> NDArray[np.int64]:
    """The object on each patch, int64[P, P]: the index of the one that covers most of it, or -1 if it covers under 15 %."""
    return _assign_patches([_Mask.of(thing) for thing in scene.objects])


def render_with_map(scene: Scene) -> tuple[Image.Image, NDArray[np.int64]]:
    """The results of `render` and `object_map`, in little more time than `render` alone takes."""
    masks = [_Mask.of(thing) for thing in scene.objects]
    return _paint(scene, masks), _assign_patches(masks)


@dataclass(frozen=True, slots=True)
class _Mask:
    """The share of each pixel that an object covers, in the region around the object."""

    left: int
    top: int
    alpha: Image.Image  # mode L, h x w
    cover: Floats  # float32[h, w] in [0, 1]

    @classmethod
    def of(cls, thing: SceneObject) -> "_Mask":
        turn = thing.diameter / 2 * np.exp(1j * math.radians(thing.angle))
        polygons = [polygon * turn + complex(*thing.center) for polygon in _polygons(thing.shape, *thing.form)]
        points = polygons[0]
        left, right = max(0, int(points.real.min()) - 1), min(PICTURE, int(points.real.max()) + 2)
        top, bottom = max(0, int(points.imag.min()) - 1), min(PICTURE, int(points.imag.max()) + 2)
        scale = _OVERSAMPLING if thing.smooth else 1
        alpha = Image.new("L", ((right - left) * scale, (bottom - top) * scale))
        draw = ImageDraw.Draw(alpha)
        for polygon, fill in zip(polygons, (255, 0), strict=False):  # the second one is the hole of a ring
            corners = (polygon - complex(left, top)) * scale - (0.5 + 0.5j)
            draw.polygon(corners.view(np.float64).tolist(), fill=fill)
        if scale > 1:
            alpha = alpha.reduce(scale)
        return cls(left, top, alpha, np.asarray(alpha, dtype=np.float32) * np.float32(1 / 255))


def _paint(scene: Scene, masks: list[_Mask]) -> Image.Image:
    canvas = _draw_backdrop(scene)  # (H, W, 3)
    for thing, mask in zip(scene.objects, masks, strict=True):
        height, width = mask.cover.shape
        region = canvas[mask.top : mask.top + height, mask.left : mask.left + width]  # (h, w, 3)
        paint = np.array(thing.rgb, dtype=np.float32)
        if thing.texture is not None:
            amount = _draw_texture(thing.pattern, thing.texture, height, width)
            paint = paint + amount[..., None] * (np.array(thing.texture.rgb, dtype=np.float32) - paint)
        if thing.outline is not None:
            inside = mask.alpha.filter(ImageFilter.MinFilter(3 if thing.size == "small" else 5))
            edge = 1 - np.asarray(inside, dtype=np.float32)[..., None] / 255
            paint = paint + edge * (np.array(thing.outline, dtype=np.float32) - paint)
        region += mask.cover[..., None] * (paint - region)
    y, x = scene.noise_offset
    canvas += _noise_bank()[y : y + PICTURE, x : x + PICTURE] * np.float32(scene.sensor_noise)
    return Image.fromarray(np.clip(canvas, 0, 255, out=canvas).astype(np.uint8))


def _draw_backdrop(scene: Scene) -> Floats:
    """float32[H, W, 3]"""
    backdrop = scene.backdrop
    first = np.array(backdrop.first, dtype=np.float32)
    second = np.array(backdrop.second, dtype=np.float32)
    if scene.background == "gradient":
        ramp = np.arange(PICTURE, dtype=np.float32)
        if backdrop.middle is None:
            x, y = math.cos(math.radians(backdrop.angle)), math.sin(math.radians(backdrop.angle))
            along = (ramp * np.float32(x))[None, :] + (ramp * np.float32(y))[:, None]  # (H, W)
        else:
            x, y = backdrop.middle
            along = np.hypot((ramp - np.float32(x))[None, :], (ramp - np.float32(y))[:, None])
        along -= along.min()
        along /= along.max()
        gradient: Floats = first + along[..., None] * (second - first)
        return gradient
    if scene.background == "checkered":
        rows, columns = ((np.arange(PICTURE) + shift) // backdrop.cell % 2 for shift in backdrop.offset)
        fields = np.stack([first, second])
        lines = np.stack([fields[columns], fields[1 - columns]])  # (2, W, 3): lines are of two kinds
        checkers: Floats = lines[rows]
        return checkers
    canvas = np.empty((PICTURE, PICTURE, 3), dtype=np.float32)
    canvas[:] = first
    if scene.background == "noisy":
        y, x = backdrop.offset
        side = -(-PICTURE // backdrop.grain_size)
        noise = _noise_bank()[y : y + side, x : x + side, : 1 if backdrop.grey_grain else 3]
        if backdrop.grain_size > 1:
            noise = noise.repeat(backdrop.grain_size, 0).repeat(backdrop.grain_size, 1)[:PICTURE, :PICTURE]
        canvas += noise * np.float32(backdrop.grain)
    return canvas


@functools.cache
def _noise_bank() -> Floats:
    """Normal noise, float32[BANK, BANK, 3], for the noise of a camera and the grain of noisy backgrounds."""
    return np.random.Generator(np.random.PCG64(0)).standard_normal((NOISE_BANK, NOISE_BANK, 3), dtype=np.float32)


def _draw_texture(pattern: str, texture: Texture, height: int, width: int) -> Floats:
    """The share of each pixel that has the texture's colour, float32[h, w]. Edges fade over about one pixel."""
    step = np.exp(-1j * math.radians(texture.angle)) / texture.period
    x = np.arange(width, dtype=np.float32)
    y = np.arange(height, dtype=np.float32)[:, None]
    u = x * np.float32(step.real) - y * np.float32(step.imag) + np.float32(texture.phase[0])  # (h, w), in periods
    if pattern == "striped":
        distance = np.abs(u - np.rint(u))
        return np.clip((texture.share / 2 - distance) * texture.period + 0.5, 0, 1)
    v = x * np.float32(step.imag) + y * np.float32(step.real) + np.float32(texture.phase[1])
    row = np.rint(v)
    if texture.staggered:
        u += 0.5 * (row % 2)
    distance = np.hypot(u - np.rint(u), v - row)
    return np.clip((texture.share - distance) * texture.period + 0.5, 0, 1)


def _assign_patches(masks: list[_Mask]) -> NDArray[np.int64]:
    side = PICTURE // PATCH
    cover = np.zeros((len(masks), side, side), dtype=np.float32)
    for index, mask in enumerate(masks):
        (rows, top), (columns, left) = (
            _patch_starts(start, length) for start, length in zip((mask.top, mask.left), mask.cover.shape, strict=True)
        )
        sums = np.add.reduceat(np.add.reduceat(mask.cover, rows, axis=0), columns, axis=1)
        cover[index, top : top + len(rows), left : left + len(columns)] = sums
    best = cover.argmax(axis=0)
    return np.where(cover.max(axis=0) >= 0.15 * PATCH * PATCH, best, -1).astype(np.int64)


def _patch_starts(start: int, length: int) -> tuple[list[int], int]:
    """Where patches begin inside of a region that begins at `start`, and the number of its first patch."""
    first = start // PATCH
    return [0, *range((first + 1) * PATCH - start, length, PATCH)], first


def _arc(start: float, stop: float, steps: int) -> Polygon:
    """Points on the unit circle between two angles in degrees, as complex numbers x + iy with y pointing down."""
    arc: Polygon = np.exp(1j * np.radians(np.linspace(start, stop, steps)))
    return arc


def _around(part: Polygon, times: int) -> Polygon:
    """A boundary made of one part, repeated around the centre."""
    boundary: Polygon = np.concatenate([part * np.exp(2j * np.pi * turn / times) for turn in range(times)])
    return boundary


def _mirror(points: Polygon) -> Polygon:
    return -points[::-1].conj()


def _polygons(shape: str, u: float, v: float) -> tuple[Polygon, ...]:
    """The boundary of a shape within the unit circle or the box around it; for a ring, that of its hole, too.

    `u` and `v`, in [0, 1), choose among the forms that a shape can have.
    """
    match shape:
        case "circle":
            return (_arc(0, 360, 64),)
        case "ring":
            return _arc(0, 360, 64), _arc(0, 360, 64) * (0.46 + 0.18 * u)
        case "square":
            half, radius = 0.87 + 0.13 * u, 0.25 * max(0.0, 2 * v - 1)  # every other one has rounded corners
            quarter = (_arc(0, 90, 8) * radius + (1 - radius) * (1 + 1j)) * half
            return (_around(quarter, 4),)
        case "triangle":
            width, height = 0.88 + 0.12 * u, 0.78 + 0.22 * v
            return (np.array([-1j * height, width + 1j * height, -width + 1j * height], dtype=np.complex128),)
        case "star":
            points, inner = (5 if v < 0.94 else 6), 0.38 + 0.14 * u
            return (_around(np.array([-1j, inner * np.exp(1j * (np.pi / points - np.pi / 2))]), points),)
        case "cross":
            arm = 0.22 + 0.16 * u
            return (_around(np.array([1 - 1j * arm, 1 + 1j * arm, arm + 1j * arm]), 4),)
        case "diamond":
            width = 0.64 + 0.36 * u
            return (np.array([-1j, width, 1j, -width]),)
        case "hexagon":
            start = 0 if v < 0.5 else 30
            return (_around(_arc(start, start, 1), 6),)
        case "heart":
            if v < 0.5:  # two circles on a triangle
                lobe = 0.52 * _arc(140, 337, 24) + (-0.48 - 0.42j)
                return (np.concatenate([lobe, _mirror(lobe), [0.95j]]),)
            t = np.linspace(0, 2 * np.pi, 49)[:-1]  # the well-known curve
            y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
            return ((16 * np.sin(t) ** 3 - 1j * (y + 2.5)) / 16,)
        case "moon":
            bite, shift = 0.86 - 0.06 * u, 0.34 + 0.24 * u  # radius and centre of the disc that is cut out
            tip = (1 - bite**2 + shift**2) / (2 * shift)
            outer = math.degrees(math.acos(tip))
            inner = math.degrees(math.acos((tip - shift) / bite))
            back = _arc(outer, 360 - outer, 40)
            front = _arc(360 - inner, inner, 32) * bite + shift
            crescent = np.concatenate([back, front]) + complex((1 - tip) / 2)
            return (crescent if v < 0.5 else _mirror(crescent),)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
