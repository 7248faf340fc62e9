"""Write the rows that `checkpoints/omni_world` is trained and measured on, of what pictures.py fetched, and rows of words.

    python examples/vision_world/rows.py runs/world

In `runs/world/asked`, `names.jsonl` asks "what is it" about emoji with one of the 500 names that most drawings have, and
`words.jsonl` asks "what is written" about printed words. `test.jsonl` asks the same about the emoji of vendors, the words
and the fonts that are in no training; its kinds are `name`, `word` (English) and `letters` (any).
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from pictures import FONTS, HELD_OUT, drawn_by_all, held_out
from PIL import Image
from train import views
from words import LETTERS, MOST, drawn, english, fonts_in

NAMES, VIEWS, WORDS, TESTED = 500, 2, 24000, 500
ASKED = ("apple", "facebook")
NAME, READ = "what is it", "what is written"


def main(folder: Path) -> None:
    """Write the pictures and rows."""
    torch.manual_seed(0)
    np.random.seed(0)
    made = folder / "asked"
    for part in ("train", "test"):
        (made / part).mkdir(parents=True)
    emoji = json.loads((folder / "fetched/emoji-datasource-google@16.0.0/package/emoji.json").read_text())
    labels = np.load(folder / "emoji_labels.npy")
    many = np.bincount(labels, minlength=len(emoji))
    shown = [i for i, each in enumerate(emoji) if drawn_by_all(each) and not held_out(each)]
    chosen = sorted(shown, key=lambda i: -int(many[i]))[:NAMES]
    names = {i: emoji[i]["name"].lower() for i in chosen}
    write(made / "names.jsonl", name_rows(folder, names, labels))
    write(made / "words.jsonl", word_rows(made, "train", FONTS, WORDS, {*names.values()}))
    test = [
        {"image": f"../emoji/{vendor}/{emoji[i]['image']}", "question": NAME, "answer": name, "kind": "name"}
        for i, name in names.items()
        for vendor in ASKED
    ]
    write(made / "test.jsonl", test + word_rows(made, "test", HELD_OUT, 2 * TESTED, set()))


def write(file: Path, rows: list[dict[str, str]]) -> None:
    """One row a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def name_rows(folder: Path, names: dict[int, str], labels: np.ndarray) -> list[dict[str, str]]:
    """Each drawing of each of the names: as it is, on white, and in other views."""
    emoji, photos = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("emoji", "photos"))
    places = np.repeat(np.where(np.isin(labels, list(names)))[0], VIEWS)
    rows = []
    for part in np.array_split(places, len(places) // 100):
        for place, view in zip(part, views(emoji[part], photos), strict=True):
            file = f"train/{len(rows)}.png"
            Image.fromarray(view.round().byte().permute(1, 2, 0).numpy()).save(folder / "asked" / file)
            rows.append({"image": file, "question": NAME, "answer": names[int(labels[place])], "kind": "name"})
    for place in places[::VIEWS]:
        file = f"train/{len(rows)}.png"
        Image.fromarray(emoji[place]).save(folder / "asked" / file)
        rows.append({"image": file, "question": NAME, "answer": names[int(labels[place])], "kind": "name"})
    return rows


def word_rows(made: Path, part: str, packages: list[str], count: int, names: set[str]) -> list[dict[str, str]]:
    """Printed words, half of them English and half of any letters; none that is a name."""
    chance, fetched = random.Random(part), made.parent / "fetched"
    fonts = fonts_in(fetched / package for package in packages)
    photos = np.load(made.parent / "photos.npy", mmap_mode="r")
    words = [w for w in english(fetched / "an-array-of-english-words@2.0.0/package", part == "test") if w not in names]
    print(part, len(fonts), "fonts,", len(words), "words")
    rows = []
    for n in range(count):
        kind = ("word", "letters")[n % 2]
        text = chance.choice(words) if kind == "word" else "".join(chance.choices(LETTERS, k=chance.randint(1, MOST)))
        file = f"{part}/word-{n}.png"
        drawn(text, chance.choice(fonts), chance, photos)[0].save(made / file, compress_level=1)
        rows.append({"image": file, "question": READ, "answer": text, "kind": kind})
    return rows


if __name__ == "__main__":
    main(Path(sys.argv[1]))
