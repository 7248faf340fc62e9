"""Pictures of coloured shapes with questions about them, drawn from nothing but numbers.

A `Scene` is a small frozen description: up to nine objects on a 3x3 grid, each with a shape, a colour, a size and a
pattern, in front of a background. Everything else derives from it: the picture (`render`), which object covers which
patch (`object_map`), questions with certain answers (`questions`), and a description (`caption`, read back by
`parse_caption`).

    scene = sample_scene(7)
    picture = render(scene)
    for question in questions(scene, rng_seed=0, n=8):
        print(question.kind, question.text, question.answer)

Three rules make scores on these scenes mean something:

* **Deterministic.** The same seed and split give the same scene in every process. Splits draw from streams of their
  own, so no seed of one ever shows what a seed of another does.
* **Held-out compositions.** Ten of the hundred (shape, colour) pairs, `HELD_OUT_PAIRS`, occur neither in pictures nor
  in questions of the splits "train" and "test". Whatever the split "pairs" asks about an object is asked about one of
  these, so a score on it tells composition from memory.
* **No answer is likelier for being a guess.** A yes/no question starts from its answer: that is drawn first, then a
  question that has it is looked for, and only where the other answer had been possible too.

What the vocabulary leaves open (how pointed is a star, how wide a stripe, which of many reds) is drawn at random for
every object, so that a model trained here has a chance on pictures drawn by somebody else's code.

Shape legend: H = W = 224 pixels, h and w the sides of the region around one object, P = 14 patches of 16 pixels a side.
"""

import functools
import hashlib
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Rgb = tuple[int, int, int]
Floats = NDArray[np.float32]
Polygon = NDArray[np.complex128]

# --- Vocabulary -------------------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "ring", "hexagon", "moon")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black")
SIZES = ("small", "medium", "large")
PATTERNS = ("solid", "striped", "dotted")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
BACKGROUNDS = ("plain", "gradient", "noisy", "checkered")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "test", "pairs")
NEUTRAL = "neutral"
"""The colour of objects that teach shapes only: greys and browns, which no question ever names."""

HELD_OUT_PAIRS = frozenset(
    {
        ("circle", "purple"),
        ("square", "orange"),
        ("triangle", "pink"),
        ("star", "blue"),
        ("cross", "yellow"),
        ("diamond", "red"),
        ("heart", "green"),
        ("ring", "white"),
        ("hexagon", "cyan"),
        ("moon", "black"),
    }
)
"""Each shape once and each colour once, so that no word of the vocabulary is missing from training."""

NEVER_SHOWN = {word: other for pair in HELD_OUT_PAIRS for word, other in (pair, pair[::-1])}
"""For each colour the shape that training never shows in it, and for each shape the colour."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {"size": SIZES, "pattern": PATTERNS, "color": COLORS, "shape": SHAPES}
"""What can be said of an object, in the order in which English says it."""

PICTURE = 224
PATCH = 16
CELL = PICTURE / 3
DIAMETERS: dict[str, tuple[float, float]] = {"small": (24, 28), "medium": (38, 44), "large": (56, 64)}

ANCHORS: dict[str, tuple[Rgb, ...]] = {
    "red": ((255, 0, 0), (220, 50, 47), (214, 39, 40), (200, 16, 32), (230, 25, 60), (240, 50, 40)),
    "orange": ((255, 165, 0), (245, 130, 48), (255, 127, 14), (255, 140, 0), (243, 146, 30)),
    "yellow": ((255, 255, 0), (255, 225, 25), (255, 215, 0), (250, 230, 70), (240, 220, 40)),
    "green": ((0, 128, 0), (60, 180, 75), (44, 160, 44), (0, 200, 0), (46, 139, 87), (30, 255, 30)),
    "cyan": ((0, 255, 255), (70, 200, 220), (66, 212, 244), (23, 190, 207), (64, 224, 208)),
    "blue": ((0, 0, 255), (67, 99, 216), (31, 119, 180), (30, 60, 200), (33, 120, 240), (0, 30, 180)),
    "purple": ((128, 0, 128), (145, 30, 180), (148, 90, 190), (110, 20, 150), (150, 40, 220)),
    "pink": ((255, 192, 203), (255, 105, 180), (250, 180, 212), (255, 140, 190), (240, 130, 195)),
    "white": ((255, 255, 255), (245, 245, 245), (250, 248, 240), (244, 247, 252)),
    "black": ((0, 0, 0), (20, 20, 20), (10, 12, 18), (28, 26, 26)),
    NEUTRAL: ((90, 90, 90), (128, 128, 128), (170, 170, 170), (121, 85, 61), (150, 111, 80), (205, 180, 145)),
}
"""Values that people use for each name. A sampled colour lies between two of them, a little brighter or darker."""

DARK_LEVELS = (20.0, 85.0)
LIGHT_LEVELS = (165.0, 240.0)

# --- Scenes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Texture:
    """The second colour of a striped or dotted object and how it repeats (lengths in pixels)."""

    rgb: Rgb
    angle: float  # degrees
    period: float
    share: float  # stripes: part of a period that has the second colour; dots: radius in periods
    phase: tuple[float, float]  # in periods
    staggered: bool  # every other row of dots is moved by half a period


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object: first what questions ask about, then what only the renderer needs."""

    shape: str
    color: str
    size: str
    pattern: str
    place: int  # index into PLACES, row by row
    center: tuple[float, float]  # x, y in pixels
    diameter: float
    angle: float  # degrees
    rgb: Rgb
    texture: Texture | None
    outline: Rgb | None
    smooth: bool  # anti-aliased edges
    form: tuple[float, float]  # in [0, 1): the free proportions of the shape, see `_polygons`

    @property
    def row(self) -> int:
        """0 at the top, 2 at the bottom."""
        return self.place // 3

    @property
    def column(self) -> int:
        """0 on the left, 2 on the right."""
        return self.place % 3

    @property
    def held_out(self) -> bool:
        """Whether shape and colour are one of `HELD_OUT_PAIRS`."""
        return (self.shape, self.color) in HELD_OUT_PAIRS


