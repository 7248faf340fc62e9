"""A visit as HTML. All typed text and all names of files are escaped.

`page` is the whole page. Its changing parts are the elements "items", "notice", "answer" and "turns", and for each item
"view-0", "view-1" and so on.
"""

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO

from PIL import Image

from omni.items import Item, nouns
from omni.modality import Modality
from omni.questions import Answer

from .visit import KEPT, LONGEST, Chosen, Turn, View, Visit

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
"""Colours to draw with."""

STEPS = {
    "decoding": "decode {}",
    "preparing": "prepare prompt",
    "encoding": "encode {}",
    "reading": "read prompt (prefill)",
    "writing": "write answer (decode)",
}
"""The steps of an answer in order, with their labels."""


def page(header: str, chooser: str, prompt: str | None) -> str:
    """The whole page before anything is chosen.

    Args:
        header: see `header`.
        chooser: see `chooser`; empty if the model takes no files.
        prompt: the question that is asked if none is typed; None if there is none.
    """
    hint = f'<p class="hint" id="prompt">Left empty, it is: <q>{escape(prompt)}</q></p>' if prompt else ""
    described = ' aria-describedby="prompt"' if prompt else ""
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
<textarea id="question" rows="1" maxlength="{LONGEST}"{described}></textarea><button>Ask</button>
</div>{hint}</form>
<div id="notice" role="alert"></div>
<div id="answer" aria-live="polite">{welcome(chooser != "")}</div>
<div id="turns"></div>
</section>
</main>
"""


def header(checkpoint: str, knowledge: Sequence[str], parameters: int, fingerprints: dict[str, str] | None) -> str:
    """The header: which model answers, and sentences about it (`knows.knowledge`)."""
    known = "".join(f"<li>{escape(sentence)}</li>" for sentence in knowledge)
    facts = [f"{parameters / 1e6:,.1f} M parameters"]
    facts += [f"{part} {mark[:8]}" for part, mark in (fingerprints or {}).items()]
    about = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        f"<header><h1>omni</h1><p>{escape(checkpoint)}</p><ul>{known}</ul>"
        f"<details><summary>Its weights</summary><ul>{about}</ul></details></header>"
    )


def chooser(bundles: Sequence[Modality], shown: Sequence[tuple[Image.Image | None, str]]) -> str:
    """The section where items are uploaded, recorded, picked or drawn, and shown.

    Args:
        bundles: the modalities that take files.
        shown: for each example its picture, if it has one, and the question about it.
    """
    media_types = [each for bundle in bundles for each in bundle.media_types]
    accept = ",".join(dict.fromkeys([*media_types, *(suffix for bundle in bundles for suffix in bundle.suffixes)]))
    kinds = " or ".join(f"{bundle.noun}s" for bundle in bundles)
    recorder = '<button id="record" class="tool">Record with the microphone</button>'
    colors = "".join(
        f'<input type="radio" name="color" value="{value}" aria-label="{name}" style="--color:{value}" '
        f"{'checked' if name == 'red' else ''}>"
        for name, value in COLORS.items()
    )
    paper = f"""<details><summary>Draw a picture</summary>
<canvas width="448" height="448" role="img" aria-label="Paper"></canvas>
<div class="tools">{colors}
<button id="clear" class="tool">Clear</button><button id="draw" class="tool">Use the drawing</button></div>
</details>"""
    return f"""<section>
