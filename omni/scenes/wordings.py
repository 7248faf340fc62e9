"""The sentences that ask each kind of question: those of training, and those that only evaluation uses."""

import random
from dataclasses import dataclass
from typing import Literal

WordingSet = Literal["seen", "held_out"]
"""The wordings of training, or those that only evaluation uses."""


@dataclass(frozen=True, slots=True)
class Wordings:
    """Ways to ask one kind of question: those of training, and those that only evaluation uses."""

    seen: tuple[str, ...]
    held_out: tuple[str, ...]


WORDINGS: dict[str, Wordings] = {
    "shape": Wordings(
        (
            "what shape is {it}",
            "what is the shape of {it}",
            "name the shape of {it}",
            "what shape does {it} have",
            "which shape is {it}",
            "give the shape of {it}",
            "tell me what shape {it} is",
            "say which shape {it} has",
        ),
        ("which shape does {it} have", "tell me the shape of {it}"),
    ),
    "color": Wordings(
        (
            "what color is {it}",
            "what is the color of {it}",
            "name the color of {it}",
            "what color does {it} have",
            "which color is {it}",
            "give the color of {it}",
            "tell me what color {it} is",
            "say which color {it} has",
        ),
        ("which color does {it} have", "tell me the color of {it}"),
    ),
    "size": Wordings(
        (
            "what size is {it}",
            "how big is {it}",
            "what is the size of {it}",
            "is {it} small, medium or large",
            "which size is {it}",
            "what size does {it} have",
            "tell me the size of {it}",
            "say how large {it} is",
            "is {it} large, medium or small",
            "how large would you say {it} is",
            "how big does {it} look",
            "how large does {it} look",
            "tell me how large {it} is",
            "how large an object is {it}",
            "how large or small is {it}",
        ),
        ("which size does {it} have", "how large is {it}"),
    ),
    "pattern": Wordings(
        (
            "what pattern does {it} have",
            "is {it} solid, striped or dotted",
            "what is the pattern of {it}",
            "which pattern is on {it}",
            "name the pattern of {it}",
            "tell me what pattern {it} has",
            "say which pattern {it} has",
            "is {it} dotted, striped or solid",
        ),
        ("which pattern does {it} have", "tell me the pattern of {it}"),
    ),
    "where": Wordings(
        (
            "where is {it}",
            "what is the position of {it}",
            "where in the picture is {it}",
            "in which place is {it}",
            "tell me where {it} is",
            "give the location of {it}",
            "what place is {it} in",
            "where can you find {it}",
            "where in the picture do you see {it}",
        ),
        ("what is the location of {it}", "where do you see {it}"),
    ),
    "count": Wordings(
        (
            "how many objects are there",
            "count the objects",
            "how many objects are in the picture",
            "how many objects do you see",
            "give the number of objects",
            "tell me how many objects there are",
            "tell me the number of objects",
            "how many objects can you see",
            "how many objects does the picture contain",
            "how many shapes are there",
            "how many things are in the picture",
        ),
        ("what is the number of objects", "how many objects does the picture show"),
    ),
    "count_kind": Wordings(
        (
            "how many {kind} are there",
            "count the {kind}",
            "how many {kind} are in the picture",
            "how many {kind} can you see",
            "give the number of {kind}",
            "tell me how many {kind} there are",
            "tell me the number of {kind}",
            "how many {kind} does the picture show",
        ),
        ("what is the number of {kind}", "how many {kind} do you see"),
    ),
    "exists": Wordings(
        (
            "is there {kind}",
            "do you see {kind}",
            "is there {kind} in the picture",
            "does the picture show {kind}",
            "does the picture have {kind}",
            "can you find {kind}",
            "is {kind} in the picture",
            "tell me if there is {kind}",
        ),
        ("can you see {kind}", "does the picture contain {kind}"),
    ),
    "relation": Wordings(
        (
            "what is {side} {it}",
            "which object is {side} {it}",
            "name the object {side} {it}",
            "what object is {side} {it}",
            "what can you find {side} {it}",
            "which object do you see {side} {it}",
            "say what is {side} {it}",
            "tell me which object is {side} {it}",
        ),
        ("what do you see {side} {it}", "tell me what is {side} {it}"),
    ),
    "position": Wordings(
        (
            "is {it} {side} {other}",
            "is it true that {it} is {side} {other}",
            "is {it} found {side} {other}",
            "can you see {it} {side} {other}",
            "do you find {it} {side} {other}",
            "tell me if {it} is {side} {other}",
            "can {it} be seen {side} {other}",
        ),
        ("can {it} be found {side} {other}", "do you see {it} {side} {other}"),
    ),
    "bigger": Wordings(
        (
            "is {it} bigger than {other}",
            "is {it} larger than {other}",
            "is it true that {it} is larger than {other}",
            "tell me if {it} is bigger than {other}",
            "does {it} have a larger size than {other}",
            "is the size of {it} bigger than that of {other}",
        ),
        ("is it true that {it} is bigger than {other}", "does {it} have a bigger size than {other}"),
    ),
    "same": Wordings(
        (
            "do {it} and {other} have the same {attribute}",
            "is the {attribute} of {it} the same as that of {other}",
            "do {it} and {other} share a {attribute}",
            "has {it} the same {attribute} as {other}",
            "are {it} and {other} equal in {attribute}",
            "is it true that {it} has the same {attribute} as {other}",
            "tell me if {it} and {other} have the same {attribute}",
        ),
        ("does {it} have the same {attribute} as {other}", "do {it} and {other} share the same {attribute}"),
    ),
    "both": Wordings(
        (
            "what {attribute} do {it} and {other} have",
            "what are the {attribute}s of {it} and {other}",
            "which {attribute} has {it} and which has {other}",
            "what is the {attribute} of {it} and of {other}",
            "name the {attribute} of {it} and that of {other}",
            "tell me the {attribute} of {it} and of {other}",
            "what {attribute} is {it} and what {attribute} is {other}",
            "do {it} and {other} have the same {attribute}, and which",
            "is the {attribute} of {it} the same as that of {other}, and which",
            "has {it} the same {attribute} as {other}, and which",
            "do {it} and {other} share a {attribute}, and which",
            "are {it} and {other} equal in {attribute}, and in which",
        ),
        ("name the {attribute}s of {it} and {other}", "tell me what {attribute} {it} and {other} have"),
    ),
    "background": Wordings(
        (
            "what kind of background is it",
            "what kind of background is there",
            "what is the background like",
            "is the background plain, gradient, noisy or checkered",
            "which kind of background is it",
            "what kind of background does the picture have",
            "name the kind of background",
            "describe the background",
            "tell me what kind of background there is",
        ),
        ("which kind of background does the picture have", "tell me the kind of background"),
    ),
    "dark": Wordings(
        (
            "is the background dark or light",
            "is the background light or dark",
            "is it a dark or a light background",
            "is the background of the picture dark or light",
            "tell me if the background is dark or light",
            "does the picture have a background that is light or dark",
        ),
        ("does the picture have a dark or a light background",),
    ),
    "caption": Wordings(
        (
            "describe the picture",
            "what is in the picture",
            "describe what you see",
            "what does the picture show",
            "what do you see",
            "what can you see in the picture",
            "tell me what you see",
            "describe the objects",
            "name all objects in the picture",
        ),
        ("tell me what is in the picture", "describe all objects in the picture"),
    ),
}
"""The wordings of each kind. Held-out wordings are new sentences of words that training uses."""

KIND_WEIGHTS: dict[str, float] = {
    "shape": 2.0,
    "color": 1.5,
    "size": 1.0,
    "pattern": 1.2,
    "where": 1.2,
    "count": 0.6,
    "count_kind": 2.0,
    "exists": 2.0,
    "relation": 2.5,
    "position": 2.5,
    "bigger": 1.5,
    "same": 3.0,
    "both": 2.0,
    "background": 0.4,
    "dark": 0.3,
    "caption": 0.5,
}
"""How often each kind is tried. Kinds that are slow to learn get more. A scene may not allow every kind."""

YES_NO_KINDS = ("exists", "position", "bigger", "same")

_COMMANDS = ("name", "count", "describe", "tell", "give", "say")


def vary(text: str, rng: random.Random) -> str:
    """Vary spelling, punctuation and capitals, as different people would type the question."""
    if rng.random() < 0.3:
        text = text.replace("color", "colour")
    if rng.random() < 0.5:
        text = text.replace("picture", "image")
    if rng.random() < 0.65:
        text += "." if text.startswith(_COMMANDS) else "?"
    style = rng.random()
    if style < 0.04:
        return text.upper()
    return text if style < 0.48 else text[0].upper() + text[1:]