@dataclass(frozen=True, slots=True)
class Backdrop:
    """How the background is drawn; which of the numbers matter depends on its kind."""

    first: Rgb
    second: Rgb  # the other end of a gradient, the other field of a checkerboard
    angle: float  # degrees, direction of a gradient
    middle: tuple[float, float] | None  # x, y in pixels, from where a gradient goes all ways alike
    cell: int  # side of a checkerboard's field in pixels
    offset: tuple[int, int]  # of the checkerboard, and of the grain within the noise bank
    grain: float  # standard deviation of a noisy background
    grain_size: int  # side of one grain in pixels
    grey_grain: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that there is to know about a picture. Objects are in reading order."""

    seed: int
    split: str
    size: int
    background: str
    dark: bool
    objects: tuple[SceneObject, ...]
    backdrop: Backdrop
    sensor_noise: float  # standard deviation, over everything
    noise_offset: tuple[int, int]


def sample_scene(
    seed: int, split: str = "train", *, min_objects: int = 1, max_objects: int = 6, neutral: float = 0.0
) -> Scene:
    """Draw the scene number `seed` of a split.

    `neutral` is the probability that an object is grey or brown. Such objects come in every shape with no pair held
    out, which teaches an encoder that shape does not depend on colour; they have no colour to ask about, so
    `questions` and `caption` refuse scenes that hold one.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if not 1 <= min_objects <= max_objects <= len(PLACES):
        raise ValueError(f"need 1 <= min_objects <= max_objects <= {len(PLACES)}, got {min_objects} and {max_objects}")
    rng = stream("scene", split, seed)
    places = sorted(rng.sample(range(len(PLACES)), rng.randint(min_objects, max_objects)))
    pairs = _sample_pairs(rng, len(places), split, neutral)
    dark = rng.random() < 0.5
    background = rng.choice(BACKGROUNDS)
    # A white object in front of white (or black in front of black) needs an outline; most scenes avoid the situation.
    extreme = any(color == ("black" if dark else "white") for _, color in pairs)
    backdrop = _sample_backdrop(rng, background, dark=dark, moderate=extreme and rng.random() < 0.7)
    # Whoever draws a picture usually draws all of its objects in one manner.
    smooth = rng.random() < 0.8
    outlined = rng.random() < 0.3
    objects = tuple(
        _sample_object(rng, shape, color, place, backdrop, smooth=smooth, outlined=outlined)
        for (shape, color), place in zip(pairs, places, strict=True)
    )
    return Scene(
        seed=seed,
        split=split,
        size=PICTURE,
        background=background,
        dark=dark,
        objects=objects,
        backdrop=backdrop,
        sensor_noise=rng.uniform(2, 8),
        noise_offset=(rng.randrange(_BANK - PICTURE), rng.randrange(_BANK - PICTURE)),
    )


def stream(*names: object) -> random.Random:
    """A random stream of its own for every sequence of names, the same in every process."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def _sample_pairs(rng: random.Random, count: int, split: str, neutral: float) -> list[tuple[str, str]]:
    """(shape, colour) of each object. Objects often repeat a word of an earlier one, else nothing could be compared."""
    held_out = {index for index in range(count) if rng.random() < 0.4} or {rng.randrange(count)}
    pairs: list[tuple[str, str]] = []
    for index in range(count):
        if split == "pairs" and index in held_out:
            pairs.append(rng.choice(sorted(HELD_OUT_PAIRS)))
            continue
        while True:
            shape = rng.choice(pairs)[0] if pairs and rng.random() < 0.25 else rng.choice(SHAPES)
            color = rng.choice(pairs)[1] if pairs and rng.random() < 0.25 else rng.choice(COLORS)
            if neutral and rng.random() < neutral:
                color = NEUTRAL
            if (shape, color) not in HELD_OUT_PAIRS:
                break
        pairs.append((shape, color))
    return pairs


def _sample_object(
    rng: random.Random, shape: str, color: str, place: int, backdrop: Backdrop, *, smooth: bool, outlined: bool
) -> SceneObject:
    size = rng.choice(SIZES)
    pattern = rng.choice(PATTERNS)
    diameter = rng.uniform(*DIAMETERS[size])
    angle = rng.uniform(-15, 15) if rng.random() < 0.75 else 0.0
    # How far the object reaches from its centre once rotated: corners of a box reach further than points on a circle.
    turn = math.radians(abs(angle))
    reach = diameter / 2 * (math.cos(turn) + math.sin(turn) if shape in ("square", "triangle") else 1.08) + 1.5
    slack = max(0.0, CELL / 2 - reach)
    x, y = (
        min(max((cell + 0.5) * CELL + rng.uniform(-slack, slack), reach), PICTURE - reach)
        for cell in (place % 3, place // 3)
    )
    rgb = _sample_rgb(rng, color)
    texture = None if pattern == "solid" else _sample_texture(rng, pattern, rgb, diameter, angle, backdrop)
    visible = min(math.dist(rgb, backdrop.first), math.dist(rgb, backdrop.second)) > 70
    outline = None
    if not visible or (outlined and not (size == "small" and texture)):  # thin parts have no room for both
        outline = _shade(rgb, rng.uniform(0.0, 0.35)) if _luminance(rgb) > 90 else _tint(rgb, rng.uniform(0.7, 1.0))
    return SceneObject(
        shape=shape,
        color=color,
        size=size,
        pattern=pattern,
        place=place,
        center=(x, y),
        diameter=diameter,
        angle=angle,
        rgb=rgb,
        texture=texture,
        outline=outline,
        smooth=smooth,
        form=(rng.random(), rng.random()),
    )


def _sample_rgb(rng: random.Random, color: str) -> Rgb:
    one, other = rng.choices(ANCHORS[color], k=2)
    mix = rng.random()
    brightness = rng.uniform(0.94, 1.02) if color == "white" else rng.uniform(0.86, 1.08)
    red, green, blue = (min(255, round(brightness * (a + mix * (b - a)))) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _sample_texture(
    rng: random.Random, pattern: str, rgb: Rgb, diameter: float, angle: float, backdrop: Backdrop
) -> Texture:
    """Stripes or dots that are clearly there and yet leave no doubt which of the two colours is the object's."""
    # Black and white have no hue to tell the object's colour from the other one: there the other is seldom its
    # opposite, and always the smaller part.
    hueless = max(rgb) - min(rgb) < 30
    limit = 170 if hueless and rng.random() < 0.75 else 255
    while True:
        second = rng.choice(
            (
                _shade(rgb, rng.uniform(0.3, 0.7)),
                _tint(rgb, rng.uniform(0.35, 0.75)),
                _tint((0, 0, 0), rng.uniform(0.25, 0.75)),
                (255, 255, 255),
                (0, 0, 0),
                backdrop.first if diameter > 30 else (0, 0, 0),  # too many holes would dissolve a small object
            )
        )
        if math.dist(rgb, second) > 80 and 25 < abs(_luminance(rgb) - _luminance(second)) < limit:
            break
    if pattern == "striped":
        period = rng.uniform(4.0, min(16.0, max(7.0, diameter / 3)))
        share = rng.uniform(0.25, 0.36 if hueless else 0.5)
        direction = rng.choice((0.0, 45.0, 90.0, 135.0))
    else:
        period = rng.uniform(5.0, min(16.0, max(7.5, diameter / 3)))
        share = rng.uniform(0.22, 0.3 if hueless else 0.38)
        direction = rng.choice((0.0, 0.0, 45.0))
    return Texture(
        rgb=second,
        angle=direction + rng.choice((0.0, angle)),
        period=period,
        share=share,
        phase=(rng.random(), rng.random()),
        staggered=rng.random() < 0.5,
    )


