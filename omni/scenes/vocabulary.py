"""The words of the scenes, and their meaning in pixels and colours."""

Rgb = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "ring", "hexagon", "moon")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black")
SIZES = ("small", "medium", "large")
PATTERNS = ("solid", "striped", "dotted")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
BACKGROUNDS = ("plain", "gradient", "noisy", "checkered")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "test", "pairs")
NEUTRAL = "neutral"
"""The colour of objects that teach only shapes: greys and browns, which no question names."""

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
"""Each shape once, and each colour once, so that training has every word of the vocabulary."""

NEVER_SHOWN = {word: other for pair in HELD_OUT_PAIRS for word, other in (pair, pair[::-1])}
"""For each colour, the shape that training never shows in it; for each shape, the colour."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {"size": SIZES, "pattern": PATTERNS, "color": COLORS, "shape": SHAPES}
"""The attributes of an object, in the order of an English noun phrase."""

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
"""Common RGB values for each name. A sampled colour lies between two of them, a little brighter or darker."""
