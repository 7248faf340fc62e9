"""How the page looks: what a visit holds, as HTML. Whatever somebody typed or named is escaped.

`page` is the whole; what changes in it stands inside the elements "pictures", "notice" and "answer".
"""

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO

from PIL import Image

from omni.session import Answer

from .visit import LONGEST, View, Visit

COLORS = {
    "red": "#e6194b",
    "orange": "#f58231",
    "yellow": "#ffe119",
    "green": "#3cb44b",
    "cyan": "#42d4f4",
    "blue": "#4363d8",
    "purple": "#911eb4",
    "black": "#000000",
}
"""To draw with."""

STEPS = {
    "decoding": "decode pictures",
    "preparing": "prepare prompt",
    "encoding": "encode pictures",
    "reading": "read prompt (prefill)",
    "writing": "write answer (decode)",
}
"""What time was spent on, in the order in which it was."""


def page(header: str, chooser: str) -> str:
    """The whole page, before anything is chosen; without a chooser, where the model sees nothing."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>omni</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="page.css">
<script type="module" src="page.js"></script>
{header}
<main>
{chooser}
<section>
<form><label for="question">Question</label><div>
<textarea id="question" rows="1" maxlength="{LONGEST}" placeholder="what color is the circle"></textarea><button>Ask</button>
</div></form>
<div id="notice" role="alert"></div>
<div id="answer">{welcome()}</div>
</section>
</main>
"""


def chooser(shown: Sequence[tuple[Image.Image, str]]) -> str:
    """Where pictures are chosen: uploaded, picked, drawn; and where they stand."""
    colors = "".join(
        f'<input type="radio" name="color" value="{value}" aria-label="{name}" style="--color:{value}" '
        f"{'checked' if name == 'red' else ''}>"
        for name, value in COLORS.items()
    )
    return f"""<section>
<label class="drop">Drop pictures here, or choose them<input id="files" type="file" accept="image/*" multiple></label>
{examples(shown)}
<details><summary>Draw a picture</summary>
<canvas width="448" height="448" aria-label="Paper"></canvas>
<div class="tools">{colors}<button id="clear">Clear</button><button id="draw">Use the drawing</button></div>
</details>
<label><input id="together" type="checkbox"> Several pictures: add to those below</label>
<div id="pictures"></div>
</section>"""


def header(checkpoint: str, parameters: int, fingerprints: dict[str, str] | None) -> str:
    """Which model answers."""
    marks = [f"{part} {mark[:8]}" for part, mark in (fingerprints or {}).items()]
    facts = [f"{parameters / 1e6:,.1f} M parameters", *marks]
    about = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    return f"<header><h1>omni</h1><p><strong>{escape(checkpoint)}</strong>{about}</p></header>"


def pictures(visit: Visit) -> str:
    """The chosen pictures, each with a button that takes it away."""
    views = visit.views()
    word = visit.answer.answer.split()[visit.word] if visit.answer and visit.word is not None else ""
    figures = "".join(_figure(number, view, word, len(views)) for number, view in enumerate(views))
    return f'<div class="pictures {"several" if len(views) > 1 else ""}">{figures}</div>' if views else ""


def _figure(number: int, view: View, word: str, count: int) -> str:
    name = f"{number + 1}. {view.name}" if count > 1 else view.name
    alt, caption = name, escape(name)
    if view.weight is not None:
        alt = f"{name}, and where the model looked for the word {word}"
        caption = f"<q>{escape(word)}</q>: {view.weight:.0%} of its attention lies here"
    remove = f'<button data-remove="{number}" aria-label="remove {escape(name)}" title="remove">&times;</button>'
    caption = f"<figcaption><span>{caption}</span>{remove}</figcaption>"
    return f'<figure><img src="{_uri(view.picture)}" alt="{escape(alt)}">{caption}</figure>'


def notice(sentences: Sequence[str]) -> str:
    """What went wrong, one sentence each."""
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def examples(shown: Sequence[tuple[Image.Image, str]]) -> str:
    """Pictures to pick, with a question about each."""
    buttons = "".join(
        f'<button data-pick="{number}"><img src="{_uri(picture)}" alt="">{escape(question)}</button>'
        for number, (picture, question) in enumerate(shown)
    )
    return f'<div class="examples">{buttons}</div>' if shown else ""


def welcome() -> str:
    """Before the first question."""
    return (
        '<p class="hint">Choose a picture, and ask about it. Of each word of the answer you can see where the model '
        "looked for it.</p>"
    )


def waiting() -> str:
    """Before the first word."""
    return '<div class="answer" aria-busy="true"><p><i class="caret"></i></p></div>'


def writing(answer: Answer) -> str:
    """An answer that is not whole."""
    return f'<div class="answer" aria-busy="true"><p>{escape(answer.answer)} <i class="caret"></i></p></div>'


def answered(visit: Visit) -> str:
    """The answer, whose words can be looked at, and what its time was spent on."""
    answer = visit.answer
    if answer is None:
        return welcome()
    words = [
        f'<button data-word="{place}" aria-pressed="{"true" if place == visit.word else "false"}">{escape(word)}</button>'
        for place, word in enumerate(answer.answer.split())
    ]
    hint = (
        "Press a word to see where the model looked for it, once more to see the picture."
        if words and visit.pictures
        else ""
    )
    if not words:
        hint = "The model ended without a word."
    if not answer.complete:
        hint = f"Stopped after {answer.tokens_written} tokens. {hint}"
    if not visit.pictures:
        words = [escape(answer.answer)]
    return f'<div class="answer"><p>{" ".join(words)}</p><p class="hint">{hint}</p></div>{_times(answer)}'


def _times(answer: Answer) -> str:
    total = sum(answer.seconds.values())
    steps = [(name, label, answer.seconds[name]) for name, label in STEPS.items()]
    bar = "".join(f'<i class="{name}" style="width:{seconds / total:.2%}"></i>' for name, _, seconds in steps)
    rows = "".join(
        f'<li><i class="{name}"></i>{label}<b>{seconds * 1000:,.1f} ms</b></li>' for name, label, seconds in steps
    )
    return (
        f'<div class="times"><div class="bar" aria-hidden="true">{bar}</div><ul>{rows}</ul>'
        f"<p>{total * 1000:,.0f} ms in all; {answer.tokens_read} tokens read, {answer.tokens_written} written</p></div>"
    )


def _uri(picture: Image.Image) -> str:
    """The picture within the page: nobody else can ask for it, and nothing of it lies on a disk."""
    buffer = BytesIO()
    picture.save(buffer, "PNG", compress_level=1)  # five times as fast as 6, for files that are a sixth larger
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