def _sample_backdrop(rng: random.Random, kind: str, *, dark: bool, moderate: bool) -> Backdrop:
    """`moderate` keeps away from black or white, so that an object of this colour stays visible."""
    low, high = DARK_LEVELS if dark else LIGHT_LEVELS
    if moderate:
        low, high = (low + 30, high) if dark else (low, high - 45)
    span = 0.0
    if kind == "gradient":
        span = rng.uniform(28, min(60, high - low))
    elif kind == "checkered":
        span = rng.uniform(18, min(55, high - low))
    level = rng.uniform(low, high - span)
    if kind == "noisy":  # stay away from the ends of the range, where clipping would hide the noise
        level = min(max(level, 40.0), 215.0)
    colored = rng.choice((0.0, 5.0, 14.0))
    tint = [rng.uniform(-colored, colored) for _ in range(3)]
    ends = [level, level + span]
    rng.shuffle(ends)
    first, second = (
        tuple(min(255, max(0, round(end + t + rng.uniform(-colored, colored) / 3))) for t in tint) for end in ends
    )
    if span and rng.random() < 0.3:  # from one colour to another, perhaps of the same lightness
        first, second = _two_colors(rng, low, high)
    # Many a checkerboard begins at the corner and has fields of a round size: such as the patches of an encoder.
    cell = rng.choice((8, 14, 16, 28, 32, 56)) if rng.random() < 0.5 else rng.randint(7, 56)
    offset = rng.randrange(_BANK - PICTURE), rng.randrange(_BANK - PICTURE)
    return Backdrop(
        first=(first[0], first[1], first[2]),
        second=(second[0], second[1], second[2]),
        angle=rng.uniform(0, 360) if rng.random() < 0.5 else rng.choice((0.0, 45.0, 90.0, 135.0)),
        middle=_sample_middle(rng) if kind == "gradient" and rng.random() < 0.3 else None,
        cell=cell,
        offset=(0, 0) if kind == "checkered" and rng.random() < 0.5 else offset,
        grain=rng.uniform(12, 36),
        grain_size=rng.choice((1, 1, 1, 2, 3)),
        grey_grain=rng.random() < 0.4,
    )


def _sample_middle(rng: random.Random) -> tuple[float, float]:
    """That of the picture, as often as not."""
    if rng.random() < 0.5:
        return PICTURE / 2, PICTURE / 2
    return rng.uniform(0, PICTURE), rng.uniform(0, PICTURE)


