"""Folders of pictures by class for `benchmarks.ten_lines`: TRAIN and TEST in a new folder.

    python -m benchmarks.class_folders emoji OUT PACKAGES     # node_modules with emoji-datasource-google and so on
    python -m benchmarks.class_folders digits OUT             # scikit-learn's scans of handwritten digits
    python -m benchmarks.class_folders letters OUT FONTS      # a folder of fonts, such as /usr/share/fonts

Emoji: the category of each, three vendors to learn from, the fourth (facebook) held out. Digits: a fifth is held out.
Letters: upper and lower case are one class; the fonts of every third folder are held out.
"""

import json
import string
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

VENDORS = ("google", "twitter", "apple", "facebook")
SIDE = 64
MOST_FONTS = 120

app = typer.Typer()


def _save(picture: Image.Image, folder: Path, split: str, label: str, name: str) -> None:
    path = folder / split / label / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


@app.command()
def emoji(out: Path, packages: Path) -> None:
    """Categories of the emoji that all four vendors draw. Transparency becomes white."""
    folders = {vendor: packages / f"emoji-datasource-{vendor}" for vendor in VENDORS}
    for row in json.loads((folders["google"] / "emoji.json").read_text(encoding="utf-8")):
        files = {vendor: folders[vendor] / "img" / vendor / "64" / row["image"] for vendor in VENDORS}
        if not all(row[f"has_img_{vendor}"] and files[vendor].exists() for vendor in VENDORS):
            continue
        for vendor, file in files.items():
            drawn = Image.open(file).convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")
            split = "test" if vendor == "facebook" else "train"
            _save(picture, out, split, row["category"].replace("/", "-"), f"{vendor}_{file.stem}")


@app.command()
def digits(out: Path) -> None:
    """1,797 scans of 8 x 8 pixels, enlarged."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    parts = train_test_split(range(len(found.target)), test_size=0.2, stratify=found.target, random_state=0)
    for split, part in zip(("train", "test"), parts, strict=True):
        for number in part:
            scan = Image.fromarray((found.images[number] * 255 / 16).astype(np.uint8))
            picture = scan.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            _save(picture, out, split, str(found.target[number]), f"{number:04}")


@app.command()
def letters(out: Path, fonts: Path) -> None:
    """The letters of every font that has them, black on white; at most `MOST_FONTS` fonts of each split, drawn evenly."""
    files = sorted([*fonts.rglob("*.ttf"), *fonts.rglob("*.otf")])
    folders = sorted({file.parent for file in files})
    held_out = set(folders[::3])
    for split in ("train", "test"):
        own = [font for file in files if (file.parent in held_out) == (split == "test") for font in _opened(file)]
        for file, font in own[:: max(1, len(own) // MOST_FONTS)][:MOST_FONTS]:
            for letter in string.ascii_letters:
                name = f"{file.stem}_{letter}{'_' if letter.isupper() else ''}"
                _save(_drawn(font, letter), out, split, letter.lower(), name)


def _opened(file: Path) -> Iterator[tuple[Path, ImageFont.FreeTypeFont]]:
    """The font, unless it draws some letters alike, as fonts of symbols and those without lower case do."""
    try:
        font = ImageFont.truetype(file, 40)
        drawn = {(*font.getmask(letter).size, bytes(font.getmask(letter))) for letter in string.ascii_letters}
    except OSError:
        return
    if len(drawn) == len(string.ascii_letters):
        yield file, font


def _drawn(font: ImageFont.FreeTypeFont, letter: str) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(picture).text((SIDE / 2, SIDE / 2), letter, "black", font, anchor="mm")
    return picture


if __name__ == "__main__":
    app()
