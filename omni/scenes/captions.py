"""A scene in one sentence, and back."""

import re

from .scene import Scene
from .vocabulary import ATTRIBUTES, NEUTRAL, PLACES


def caption(scene: Scene) -> str:
    """All objects in reading order: "a small solid red circle at the top left, a large dotted pink ring at the top"."""
    require_colors(scene)
    return ", ".join(
        f"a {item.size} {item.pattern} {item.color} {item.shape} at the {PLACES[item.place]}" for item in scene.objects
    )


_WORD_IN_CAPTION = {
    name: re.compile(r"\b(" + "|".join(sorted(values, key=len, reverse=True)) + r")\b")
    for name, values in {**ATTRIBUTES, "place": PLACES}.items()
}


def parse_caption(text: str) -> list[dict[str, str]]:
    """The inverse of `caption`: one dict per object, with those of its attributes and place that the text names.

    Made for scoring what a model says, so it never raises: a fragment that names nothing is left out.
    """
    objects = []
    for fragment in re.split(r",|\band\b|\.", text.lower()):
        found = {name: match[1] for name, word in _WORD_IN_CAPTION.items() if (match := word.search(fragment))}
        if found:
            objects.append(found)
    return objects


def require_colors(scene: Scene) -> None:
    """Refuse a scene with objects that have no named colour, of which nothing can be said (ValueError)."""
    if any(item.color == NEUTRAL for item in scene.objects):
        raise ValueError(
            f"scene {scene.seed} of split {scene.split!r} has objects without a named colour, so there is nothing "
            "to say about it; sample it with neutral=0 to ask questions"
        )