def _two_colors(rng: random.Random, low: float, high: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two colours with channels of these levels that can be told apart."""
    while True:
        first, second = (tuple(round(rng.uniform(low, high)) for _ in range(3)) for _ in range(2))
        if math.dist(first, second) > 32:
            return first, second


def _luminance(rgb: Rgb) -> float:
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


def _shade(rgb: Rgb, keep: float) -> Rgb:
    return round(rgb[0] * keep), round(rgb[1] * keep), round(rgb[2] * keep)


def _tint(rgb: Rgb, whiteness: float) -> Rgb:
    red, green, blue = (round(c + (255 - c) * whiteness) for c in rgb)
    return red, green, blue


# --- Pictures ---------------------------------------------------------------------------------------------------------

_BANK = 320
"""Side of the noise bank. Pictures cut their noise out of it: drawing it anew would cost more than all the rest."""
_OVERSAMPLING = 4


def render(scene: Scene) -> Image.Image:
    """The picture, RGB, 224x224."""
    return _paint(scene, [_Mask.of(item) for item in scene.objects])


def object_map(scene: Scene) -> NDArray[np.int64]:
    """int64[P, P]: the index of the object that covers most of a patch, if it covers 15 % or more, else -1."""
    return _assign_patches([_Mask.of(item) for item in scene.objects])


def render_with_map(scene: Scene) -> tuple[Image.Image, NDArray[np.int64]]:
    """`render` and `object_map` for little more than the price of the first."""
    masks = [_Mask.of(item) for item in scene.objects]
    return _paint(scene, masks), _assign_patches(masks)


@dataclass(frozen=True, slots=True)
class _Mask:
    """How much of each pixel an object covers, in the region around it."""

    left: int
    top: int
    alpha: Image.Image  # mode L, h x w
    cover: Floats  # float32[h, w] in [0, 1]

    @classmethod
    def of(cls, item: SceneObject) -> "_Mask":
        turn = item.diameter / 2 * np.exp(1j * math.radians(item.angle))
        polygons = [polygon * turn + complex(*item.center) for polygon in _polygons(item.shape, *item.form)]
        points = polygons[0]
        left, right = max(0, int(points.real.min()) - 1), min(PICTURE, int(points.real.max()) + 2)
        top, bottom = max(0, int(points.imag.min()) - 1), min(PICTURE, int(points.imag.max()) + 2)
        scale = _OVERSAMPLING if item.smooth else 1
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
    for item, mask in zip(scene.objects, masks, strict=True):
        height, width = mask.cover.shape
        region = canvas[mask.top : mask.top + height, mask.left : mask.left + width]  # (h, w, 3)
        paint = np.array(item.rgb, dtype=np.float32)
        if item.texture is not None:
            amount = _draw_texture(item.pattern, item.texture, height, width)
            paint = paint + amount[..., None] * (np.array(item.texture.rgb, dtype=np.float32) - paint)
        if item.outline is not None:
            inside = mask.alpha.filter(ImageFilter.MinFilter(3 if item.size == "small" else 5))
            edge = 1 - np.asarray(inside, dtype=np.float32)[..., None] / 255
            paint = paint + edge * (np.array(item.outline, dtype=np.float32) - paint)
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
        lines = np.stack([fields[columns], fields[1 - columns]])  # (2, W, 3): the two kinds of line there are
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
    """float32[BANK, BANK, 3] of normal noise: what a camera adds, and the grain of noisy backgrounds."""
    return np.random.Generator(np.random.PCG64(0)).standard_normal((_BANK, _BANK, 3), dtype=np.float32)


def _draw_texture(pattern: str, texture: Texture, height: int, width: int) -> Floats:
    """float32[h, w]: how much of each pixel has the texture's colour; edges fade over about one pixel."""
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
    """Where patches begin within a region that begins at `start`, and the number of the first of them."""
    first = start // PATCH
    return [0, *range((first + 1) * PATCH - start, length, PATCH)], first


def _arc(start: float, stop: float, steps: int) -> Polygon:
    """Points on the unit circle between two angles in degrees, as complex numbers x + iy with y pointing down."""
    arc: Polygon = np.exp(1j * np.radians(np.linspace(start, stop, steps)))
    return arc


def _around(part: Polygon, times: int) -> Polygon:
    """A boundary that is one part repeated on the way around the centre."""
    boundary: Polygon = np.concatenate([part * np.exp(2j * np.pi * turn / times) for turn in range(times)])
    return boundary


def _mirror(points: Polygon) -> Polygon:
    return -points[::-1].conj()


def _polygons(shape: str, u: float, v: float) -> tuple[Polygon, ...]:
    """A shape within the unit circle or the box around it: its boundary, and for the ring also that of its hole.

    `u` and `v` in [0, 1) are the freedom that the name of a shape leaves.
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
            bite, shift = 0.86 - 0.06 * u, 0.34 + 0.24 * u  # radius and centre of the disc that is taken away
            tip = (1 - bite**2 + shift**2) / (2 * shift)
            outer = math.degrees(math.acos(tip))
            inner = math.degrees(math.acos((tip - shift) / bite))
            back = _arc(outer, 360 - outer, 40)
            front = _arc(360 - inner, inner, 32) * bite + shift
            crescent = np.concatenate([back, front]) + complex((1 - tip) / 2)
            return (crescent if v < 0.5 else _mirror(crescent),)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


# --- Captions ---------------------------------------------------------------------------------------------------------


def caption(scene: Scene) -> str:
    """All objects in reading order: "a small solid red circle at the top left, a large dotted pink ring at the top"."""
    _require_colors(scene)
    return ", ".join(
        f"a {item.size} {item.pattern} {item.color} {item.shape} at the {PLACES[item.place]}" for item in scene.objects
    )


_WORD_IN_CAPTION = {
    name: re.compile(r"\b(" + "|".join(sorted(values, key=len, reverse=True)) + r")\b")
    for name, values in {**ATTRIBUTES, "place": PLACES}.items()
}


def parse_caption(text: str) -> list[dict[str, str]]:
    """The inverse of `caption`: one dict per object, with those of its attributes and place that the text names.

    Made for scoring what a model says, so it never raises: a fragment that names nothing is left out.
    """
    objects = []
    for fragment in re.split(r",|\band\b|\.", text.lower()):
        found = {name: match[1] for name, word in _WORD_IN_CAPTION.items() if (match := word.search(fragment))}
        if found:
            objects.append(found)
    return objects


def _require_colors(scene: Scene) -> None:
    if any(item.color == NEUTRAL for item in scene.objects):
        raise ValueError(
            f"scene {scene.seed} of split {scene.split!r} has objects without a named colour, so there is nothing "
            "to say about it; sample it with neutral=0 to ask questions"
        )


# --- Questions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """A question as somebody would type it, its kind (a key of `WORDINGS`), and the answer in bare lower-case words.

    `unseen` has, for each word of the answer, the word that no picture of the split "train" could have had there: what is
    cyan is never a hexagon. It is empty in other splits, and "" where there is no such word.
    """

    kind: str
    text: str
    answer: str
    unseen: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Wordings:
    """Ways to ask one kind of question: those of training, and those that only evaluation uses."""

    seen: tuple[str, ...]
    held_out: tuple[str, ...]


WORDINGS: dict[str, Wordings] = {
    "shape": Wordings(
        (
            "what shape is {it}",
            "what is the shape of {it}",
            "name the shape of {it}",
            "what shape does {it} have",
            "which shape is {it}",
            "give the shape of {it}",
            "tell me what shape {it} is",
            "say which shape {it} has",
        ),
        ("which shape does {it} have", "tell me the shape of {it}"),
    ),
    "color": Wordings(
        (
            "what color is {it}",
            "what is the color of {it}",
            "name the color of {it}",
            "what color does {it} have",
            "which color is {it}",
            "give the color of {it}",
            "tell me what color {it} is",
            "say which color {it} has",
        ),
        ("which color does {it} have", "tell me the color of {it}"),
    ),
    "size": Wordings(
        (
            "what size is {it}",
            "how big is {it}",
            "what is the size of {it}",
            "is {it} small, medium or large",
            "which size is {it}",
            "what size does {it} have",
            "tell me the size of {it}",
            "say how large {it} is",
            "is {it} large, medium or small",
            "how large would you say {it} is",
            "how big does {it} look",
            "how large does {it} look",
            "tell me how large {it} is",
            "how large an object is {it}",
            "how large or small is {it}",
        ),
        ("which size does {it} have", "how large is {it}"),
    ),
    "pattern": Wordings(
        (
            "what pattern does {it} have",
            "is {it} solid, striped or dotted",
            "what is the pattern of {it}",
            "which pattern is on {it}",
            "name the pattern of {it}",
            "tell me what pattern {it} has",
            "say which pattern {it} has",
            "is {it} dotted, striped or solid",
        ),
        ("which pattern does {it} have", "tell me the pattern of {it}"),
    ),
    "where": Wordings(
        (
            "where is {it}",
            "what is the position of {it}",
            "where in the picture is {it}",
            "in which place is {it}",
            "tell me where {it} is",
            "give the location of {it}",
            "what place is {it} in",
            "where can you find {it}",
            "where in the picture do you see {it}",
        ),
        ("what is the location of {it}", "where do you see {it}"),
    ),
    "count": Wordings(
        (
            "how many objects are there",
            "count the objects",
            "how many objects are in the picture",
            "how many objects do you see",
            "give the number of objects",
            "tell me how many objects there are",
            "tell me the number of objects",
            "how many objects can you see",
            "how many objects does the picture contain",
            "how many shapes are there",
            "how many things are in the picture",
        ),
        ("what is the number of objects", "how many objects does the picture show"),
    ),
    "count_kind": Wordings(
        (
            "how many {kind} are there",
            "count the {kind}",
            "how many {kind} are in the picture",
            "how many {kind} can you see",
            "give the number of {kind}",
            "tell me how many {kind} there are",
            "tell me the number of {kind}",
            "how many {kind} does the picture show",
        ),
        ("what is the number of {kind}", "how many {kind} do you see"),
    ),
    "exists": Wordings(
        (
            "is there {kind}",
            "do you see {kind}",
            "is there {kind} in the picture",
            "does the picture show {kind}",
            "does the picture have {kind}",
            "can you find {kind}",
            "is {kind} in the picture",
            "tell me if there is {kind}",
        ),
        ("can you see {kind}", "does the picture contain {kind}"),
    ),
    "relation": Wordings(
        (
            "what is {side} {it}",
            "which object is {side} {it}",
            "name the object {side} {it}",
            "what object is {side} {it}",
            "what can you find {side} {it}",
            "which object do you see {side} {it}",
            "say what is {side} {it}",
            "tell me which object is {side} {it}",
        ),
        ("what do you see {side} {it}", "tell me what is {side} {it}"),
    ),
    "position": Wordings(
        (
            "is {it} {side} {other}",
            "is it true that {it} is {side} {other}",
            "is {it} found {side} {other}",
            "can you see {it} {side} {other}",
            "do you find {it} {side} {other}",
            "tell me if {it} is {side} {other}",
            "can {it} be seen {side} {other}",
        ),
        ("can {it} be found {side} {other}", "do you see {it} {side} {other}"),
    ),
    "bigger": Wordings(
        (
            "is {it} bigger than {other}",
            "is {it} larger than {other}",
            "is it true that {it} is larger than {other}",
            "tell me if {it} is bigger than {other}",
            "does {it} have a larger size than {other}",
            "is the size of {it} bigger than that of {other}",
        ),
        ("is it true that {it} is bigger than {other}", "does {it} have a bigger size than {other}"),
    ),
    "same": Wordings(
        (
            "do {it} and {other} have the same {attribute}",
            "is the {attribute} of {it} the same as that of {other}",
            "do {it} and {other} share a {attribute}",
            "has {it} the same {attribute} as {other}",
            "are {it} and {other} equal in {attribute}",
            "is it true that {it} has the same {attribute} as {other}",
            "tell me if {it} and {other} have the same {attribute}",
        ),
        ("does {it} have the same {attribute} as {other}", "do {it} and {other} share the same {attribute}"),
    ),
    "both": Wordings(
        (
            "what {attribute} do {it} and {other} have",
            "what are the {attribute}s of {it} and {other}",
            "which {attribute} has {it} and which has {other}",
            "what is the {attribute} of {it} and of {other}",
            "name the {attribute} of {it} and that of {other}",
            "tell me the {attribute} of {it} and of {other}",
            "what {attribute} is {it} and what {attribute} is {other}",
            "do {it} and {other} have the same {attribute}, and which",
            "is the {attribute} of {it} the same as that of {other}, and which",
            "has {it} the same {attribute} as {other}, and which",
            "do {it} and {other} share a {attribute}, and which",
            "are {it} and {other} equal in {attribute}, and in which",
        ),
        ("name the {attribute}s of {it} and {other}", "tell me what {attribute} {it} and {other} have"),
    ),
    "background": Wordings(
        (
            "what kind of background is it",
            "what kind of background is there",
            "what is the background like",
            "is the background plain, gradient, noisy or checkered",
            "which kind of background is it",
            "what kind of background does the picture have",
            "name the kind of background",
            "describe the background",
            "tell me what kind of background there is",
        ),
        ("which kind of background does the picture have", "tell me the kind of background"),
    ),
    "dark": Wordings(
        (
            "is the background dark or light",
            "is the background light or dark",
            "is it a dark or a light background",
            "is the background of the picture dark or light",
            "tell me if the background is dark or light",
            "does the picture have a background that is light or dark",
        ),
        ("does the picture have a dark or a light background",),
    ),
    "caption": Wordings(
        (
            "describe the picture",
            "what is in the picture",
            "describe what you see",
            "what does the picture show",
            "what do you see",
            "what can you see in the picture",
            "tell me what you see",
            "describe the objects",
            "name all objects in the picture",
        ),
        ("tell me what is in the picture", "describe all objects in the picture"),
    ),
}
"""Held-out wordings are new sentences of words that training knows: nobody can know a word never met."""

KIND_WEIGHTS: dict[str, float] = {
    "shape": 2.0,
    "color": 1.5,
    "size": 1.0,
    "pattern": 1.2,
    "where": 1.2,
    "count": 0.6,
    "count_kind": 2.0,
    "exists": 2.0,
    "relation": 2.5,
    "position": 2.5,
    "bigger": 1.5,
    "same": 3.0,
    "both": 2.0,
    "background": 0.4,
    "dark": 0.3,
    "caption": 0.5,
}
"""How often each kind is tried. Kinds that were slow to learn get more; not every scene allows every kind."""

YES_NO_KINDS = ("exists", "position", "bigger", "same")

_SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # (row, column) steps
_KINDS_TO_FIND = {("color", "shape"): 6, ("shape",): 2, ("color",): 2, ("pattern", "shape"): 1, ("size", "shape"): 1}
_KINDS_TO_COUNT = (*_KINDS_TO_FIND, ("size",), ("pattern",))
_OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_COMMANDS = ("name", "count", "describe", "tell", "give", "say")
_PLURALS = {shape: f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in (*SHAPES, "object")}


def questions(
    scene: Scene,
    rng_seed: int,
    n: int | None = None,
    *,
    wordings: Literal["seen", "held_out"] = "seen",
    weights: Mapping[str, float] = KIND_WEIGHTS,
) -> list[Question]:
    """`n` different questions about a scene, their kinds drawn by `weights`; without `n`, one of every possible kind.

    Poor scenes have little to ask about: there may be fewer than `n`. The same seed with other wordings asks the same
    things in other words, so that the two scores can be compared question by question.
    """
    _require_colors(scene)
    unknown = sorted(set(weights) - set(WORDINGS))
    if unknown:
        raise ValueError(f"unknown kinds of questions {unknown}; known: {', '.join(WORDINGS)}")
    asker = _Asker(scene, stream("questions", scene.split, scene.seed, rng_seed), wordings)
    if n is None:
        asked = (asker.ask(kind) for kind, weight in weights.items() if weight > 0)
        return [question for question in asked if question is not None]
    found: list[Question] = []
    kinds = asker.rng.choices(list(weights), list(weights.values()), k=6 * n)
    for kind in kinds:
        if len(found) == n:
            break
        question = asker.ask(kind)
        if question is not None:
            found.append(question)
    return found


_Draft = tuple[dict[str, str], str, *tuple[str, ...]]
"""What fills the gaps of a wording, the answer, and `Question.unseen`."""


class _Asker:
    """Thinks up questions about one scene. There is one method for each kind; it returns None if the scene has none.

    In the split "pairs" all questions about objects are about those of a held-out pair.
    """

    def __init__(self, scene: Scene, rng: random.Random, wordings: Literal["seen", "held_out"]) -> None:
        self.scene = scene
        self.rng = rng
        self.wordings = wordings
        self.about_pairs = scene.split == "pairs"
        self.targets = [item for item in scene.objects if item.held_out or not self.about_pairs]
        self.asked: set[tuple[str, ...]] = set()
        self.wanted: dict[str, bool] = {}  # the answer that a yes/no kind is to have next
        self.unique = _unique_descriptions(scene)

    def ask(self, kind: str) -> Question | None:
        # The answer comes first; a scene without such a question gets none. Yes and no take turns: a scene may have only
        # one question with "yes" and many with "no".
        wanted = self.wanted.setdefault(kind, self.rng.random() < 0.5)
        for _ in range(5):
            draft = _ASK[kind](self, wanted)
            if draft is None:
                return None
            gaps, answer, *unseen = draft
            if (kind, *gaps.values()) not in self.asked:
                self.asked.add((kind, *gaps.values()))
                self.wanted[kind] = not wanted
                known = getattr(WORDINGS[kind], self.wordings)
                wording: str = known[int(self.rng.random() * len(known))]
                text = _vary(wording.format(**gaps), self.rng)
                return Question(kind, text, answer, tuple(unseen) if self.scene.split == "train" else ())
        return None

    # How objects are named ------------------------------------------------------------------------------------------

    def name(self, item: SceneObject, *hidden: str) -> str | None:
        """A description that fits only this object and says nothing of what is hidden (attributes, or "place")."""
        allowed = [names for names in self.unique[item.place] if names.isdisjoint(hidden)]
        if "place" not in hidden and (not allowed or self.rng.random() < 0.25):
            place = PLACES[item.place]
            inner = 0.5 if place == "center" else 0.2 if " " in place else 0.0  # nobody says "in the left"
            return f"the object {'in' if self.rng.random() < inner else 'at'} the {place}"
        if not allowed:
            return None
        if self.rng.random() < 0.85:  # nobody says more than is needed, most of the time
            allowed = [names for names in allowed if not any(other < names for other in allowed)]
        return "the " + _noun_phrase({name: getattr(item, name) for name in self.rng.choice(allowed)})

    def name_two(self, one: SceneObject, other: SceneObject, *hidden: str) -> dict[str, str] | None:
        it, that = self.name(one, *hidden), self.name(other, *hidden)
        return {"it": it, "other": that} if it and that else None

    def pairs_of_objects(self) -> list[tuple[SceneObject, SceneObject]]:
        """All ordered pairs with a target among them, in random order."""
        pairs = [
            pair
            for pair in itertools.permutations(self.scene.objects, 2)
            if not self.about_pairs or pair[0].held_out or pair[1].held_out
        ]
        self.rng.shuffle(pairs)
        return pairs

    # Attributes and places ------------------------------------------------------------------------------------------

    def attribute(self, name: str) -> _Draft | None:
        item = self.rng.choice(self.targets)
        it = self.name(item, name)
        return ({"it": it}, getattr(item, name), _never_shown(item, name)) if it else None

    def where(self) -> _Draft | None:
        for item in self.rng.sample(self.targets, len(self.targets)):
            it = self.name(item, "place")
            if it:
                return {"it": it}, PLACES[item.place]
        return None

    # Counts and existence -------------------------------------------------------------------------------------------

    def count_kind(self) -> _Draft | None:
        if self.rng.random() < 0.18:
            absent = self.absent(self.some_attributes())
            return ({"kind": _noun_phrase(absent, plural=True)}, "zero") if absent else None
        found: dict[int, list[dict[str, str]]] = {}
        for names in [("color", "shape")] if self.about_pairs else _KINDS_TO_COUNT:
            tally = Counter(tuple(getattr(item, name) for name in names) for item in self.scene.objects)
            for values in dict.fromkeys(tuple(getattr(item, name) for name in names) for item in self.targets):
                found.setdefault(tally[values], []).append(dict(zip(names, values, strict=True)))
        count = self.rng.choice(sorted(found))  # first the answer: else nearly everything would be "one"
        return {"kind": _noun_phrase(self.rng.choice(found[count]), plural=True)}, NUMBERS[count]

    def exists(self, wanted: bool) -> _Draft | None:
        names = self.some_attributes()
        item = self.rng.choice(self.targets)
        kind = {name: getattr(item, name) for name in names} if wanted else self.absent(names)
        if kind is None:
            return None
        phrase = _noun_phrase(kind)
        article = "an" if phrase[0] in "aeiou" else "a"
        return {"kind": f"{article} {phrase}"}, "yes" if wanted else "no"

    def some_attributes(self) -> tuple[str, ...]:
        if self.about_pairs:
            return ("color", "shape")
        return self.rng.choices(list(_KINDS_TO_FIND), list(_KINDS_TO_FIND.values()))[0]

    def absent(self, names: tuple[str, ...]) -> dict[str, str] | None:
        """A kind of object that is not there. Half of them are hard: one word away from an object that is."""
        hard = len(names) > 1 and self.rng.random() < 0.5
        for _ in range(40):
            kind = {name: self.rng.choice(ATTRIBUTES[name]) for name in names}
            if self.about_pairs:
                kind["shape"], kind["color"] = self.rng.choice(sorted(HELD_OUT_PAIRS))
            elif hard:
                near, kept = self.rng.choice(self.scene.objects), self.rng.choice(names)
                kind[kept] = getattr(near, kept)
            forbidden = not self.about_pairs and (kind.get("shape"), kind.get("color")) in HELD_OUT_PAIRS
            if not forbidden and not any(_matches(item, kind) for item in self.scene.objects):
                return kind
        return None

    # Two objects ----------------------------------------------------------------------------------------------------

    def relation(self) -> _Draft | None:
        """What is next to it in its row or column, with no other object between the two."""
        found = [
            (side, item, neighbour)
            for item in self.scene.objects
            for side in _SIDES
            if (neighbour := _neighbour(self.scene, item, side)) in self.targets and neighbour is not None
        ]
        if not found:
            return None
        side, item, neighbour = self.rng.choice(found)
        it = self.name(item)
        assert it is not None  # every object can be named by its place
        unseen = (_never_shown(neighbour, name) for name in ("color", "shape"))
        return {"side": self.side(side), "it": it}, f"{neighbour.color} {neighbour.shape}", *unseen

    def position(self, wanted: bool) -> _Draft | None:
        for one, other in self.pairs_of_objects():
            true = [
                side
                for side, (row, column) in _SIDES.items()
                if row * (one.row - other.row) > 0 or column * (one.column - other.column) > 0
            ]
            names = self.name_two(one, other, "place")
            if true and names:
                side = self.rng.choice(true)
                return {"side": self.side(side if wanted else _OPPOSITES[side]), **names}, "yes" if wanted else "no"
        return None

    def side(self, side: str) -> str:
        return f"to the {side}" if side.endswith("of") and self.rng.random() < 0.4 else side

    def bigger(self, wanted: bool) -> _Draft | None:
        for one, other in self.pairs_of_objects():
            order = SIZES.index(one.size) - SIZES.index(other.size)
            if (order > 0) if wanted else (order < 0):
                names = self.name_two(one, other, "size")
                if names:
                    return names, "yes" if wanted else "no"
        return None

    def same(self, wanted: bool) -> _Draft | None:
        found = self.two_with(wanted)
        if found is None:
            return None
        _, _, gaps = found
        return gaps, "yes" if wanted else "no"

    def both(self, wanted: bool) -> _Draft | None:
        """What two objects have: the two lookups of "same", each of which pays on its own; "same" is not learnt without."""
        found = self.two_with(wanted)
        if found is None:
            return None
        one, other, gaps = found
        first, second = (getattr(item, gaps["attribute"]) for item in (one, other))
        before, after = (_never_shown(item, gaps["attribute"]) for item in (one, other))
        if wanted:
            return gaps, f"both {_PLURALS.get(first, first)}", before, _PLURALS.get(after, after)
        return gaps, f"{first} and {second}", before, "", after

    def two_with(self, equal: bool) -> tuple[SceneObject, SceneObject, dict[str, str]] | None:
        """Two objects that share an attribute or do not, of those that some pair shares and some other pair does not."""
        attribute = self.rng.choice(list(ATTRIBUTES))
        answers: dict[bool, list[tuple[SceneObject, SceneObject]]] = {True: [], False: []}
        for one, other in self.pairs_of_objects():
            answers[getattr(one, attribute) == getattr(other, attribute)].append((one, other))
        if not (answers[True] and answers[False]):  # else "no" would abound
            return None
        one, other = answers[equal][0]
        names = self.name_two(one, other, attribute)
        assert names is not None  # every object can be named by its place
        return one, other, {"attribute": attribute, **names}


_ASK: dict[str, Callable[[_Asker, bool], _Draft | None]] = {
    "shape": lambda asker, _: asker.attribute("shape"),
    "color": lambda asker, _: asker.attribute("color"),
    "size": lambda asker, _: asker.attribute("size"),
    "pattern": lambda asker, _: asker.attribute("pattern"),
    "where": lambda asker, _: asker.where(),
    "count": lambda asker, _: ({}, NUMBERS[len(asker.scene.objects)]),
    "count_kind": lambda asker, _: asker.count_kind(),
    "exists": lambda asker, wanted: asker.exists(wanted),
    "relation": lambda asker, _: asker.relation(),
    "position": lambda asker, wanted: asker.position(wanted),
    "bigger": lambda asker, wanted: asker.bigger(wanted),
    "same": lambda asker, wanted: asker.same(wanted),
    "both": lambda asker, wanted: asker.both(wanted),
    "background": lambda asker, _: ({}, asker.scene.background),
    "dark": lambda asker, _: ({}, "dark" if asker.scene.dark else "light"),
    "caption": lambda asker, _: ({}, caption(asker.scene), *_never_shown_in_caption(asker.scene)),
}


def _never_shown(item: SceneObject, attribute: str) -> str:
    """The value that no object of training has which is otherwise like this one; "" for other than shape and color."""
    return NEVER_SHOWN[{"shape": item.color, "color": item.shape}[attribute]] if attribute in ("shape", "color") else ""


def _never_shown_in_caption(scene: Scene) -> Iterator[str]:
    """For each word of `caption`."""
    for item in scene.objects:
        yield from ("", "", "", _never_shown(item, "color"), _never_shown(item, "shape"), "", "")
        yield from [""] * len(PLACES[item.place].split())


def _noun_phrase(attributes: Mapping[str, str], *, plural: bool = False) -> str:
    """Such as "large striped star" or "red objects": words as ordered in ATTRIBUTES, "object" for want of a shape."""
    noun = attributes.get("shape", "object")
    adjectives = [attributes[name] for name in ATTRIBUTES if name in attributes and name != "shape"]
    return " ".join([*adjectives, _PLURALS[noun] if plural else noun])


def _matches(item: SceneObject, kind: Mapping[str, str]) -> bool:
    return all(getattr(item, name) == value for name, value in kind.items())


_SUBSETS = [frozenset(names) for k in range(len(ATTRIBUTES) + 1) for names in itertools.combinations(ATTRIBUTES, k)]


def _unique_descriptions(scene: Scene) -> dict[int, list[frozenset[str]]]:
    """For each object (by its place) the sets of attributes that no other object has as well."""
    unique: dict[int, list[frozenset[str]]] = {item.place: [] for item in scene.objects}
    for names in _SUBSETS:
        values = [tuple(getattr(item, name) for name in names) for item in scene.objects]
        tally = Counter(values)
        for item, value in zip(scene.objects, values, strict=True):
            if tally[value] == 1:
                unique[item.place].append(names)
    return unique


def _neighbour(scene: Scene, item: SceneObject, side: str) -> SceneObject | None:
    """The nearest object on one side of `item` in the same row (left, right) or column (above, below)."""
    by_cell = {(other.row, other.column): other for other in scene.objects}
    down, along = _SIDES[side]
    for steps in (1, 2):
        found = by_cell.get((item.row + steps * down, item.column + steps * along))
        if found is not None:
            return found
    return None


def _vary(text: str, rng: random.Random) -> str:
    """The same question as different people would type it."""
    if rng.random() < 0.3:
        text = text.replace("color", "colour")
    if rng.random() < 0.5:
        text = text.replace("picture", "image")
    if rng.random() < 0.65:
        text += "." if text.startswith(_COMMANDS) else "?"
    style = rng.random()
    if style < 0.04:
        return text.upper()
    return text if style < 0.48 else text[0].upper() + text[1:]
