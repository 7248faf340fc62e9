"""A sheet to look through: one HTML file with items as pictures, questions and answers, the most mistakes first.

The file contains its pictures and needs no network and no script. It can be read on a phone, and without colours.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from omni.files import write_text_whole
from omni.modality import Modality
from omni.registry import get_modality

from .asking import Items
from .measuring import Outcome
from .scores import Asked
from .tables import remarks, tabulate, title

LARGEST = 448
"""Longest side of a picture on the sheet, in pixels."""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --wrong: #b3261e; --right: #2e7d32; }
@media (prefers-color-scheme: dark) { :root { --wrong: #ff8a80; --right: #81c784; } }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 76rem; }
h1 { font-size: 1.35rem; overflow-wrap: anywhere; }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
article { border: 1px solid var(--line); border-radius: .6rem; padding: .8rem; min-width: 0; }
article h2 { font-size: 1rem; margin: .5rem 0; overflow-wrap: anywhere; }
article div { display: flex; flex-wrap: wrap; gap: .4rem; align-items: flex-start; }
article img { flex: 1 1 8rem; min-width: 0; max-width: 100%; height: auto; border-radius: .3rem; }
ul { list-style: none; margin: 0; padding: 0; }
li { border-left: .25rem solid var(--right); margin: .5rem 0; padding-left: .6rem; overflow-wrap: anywhere; }
li.wrong { border-left: .25rem double var(--wrong); }
li b { color: var(--right); }
li.wrong b { color: var(--wrong); }
li small { opacity: .75; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
"""


def write_sheet(path: str | Path, outcome: Outcome, limit: int = 60) -> None:
    """Write the sheet as one HTML file.

    Args:
        path: path of the file. An existing file is replaced.
        outcome: see `evaluate`.
        limit: number of examples to show at most. Those with the most mistakes come first.
    """
    by_example: dict[int, list[Asked]] = {}
    for asked in outcome.asked:
        by_example.setdefault(asked.example, []).append(asked)
    worst = sorted(by_example, key=lambda example: (-sum(not asked.right for asked in by_example[example]), example))
    wrong = sum(not all(asked.right for asked in group) for group in by_example.values())
    shown = worst[:limit]
    header, *rows = tabulate(outcome.result)
    about = (
        f"{len(shown):,} of {outcome.examples:,} examples are shown, those with the most mistakes first; "
        f"{wrong:,} of all have mistakes. ✗ marks a wrong answer, ✓ a right one."
    )
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title(outcome.result))}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title(outcome.result))}</h1>",
        '<div class="table"><table>',
        _row("th", header),
        *(_row("td", row) for row in rows),
        "</table></div>",
        *(f"<p>{escape(sentence)}</p>" for sentence in [*remarks(outcome.result), about]),
        "<main>",
        *(_article(by_example[example], outcome.items(example)) for example in shown),
        "</main></body></html>",
    ]
    write_text_whole(Path(path), "\n".join(parts) + "\n")


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _article(group: Sequence[Asked], items: Items) -> str:
    mistakes = sum(not asked.right for asked in group)
    images = "".join(
        _drawn(get_modality(name), item, f"{number} of {escape(group[0].source)}")
        for name, each in items.items()
        for number, item in enumerate(each, start=1)
    )
    ordered = sorted(group, key=lambda asked: asked.right)
    answers = "".join(_answer(asked) for asked in ordered)
    heading = f"{escape(group[0].source)}: {mistakes} of {len(group)} wrong"
    return f"<article><div>{images}</div><h2>{heading}</h2><ul>{answers}</ul></article>"


def _drawn(modality: Modality, item: Any, which: str) -> str:
    """An item as a picture; in words, where its plug-in draws none."""
    if modality.show is None:
        return f"<p>{modality.noun} {which}</p>"
    return f'<img src="{_data(modality.show(item))}" alt="{modality.noun} {which}">'


def _answer(asked: Asked) -> str:
    question = "" if asked.question in ("", asked.kind) else f"{escape(asked.question)} "
    kind = f"<small>[{escape(asked.kind)}]</small>"
    if asked.right:
        return f"<li>{question}{kind}<br><b>✓ right:</b> {escape(asked.answer)}</li>"
    stopped = "" if asked.complete else " <small>(stopped)</small>"
    return (
        f'<li class="wrong">{question}{kind}<br><b>✗ wrong:</b> {escape(asked.answer) or "<i>nothing</i>"}{stopped}'
        f"<br>expected: {escape(asked.expected)}</li>"
    )


def _data(picture: Image.Image) -> str:
    """A picture as a data URI, in JPEG without chroma subsampling."""
    picture = picture.copy()
    picture.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=92, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
