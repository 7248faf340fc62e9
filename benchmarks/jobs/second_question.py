"""A second question about the same picture: time to its first token, beside that of a first question.

A first question prepares and encodes the picture, and the Thinker reads it as the beginning of the prompt. Two things can
be kept:

    a session        all of it, so the Thinker reads only the question
    encoded items    the encoder's tokens, as caches keep them, so the Thinker reads the whole prompt again

A contestant whose answer differs from that of a first question does not run.
"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from typing import Any

import torch

from benchmarks import peers, pictures
from benchmarks.measure import Call, Contestant, Race
from omni.loading.checkpoint import load
from omni.questions import Answer, make_prompts
from omni.session import Session

Ask = Callable[[str, int], Answer]

QUESTIONS = "what color is the circle", "how many objects are there"
"""These are asked in turns, because a session that is asked the same question again has nothing new to read."""


def races(quick: bool) -> Iterator[Race]:
    """One race, on the shipped checkpoint."""
    contestants = [
        Contestant("first question", lambda: _in_turns(_anew([_picture()]))),
        Contestant("second question, encoded items kept", lambda: _in_turns(_anew(_items())), ours=True),
        Contestant("second question in a session", lambda: _in_turns(Session(*_model(), [_picture()]).ask), ours=True),
    ]
    yield Race("time to the first token", contestants)


@cache
def _model() -> tuple[Any, Any]:
    return load(peers.CHECKPOINTS / "omni_tiny")


@cache
def _picture() -> Any:
    return pictures.photo(0, pictures.SIZES[0])


def _items() -> list[Any]:
    model, processor = _model()
    prepared = make_prompts(processor, [(QUESTIONS[0], [_picture()])])["pixel_values"]
    with torch.inference_mode():
        items: list[Any] = model.model.encode_items("image", pixel_values=prepared)
    return items


def _anew(shown: list[Any]) -> Ask:
    """A session for each question."""
    return lambda question, limit: Session(*_model(), shown).ask(question, limit)


def _in_turns(ask: Ask) -> Call:
    for question in QUESTIONS:
        found, expected = (way(question, 16).answer for way in (ask, _anew([_picture()])))
        if found != expected:
            raise ValueError(f"it answers {question!r} with {found!r}, and not with {expected!r}.")
    questions = cycle(QUESTIONS)
    return lambda: ask(next(questions), 1)