<label class="drop">Drop {escape(kinds)} here, or choose them
<input id="files" type="file" accept="{accept}" multiple></label>
{recorder if _takes(media_types, "audio") else ""}
{examples(shown)}
{paper if _takes(media_types, "image") else ""}
<label><input id="together" type="checkbox"> Several: add to those below</label>
<div id="items"></div>
</section>"""


def _takes(media_types: Sequence[str], kind: str) -> bool:
    return any(each.startswith(f"{kind}/") for each in media_types)


def items(visit: Visit) -> str:
    """The chosen items. Each has a button to remove it, and a player if browsers play such files."""
    shown = views(visit).items()
    figures = "".join(
        f'<div><figure id="{place}">{view}</figure>{_player(item)}<button data-remove="{number}" '
        f'aria-label="remove {escape(item.name)}" title="remove">&times;</button></div>'
        for number, (item, (place, view)) in enumerate(zip(visit.items, shown, strict=True))
    )
    return f'<div class="items {"several" if len(visit.items) > 1 else ""}">{figures}</div>' if figures else ""


def views(visit: Visit) -> dict[str, str]:
    """The HTML of each item by the id of its element, perhaps with the attention of a word over it."""
    word = visit.answer.answer.split()[visit.word] if visit.answer and visit.word is not None else ""
    shown = visit.views()
    return {f"view-{number}": _view(number, view, word, len(shown)) for number, view in enumerate(shown)}


def _view(number: int, view: View, word: str, count: int) -> str:
    name = f"{number + 1}. {view.name}" if count > 1 else view.name
    alt, caption = name, escape(name)
    if view.weight is not None:
        alt = f"{name}, and where the attention at the word {word} lies"
        caption = f"<q>{escape(word)}</q>: {view.weight:.0%} of its attention lies here"
    return f"{_image(view.picture, alt)}<figcaption>{caption}</figcaption>"


def _player(item: Chosen) -> str:
    """A player for an item. The script gets the file from the server."""
    tag = item.media_type.partition("/")[0]
    return tag and f'<{tag} controls aria-label="play {escape(item.name)}" data-play="{item.key}"></{tag}>'


def notice(sentences: Sequence[str]) -> str:
    """Error messages."""
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def examples(shown: Sequence[tuple[Image.Image | None, str]]) -> str:
    """Example items to pick, with a question about each."""
    buttons = "".join(
        f'<button data-pick="{number}">{_image(picture, "")}{escape(question)}</button>'
        for number, (picture, question) in enumerate(shown)
    )
    return f'<div class="examples">{buttons}</div>' if shown else ""


def welcome(chooses: bool = True) -> str:
    """The element "answer" before the first question."""
    said = "Choose something, and ask about it. Of each word of the answer you can see where the attention of the model lay."
    return f'<p class="hint">{said if chooses else "Ask something."}</p>'


def waiting() -> str:
    """The element "answer" before the first word of an answer."""
    return '<div class="answer" aria-busy="true"><p><i class="caret"></i></p></div>'


def writing(answer: Answer) -> str:
    """An answer that is still being written."""
    return f'<div class="answer" aria-busy="true"><p>{escape(answer.answer)} <i class="caret"></i></p></div>'


def answered(visit: Visit) -> str:
    """The answer, with a button for each word, and how its time was spent."""
    answer = visit.answer
    if answer is None:
        return welcome()
    words = [
        f'<button data-word="{place}" aria-pressed="{"true" if place == visit.word else "false"}">{escape(word)}</button>'
        for place, word in enumerate(answer.answer.split())
    ]
    hint = (
        "Press a word to see where the attention of the model lay, once more to hide it."
        if words and visit.items
        else ""
    )
    if not words:
        hint = "The model ended without a word."
    if not answer.complete:
        hint = f"Stopped after {answer.tokens_written} tokens. {hint}"
    if not visit.items:
        words = [escape(answer.answer)]
    said = f'<p>{" ".join(words)}</p>{_certainty(visit, answer)}<p class="hint">{hint}</p>'
    return f'<div class="answer">{said}</div>{_times(visit, answer)}'


def _certainty(visit: Visit, answer: Answer) -> str:
    """The confidence of the answer, and a note about inputs that are unlike training, if they are known."""
    sure = "" if answer.confidence is None else f'<p class="sure">{answer.confidence:.0%} sure</p>'
    strange = answer.familiar and answer.familiar.note([item.modality for item in visit.items])
    return f'{sure}<p class="strange" role="note">{escape(strange)}</p>' if strange else sure


def _times(visit: Visit, answer: Answer) -> str:
    total = sum(answer.seconds.values())
    given = nouns([Item(item.modality, item) for item in visit.items]) or "nothing"
    steps = [(name, label.format(given), answer.seconds[name]) for name, label in STEPS.items()]
    bar = "".join(f'<i class="{name}" style="width:{seconds / total:.2%}"></i>' for name, _, seconds in steps)
    rows = "".join(
        f'<li><i class="{name}"></i>{label}<b>{seconds * 1000:,.1f} ms</b></li>' for name, label, seconds in steps
    )
    return (
        f'<div class="times"><div class="bar" aria-hidden="true">{bar}</div><ul>{rows}</ul>'
        f"<p>{total * 1000:,.0f} ms in all; {answer.tokens_read} tokens read, {answer.tokens_written} written</p></div>"
    )


def turns(visit: Visit) -> str:
    """Earlier questions, the newest first, without the present one."""
    earlier = visit.turns[: len(visit.turns) - (visit.answer is not None)]
    if not earlier:
        return ""
    return f"<h2>Earlier, up to {KEPT} questions</h2><ol>{''.join(map(_turn, reversed(earlier)))}</ol>"


def _turn(turn: Turn) -> str:
    about = "".join(f"<span>{_image(view.picture, '')}{escape(view.name)}</span>" for view in turn.about)
    return f"<li><p>{escape(turn.question or '(nothing typed)')}</p><p>{escape(turn.answer)}</p><p>{about}</p></li>"


def _image(picture: Image.Image | None, alt: str) -> str:
    """A picture inside of the page. So nobody else can request it, and it is not written to a disk."""
    if picture is None:
        return ""
    buffer = BytesIO()
    picture.save(buffer, "PNG", compress_level=1)  # five times as fast as 6, for files that are a sixth larger
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img src="{uri}" alt="{escape(alt)}">'
