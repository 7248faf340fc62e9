"""Pictures of a printed word, with the letter that each place shows.

A word has 1 to 8 of the letters a to z and the digits, in one of Debian's fonts. It is about as wide as the 224 x 224
pixels of the picture, or has 60 pixels, and stands near its middle. The ground is plain, a photograph that is faint, or has
lines; the ink is darker, or now and then lighter.
"""

import json
import random
import string
import zlib
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS = string.ascii_lowercase + string.digits
SIDE, PATCH = 224, 16
MOST = 8
"""Letters of a word."""


@cache
def usable(file: Path) -> bool:
    """Whether a font has letters, and different ones; not one of symbols, or of one picture for all letters."""
    try:
        font = ImageFont.truetype(str(file), 40)
        masks = {bytes(font.getmask(letter)) for letter in LETTERS}
        return len(masks) == len(LETTERS) and all(any(mask) for mask in masks) and font.getlength("mon") < 160
    except (OSError, ValueError):  # a font that FreeType cannot use
        return False


def fonts_in(roots: Iterable[Path]) -> list[Path]:
    """The fonts of unpacked packages that have all letters."""
    files = [file for root in roots for file in sorted(root.rglob("*")) if file.suffix.lower() in (".ttf", ".otf")]
    return [file for file in files if usable(file)]


def english(package: Path, held_out: bool) -> list[str]:
    """Words of 1 to 8 letters of npm's an-array-of-english-words: a twentieth of them held out, or the others."""
    words = json.loads((package / "index.json").read_text())
    return [w for w in words if len(w) <= MOST and w.isascii() and (zlib.crc32(w.encode()) % 20 == 0) == held_out]


def choose(chance: random.Random, words: Sequence[str]) -> str:
    """An English word, or, one time in three, any letters."""
    if chance.random() < 0.67:
        return chance.choice(words)
    return "".join(chance.choices(LETTERS, k=chance.randint(1, MOST)))


@lru_cache(maxsize=4096)
def sized(file: Path, size: int) -> ImageFont.FreeTypeFont:
    """A font of a size in pixels."""
    return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)


def drawn(text: str, file: Path, chance: random.Random, photos: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """The picture of a word, and what its patches show.

    Args:
        text: the word.
        file: the font.
        chance: of places and colours.
        photos: uint8[n, s, s, 3], for grounds.

    Returns:
        The picture, and int64[2, 14, 28], for the left and the right half of each patch: which letter has it in its box,
        with `len(LETTERS)` beside the word; and the place of this letter in the word. Elsewhere they are -100.
    """
    size, widest = 60, chance.uniform(0.67, 0.95) * SIDE
    while (font := sized(file, size)).getlength(text) > widest and size > 8:
        size -= 2
    left, top, right, bottom = (int(side) for side in font.getbbox(text))
    slack = SIDE - (right - left)
    x = round(slack * chance.uniform(0.25, 0.75)) - left
    y = (SIDE - top - bottom) // 2 + chance.randint(-20, 20)
    light = np.array([chance.randint(150, 255) for _ in range(3)], np.float32) if chance.random() < 0.6 else 255.0
    page = np.broadcast_to(light, (SIDE, SIDE, 3))
    ground = chance.random()
    if ground < 0.2:
        photo = Image.fromarray(photos[chance.randrange(len(photos))]).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        page = page * 0.75 + np.asarray(photo, np.float32) * 0.25
    picture = Image.fromarray(page.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(chance.randint(1, 6) if 0.2 <= ground < 0.4 else 0):
        pale = tuple(chance.randint(130, 240) for _ in range(3))
        box = [chance.randint(0, SIDE) for _ in range(4)]
        if chance.random() < 0.5:
            pen.line(box, fill=pale, width=chance.randint(1, 4))
        else:
            pen.ellipse([min(box[::2]), min(box[1::2]), max(box[::2]), max(box[1::2])], fill=pale)
    most = 110 if chance.random() < 0.5 else 0
    pen.text((x, y), text, font=font, fill=tuple(chance.randint(0, most) for _ in range(3)))
    if chance.random() < 0.12:
        picture = Image.eval(picture, lambda value: 255 - value)
    ends = [x + font.getlength(text[: n + 1]) for n in range(len(text))]
    centres = np.arange(PATCH / 4, SIDE, PATCH / 2)
    letter = np.searchsorted(ends, centres)
    inside = (centres >= x) & (letter < len(text))
    numbers = np.array([LETTERS.index(each) for each in text])
    across = np.where(inside, numbers[np.minimum(letter, len(text) - 1)], len(LETTERS))
    rows = np.arange(PATCH / 2, SIDE, PATCH)
    shown = (rows >= y + top) & (rows < y + bottom)
    shown[np.abs(rows - (y + (top + bottom) / 2)).argmin()] = True
    return picture, np.where(shown[:, None], np.stack([across, np.where(inside, letter, -100)])[:, None], -100)
