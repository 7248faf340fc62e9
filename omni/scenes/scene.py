"""The description of a scene, and how one is sampled: which objects, where, and in front of what.

A `Scene` holds everything about a picture; `omni.scenes.drawing` draws it. Whatever the vocabulary leaves open (how pointed
a star is, how wide a stripe, which of many reds) is sampled for every object, so that a model trained on scenes can cope
with pictures that other code draws.
"""

import hashlib
import math
import random
from dataclasses import dataclass

from .vocabulary import (
    ANCHORS,
    BACKGROUNDS,
    CELL,
    COLORS,
    DIAMETERS,
    HELD_OUT_PAIRS,
    NEUTRAL,
    PATTERNS,
    PICTURE,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    Rgb,
)

DARK_LEVELS = (20.0, 85.0)
LIGHT_LEVELS = (165.0, 240.0)

NOISE_BANK = 320
"""Side of the noise bank in pixels. Pictures cut their noise out of it, because new noise would take most of the time."""


@dataclass(frozen=True, slots=True)
class Texture:
    """The second colour of a striped or dotted object, and how it repeats. Lengths are in pixels."""

    rgb: Rgb
    angle: float  # degrees
    period: float
    share: float  # stripes: part of a period that has the second colour; dots: radius in periods
    phase: tuple[float, float]  # in periods
    staggered: bool  # every other row of dots is moved by half a period


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object. Questions are about the first five fields; the others are for drawing it."""

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
    """How the background is drawn. Each kind of background uses some of the numbers."""

    first: Rgb
    second: Rgb  # the other end of a gradient, the other field of a checkerboard
    angle: float  # degrees, direction of a gradient
    middle: tuple[float, float] | None  # x, y in pixels, the centre of a radial gradient
    cell: int  # side of a checkerboard's field in pixels
    offset: tuple[int, int]  # of the checkerboard; or where the grain is cut from the noise bank
    grain: float  # standard deviation of a noisy background
    grain_size: int  # side of one grain in pixels
    grey_grain: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything about a picture. Objects are in reading order."""

    seed: int
    split: str
    size: int
    background: str
    dark: bool
    objects: tuple[SceneObject, ...]
    backdrop: Backdrop
    sensor_noise: float  # standard deviation, on the whole picture
    noise_offset: tuple[int, int]


def sample_scene(
    seed: int, split: str = "train", *, min_objects: int = 1, max_objects: int = 6, neutral: float = 0.0
) -> Scene:
    """Sample scene number `seed` of a split.

    Args:
        seed: number of the scene.
        split: "train", "test" or "pairs".
        min_objects, max_objects: number of objects.
        neutral: probability that an object is grey or brown. Such objects have every shape, which teaches an encoder that
            shape does not depend on colour. Their colour has no name, so `questions` and `caption` refuse their scenes.

    Raises:
        ValueError: the split is unknown, or the numbers of objects are out of range.
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
    # In most pictures all objects are drawn in one style.
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
        noise_offset=(rng.randrange(NOISE_BANK - PICTURE), rng.randrange(NOISE_BANK - PICTURE)),
    )


def stream(*names: object) -> random.Random:
    """The random stream of a sequence of names. It is the same in every process."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def _sample_pairs(rng: random.Random, count: int, split: str, neutral: float) -> list[tuple[str, str]]:
    """(shape, colour) of each object. Objects often repeat a word of an earlier one, so that there is more to compare."""
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
    # How far the rotated object reaches from its centre. Corners of a box reach further than points on a circle.
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
    """Stripes or dots that are clearly visible, and leave no doubt which of the two colours is the object's."""
    # Black and white have no hue that tells the object's colour from the second one. So the second one is seldom the
    # opposite, and it always covers the smaller part.
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
    """`moderate` avoids black and white, so that an object of such a colour stays visible."""
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
    # Many checkerboards begin at the corner, and have fields of a round size, such as that of an encoder's patches.
    cell = rng.choice((8, 14, 16, 28, 32, 56)) if rng.random() < 0.5 else rng.randint(7, 56)
    offset = rng.randrange(NOISE_BANK - PICTURE), rng.randrange(NOISE_BANK - PICTURE)
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
    """The centre of a radial gradient. Half of the time it is that of the picture."""
    if rng.random() < 0.5:
        return PICTURE / 2, PICTURE / 2
    return rng.uniform(0, PICTURE), rng.uniform(0, PICTURE)


def _two_colors(rng: random.Random, low: float, high: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two colours with channels between these levels, far enough apart to tell them from each other."""
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
