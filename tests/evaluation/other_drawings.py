"""Scenes drawn by other code than omni's own: what a model has learnt from one hand, it should see in another's pictures.

    python tests/evaluation/other_drawings.py drawings 400      # writes drawings/*.png and drawings/questions.jsonl
    omni evaluate checkpoints/omni_tiny --data drawings/questions.jsonl

What there is to see, and what is asked about it, are of `omni.scenes`; how it is drawn is not: shapes are stamps of
Pillow's that are turned, patterns its lines and ellipses, colours those of CSS and two other palettes, boards begin at the
corner. Every picture has a manner of its own.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter

from omni.scenes import COLORS, DIAMETERS, Scene, SceneObject, questions, sample_scene

SIDE, FINE = 224, 4
Rgb = tuple[int, int, int]
Pen = ImageDraw.ImageDraw

PALETTES = (
    COLORS,  # these words are CSS's too
    ("#dc2828", "#ff9614", "#fae628", "#28aa3c", "#28d2dc", "#2850dc", "#8c32b4", "#ff82be", "#f5f5f5", "#141414"),
    ("#e6194b", "#f58231", "#ffe119", "#3cb44b", "#42d4f4", "#4363d8", "#911eb4", "#f77fbe", "#fafafa", "#0a0a0a"),
)


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, 224 x 224."""
    rng = random.Random(f"other drawings {scene.split} {scene.seed}")
    grain = np.random.default_rng(rng.randrange(2**32))
    palette = rng.choice(PALETTES)
    canvas = _background(scene, rng, grain)
    outlined, fine, contrast = rng.random() < 0.2, rng.choice((1, FINE, FINE)), rng.choice((_darker, _whiter, _either))
    for item in scene.objects:
        color = ImageColor.getrgb(palette[COLORS.index(item.color)])[:3]
        alike = item.color == ("black" if scene.dark else "white")  # nobody draws white on white without a line around
        _stamp(canvas, item, color, rng, outlined or alike, fine, contrast)
    noise = grain.normal(0, rng.uniform(2, 6), (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(np.asarray(canvas) + noise, 0, 255).astype(np.uint8))


def _background(scene: Scene, rng: random.Random, grain: np.random.Generator) -> Image.Image:
    middle = rng.randint(35, 75) if scene.dark else rng.randint(180, 220)
    tint = [rng.randint(-12, 12) for _ in range(3)] if rng.random() < 0.5 else [0, 0, 0]
    step = rng.randint(10, 20)
    low, high = (tuple(middle + t + sign * step for t in tint) for sign in (-1, 1))
    plain = Image.new("RGB", (SIDE, SIDE), tuple(middle + t for t in tint))
    if scene.background == "gradient":
        way = rng.choice(
            (Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L").rotate(90))
        )
        first, second = (Image.new("RGB", (SIDE, SIDE), color) for color in rng.sample((low, high), 2))
        return Image.composite(first, second, way.resize((SIDE, SIDE)))
    if scene.background == "noisy":
        noise = grain.normal(0, rng.uniform(16, 28), (SIDE, SIDE, rng.choice((1, 3))))
        return Image.fromarray(np.clip(np.asarray(plain) + noise, 0, 255).astype(np.uint8))
    if scene.background == "checkered":
        pen, field = ImageDraw.Draw(plain), rng.choice((14, 16, 20, 28, 32, 40))
        for y in range(0, SIDE, field):
            for x in range(0, SIDE, field):
                pen.rectangle((x, y, x + field - 1, y + field - 1), fill=(low, high)[(x + y) // field % 2])
    return plain


def _stamp(
    canvas: Image.Image,
    item: SceneObject,
    color: Rgb,
    rng: random.Random,
    outlined: bool,
    fine: int,
    contrast: Callable[[Rgb], Rgb],
) -> None:
    diameter = rng.uniform(*DIAMETERS[item.size])
    side = round(1.5 * diameter) * fine
    mask = Image.new("L", (side, side))
    margin = (side - diameter * fine) / 2
    _SHAPES[item.shape](ImageDraw.Draw(mask), margin, side - margin, rng)
    mask = mask.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR if fine > 1 else Image.Resampling.NEAREST)
    paint = Image.new("RGB", (side, side), color)
    second, gap = contrast(color), rng.choice((6, 7, 8)) * fine
    pen = ImageDraw.Draw(paint)
    if item.pattern == "striped":
        slope = rng.choice((0, side))
        for x in range(-side, 2 * side, gap):
            # slanted lines are closer to one another than their ends; lines over more than half would be the object's color
            pen.line((x, 0, x + slope, side), fill=second, width=round(gap * (0.32 if slope else 0.45)))
        if rng.random() < 0.5:
            paint = paint.transpose(Image.Transpose.ROTATE_90)
    elif item.pattern == "dotted":
        for x in range(0, side, gap):
            for y in range(0, side, gap):
                pen.ellipse((x, y, x + 0.6 * gap, y + 0.6 * gap), fill=second)
    if outlined:
        inner = mask.filter(ImageFilter.MinFilter(2 * fine + 1))
        paint.paste(_opposite(color), mask=ImageChops.subtract(mask, inner))
    paint, mask = paint.reduce(fine), mask.reduce(fine)
    slack = max(0.0, SIDE / 6 - diameter / 2 - 1) * 0.7
    left, top = (
        round((cell + 0.5) * SIDE / 3 + rng.uniform(-slack, slack) - mask.width / 2) for cell in (item.column, item.row)
    )
    canvas.paste(paint, (left, top), mask)


def _darker(color: Rgb) -> Rgb:
    return (130, 130, 130) if max(color) < 60 else (color[0] // 2, color[1] // 2, color[2] // 2)


def _whiter(color: Rgb) -> Rgb:
    return (90, 90, 90) if min(color) > 180 or color[0] + color[1] > 450 else (255, 255, 255)


def _either(color: Rgb) -> Rgb:
    return _darker(color) if sum(color) > 360 else (color[0] // 3 + 170, color[1] // 3 + 170, color[2] // 3 + 170)


def _opposite(color: Rgb) -> Rgb:
    return (20, 20, 20) if sum(color) > 150 else (235, 235, 235)


def _polygon(*corners: tuple[float, float]) -> Callable[[Pen, float, float, random.Random], None]:
    """A shape by its corners in the unit square, y pointing down."""
    return lambda pen, a, b, _: pen.polygon([(a + x * (b - a), a + y * (b - a)) for x, y in corners], fill=255)


def _circle(pen: Pen, a: float, b: float, _: random.Random) -> None:
    pen.ellipse((a, a, b, b), fill=255)


def _ring(pen: Pen, a: float, b: float, rng: random.Random) -> None:
    width = (b - a) * rng.uniform(0.2, 0.25)
    pen.ellipse((a, a, b, b), fill=255)
    pen.ellipse((a + width, a + width, b - width, b - width), fill=0)


def _moon(pen: Pen, a: float, b: float, rng: random.Random) -> None:
    size, way = b - a, rng.choice((-1, 1))
    x, bite = (a + b) / 2 + way * 0.24 * size, 0.42 * size
    pen.ellipse((a, a, b, b), fill=255)
    pen.ellipse((x - bite, a + 0.08 * size, x + bite, b - 0.08 * size), fill=0)


def _heart(pen: Pen, a: float, b: float, _: random.Random) -> None:
    size = b - a
    pen.ellipse((a, a + 0.05 * size, a + 0.53 * size, a + 0.58 * size), fill=255)
    pen.ellipse((b - 0.53 * size, a + 0.05 * size, b, a + 0.58 * size), fill=255)
    _polygon((0.045, 0.45), (0.955, 0.45), (0.5, 0.97))(pen, a, b, _)


def _star(pen: Pen, a: float, b: float, rng: random.Random) -> None:
    turns = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2, rng.uniform(0.19, 0.24), 0.5)
    _polygon(*zip(0.5 + reach * np.sin(turns), 0.5 - reach * np.cos(turns), strict=True))(pen, a, b, rng)


def _hexagon(pen: Pen, a: float, b: float, rng: random.Random) -> None:
    pen.regular_polygon(((a + b) / 2, (a + b) / 2, (b - a) / 2), 6, rotation=rng.choice((0, 30)), fill=255)


_SHAPES: dict[str, Callable[[Pen, float, float, random.Random], None]] = {
    "circle": _circle,
    "square": _polygon((0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)),
    "triangle": _polygon((0.5, 0.03), (1, 0.95), (0, 0.95)),
    "star": _star,
    "cross": _polygon(
        *((0.34, 0), (0.66, 0), (0.66, 0.34), (1, 0.34), (1, 0.66), (0.66, 0.66)),
        *((0.66, 1), (0.34, 1), (0.34, 0.66), (0, 0.66), (0, 0.34), (0.34, 0.34)),
    ),
    "diamond": _polygon((0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 0.5)),
    "heart": _heart,
    "ring": _ring,
    "hexagon": _hexagon,
    "moon": _moon,
}


def write(folder: Path, count: int) -> None:
    """Pictures of so many scenes and one question of each kind about each, as a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(count):
        scene = sample_scene(seed, "test")
        draw(scene).save(folder / f"{seed:04}.png")
        rows += [
            {"image": f"{seed:04}.png", "question": asked.text, "answer": asked.answer, "kind": asked.kind}
            for asked in questions(scene, rng_seed=0)
        ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
