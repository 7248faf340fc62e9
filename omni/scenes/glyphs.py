"""Invented characters in many hands, which teach an encoder strokes.

Scenes teach an encoder flat shapes of at most 64 pixels. Handwriting, drawings and signs are strokes of any size. A
character is one to three strokes through a few points, which follow from its number. A hand moves the points, slants and
stretches the character, chooses pen and paper, and may scan it at few pixels. So the strokes are all that the pictures of
a character have in common (as in Lake et al. 2015, who collected characters; here they are invented).

    picture = write(character=7, seed=0)    # seed=1 writes it in another hand

Shapes: H = W = 224 pixels.
"""

import math
import random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from .scene import stream
from .vocabulary import PATCH, PICTURE

CHARACTERS = 200
"""The number of characters. Some look alike, as real characters do."""

Points = NDArray[np.float64]

_STEPS = 10  # segments of a curve between two of its points


def strokes(character: int) -> list[Points]:
    """The points of each stroke, float[n, 2] in [-1, 1]. All hands share them."""
    if not 0 <= character < CHARACTERS:
        raise ValueError(f"characters are numbered from 0 to {CHARACTERS - 1}, found {character}")
    rng = stream("character", character)
    return [_stroke(rng) for _ in range(rng.choices((1, 2, 3), (4, 4, 2))[0])]


def _stroke(rng: random.Random) -> Points:
    kind = rng.random()
    if kind < 0.25:  # a straight line
        points = [(rng.uniform(-1, 1), rng.uniform(-1, 1)) for _ in range(2)]
    elif kind < 0.55:  # a part of an ellipse, perhaps all of it
        x, y, a, b = (rng.uniform(-0.4, 0.4), rng.uniform(-0.5, 0.5), rng.uniform(0.25, 0.7), rng.uniform(0.25, 0.7))
        start, turn = rng.uniform(0, 2 * math.pi), rng.choice((-1, 1)) * rng.uniform(math.pi, 2 * math.pi)
        angles = [start + turn * i / 6 for i in range(7)]
        points = [(x + a * math.cos(t), y + b * math.sin(t)) for t in angles]
    else:  # a line through a few points that lie apart
        points = [(rng.uniform(-0.9, 0.9), rng.uniform(-1, 1))]
        for _ in range(rng.randint(2, 4)):
            points.append(
                max(
                    ((rng.uniform(-0.9, 0.9), rng.uniform(-1, 1)) for _ in range(3)),
                    key=lambda p: math.dist(p, points[-1]),
                )
            )
    return np.clip(np.array(points), -1, 1)


def write(character: int, seed: int, split: str = "train") -> Image.Image:
    """A character in the hand of this seed, RGB, 224 x 224. Each split has hands of its own."""
    return write_with_map(character, seed, split)[0]


def write_with_map(character: int, seed: int, split: str = "train") -> tuple[Image.Image, NDArray[np.bool_]]:
    """The picture, and the patches that have ink, bool[14, 14]."""
    rng = stream("hand", split, character, seed)
    lines = [_curve(_moved(points, rng)) for points in strokes(character)]
    size = int(math.exp(rng.uniform(math.log(64), math.log(PICTURE))))
    pixels = int(math.exp(rng.uniform(math.log(10), math.log(48)))) if rng.random() < 0.6 else size  # of a poor scan
    ink = _ink(lines, min(size, pixels), rng).resize((size, size), Image.Resampling.BICUBIC)
    paper, pen = _colors(rng)
    picture = Image.new("RGB", (PICTURE, PICTURE), paper)
    at = (rng.randint(0, PICTURE - size), rng.randint(0, PICTURE - size))
    box = (*at, at[0] + size, at[1] + size)
    picture.paste(pen, box, ink)
    patches = Image.new("L", (PICTURE, PICTURE))
    patches.paste(ink, box)
    inked = np.asarray(patches.reduce(PATCH)) > 12  # a twentieth of the patch
    if rng.random() < 0.5:
        noise = np.random.default_rng(rng.getrandbits(64)).normal(0, rng.uniform(1, 8), (PICTURE, PICTURE, 1))
        picture = Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
    return picture, inked


def _moved(points: Points, rng: random.Random) -> Points:
    return points + np.array([[rng.gauss(0, 0.06), rng.gauss(0, 0.06)] for _ in points])


def _curve(points: Points) -> Points:
    """A smooth curve through all points (Catmull and Rom 1974), float[m, 2]."""
    if len(points) < 3:
        return points
    padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    a, b, c, d = padded[:-3], padded[1:-2], padded[2:-1], padded[3:]
    t = np.linspace(0, 1, _STEPS, endpoint=False)[:, None, None]
    pieces = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))  # (steps, n-1, 2)
    return np.concatenate([pieces.transpose(1, 0, 2).reshape(-1, 2), points[-1:]])


def _ink(lines: list[Points], size: int, rng: random.Random) -> Image.Image:
    """The ink on each pixel, mode L, size x size."""
    slant, turn = rng.uniform(-0.3, 0.3), math.radians(rng.uniform(-12, 12))
    shape = np.array([[rng.uniform(0.65, 1.0), slant], [0.0, rng.uniform(0.85, 1.0)]])
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    moved = [line @ (rotation @ shape).T for line in lines]
    low, high = (f(np.concatenate(moved), axis=0) for f in (np.min, np.max))
    width = rng.uniform(0.07, 0.2)  # width of the pen, where the character is 1 high
    scale = (1 - width) * rng.uniform(0.8, 1.0) / max(*(high - low), 0.5)
    fine = max(3 * size, 64)
    canvas = Image.new("L", (fine, fine))
    draw, pen = ImageDraw.Draw(canvas), max(1.0, width * fine)
    for line in moved:
        xy = (((line - (low + high) / 2) * scale + 0.5) * fine).tolist()
        draw.line([tuple(p) for p in xy], fill=255, width=round(pen), joint="curve")
        for x, y in (xy[0], xy[-1]):
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)
    ink = canvas.resize((size, size), Image.Resampling.BOX)
    return ink.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0))) if rng.random() < 0.3 else ink


def _colors(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Colours of paper and pen that differ enough to read. Half of the time they are black and white, or white and black."""
    if rng.random() < 0.5:
        dark, light = (rng.randint(0, 40),) * 3, (rng.randint(215, 255),) * 3
        return (dark, light) if rng.random() < 0.5 else (light, dark)
    while True:
        paper, pen = (tuple(rng.randint(0, 255) for _ in range(3)) for _ in range(2))
        if math.dist(paper, pen) > 140:
            return paper, pen
