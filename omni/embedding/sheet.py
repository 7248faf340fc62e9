"""Hits of a search as one picture: a tile for each item, drawn by its modality, with its similarity and its name."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from omni.items import read_item
from omni.modality import ItemError
from omni.registry import get_modality

from .searching import Hit

TILE, GAP, WORDS = 160, 8, 34
"""Pixels of a side, between tiles, and for the words below."""
COLUMNS = 6
MOST_ROWS = 60


def draw_sheet(rows: Sequence[Sequence[Hit]], modality: str | None) -> Image.Image:
    """A sheet with rows of hits; a long row continues on the next line.

    Args:
        rows: one for a search, or one for each group of duplicates; at most `MOST_ROWS` lines of tiles are drawn.
        modality: the name of the modality of all items; None if the files tell.
    """
    lines = [row[start : start + COLUMNS] for row in rows for start in range(0, len(row), COLUMNS)][:MOST_ROWS]
    width = max(map(len, lines), default=1)
    sheet = Image.new("RGB", (width * (TILE + GAP) + GAP, max(len(lines), 1) * (TILE + WORDS + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for down, line in enumerate(lines):
        for across, hit in enumerate(line):
            left, top = GAP + across * (TILE + GAP), GAP + down * (TILE + WORDS + GAP)
            tile, note = _tile(hit.file, modality)
            sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
            name = Path(hit.path).name
            words = [f"{hit.similarity:.3f}{note}", name if len(name) <= 24 else f"{name[:10]}...{name[-11:]}"]
            for place, text in enumerate(words):
                pen.text((left, top + TILE + 2 + 15 * place), text, fill="black", font=font)
    return sheet


def _tile(file: Path, modality: str | None) -> tuple[Image.Image, str]:
    """An item as a small picture; a grey one, and a note, if it cannot be read or drawn."""
    empty = Image.new("RGB", (TILE, TILE), "lightgrey")
    try:
        item = read_item(file, None if modality is None else [modality])
    except ItemError:
        return empty, ", not to be read"
    show = get_modality(item.modality).show
    if show is None:
        return empty, ""
    shown = show(item.value).convert("RGB")
    shown.thumbnail((TILE, TILE))
    return shown, ""
