"""Describe a scene in one sentence, and read such a sentence back."""

import re

from .scene import Scene
from .vocabulary import ATTRIBUTES, NEUTRAL, PLACES


def caption(scene: Scene) -> str:
    """All objects in reading order: "a small solid red circle at the top left, a large dotted pink ring at the top"."""
    require_colors(scene)
    return ", ".join(
        f"a {thing.size} {thing.pattern} {thing.color} {thing.shape} at the {PLACES[thing.place]}"
        for thing in scene.objects
    )


_WORD_IN_CAPTION = {
    name: re.compile(r"\b(" + "|".join(sorted(values, key=len, reverse=True)) + r")\b")
    for name, values in {**ATTRIBUTES, "place": PLACES}.items()
}


def parse_caption(text: str) -> list[dict[str, str]]:
    """The inverse of `caption`: one dictionary for each object, with the attributes and the place that the text names.

    It scores the captions of models, so it never raises. A fragment that names no attribute is left out.
    """
    objects = []
    for fragment in re.split(r",|\band\b|\.", text.lower()):
        found = {name: match[1] for name, word in _WORD_IN_CAPTION.items() if (match := word.search(fragment))}
        if found:
            objects.append(found)
    return objects


def require_colors(scene: Scene) -> None:
    """Refuse a scene with objects that have no named colour. Raises ValueError."""
    if any(thing.color == NEUTRAL for thing in scene.objects):
        raise ValueError(
            f"scene {scene.seed} of split {scene.split!r} has objects without a named colour, which no question or caption "
            "can name; sample it with neutral=0"
        )
