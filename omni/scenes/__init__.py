"""The little world that the shipped weights know: pictures of coloured shapes, with questions about them and their answers.

A `Scene` is a small frozen description: up to nine objects on a 3x3 grid, each with a shape, a colour, a size and a pattern,
in front of a background. Everything else derives from it: the picture (`render`), which object covers which patch
(`object_map`), questions with certain answers (`questions`), and a description (`caption`, read back by `parse_caption`).

    from omni import scenes

    scene = scenes.sample_scene(7)
    picture = scenes.render(scene)
    for question in scenes.questions(scene, rng_seed=0, n=8):
        print(question.kind, question.text, question.answer)

Three rules make scores on these scenes mean something:

* **Deterministic.** The same seed and split give the same scene in every process. Splits draw from streams of their own, so
  no seed of one ever shows what a seed of another does.
* **Held-out compositions.** Ten of the hundred (shape, colour) pairs, `HELD_OUT_PAIRS`, occur neither in pictures nor in
  questions of the splits "train" and "test". Whatever the split "pairs" asks about an object is asked about one of these, so
  a score on it tells composition from memory.
* **No answer is likelier for being a guess.** See `omni.scenes.questions`.

The framework works without this folder: recipes and evaluations that name scenes find them by `omni.worlds`. What is
exported here needs NumPy and Pillow alone.
"""

from .captions import caption, parse_caption
from .drawing import object_map, render, render_with_map
from .questions import Question, questions
from .scene import Backdrop, Scene, SceneObject, Texture, sample_scene, stream
from .vocabulary import (
    ATTRIBUTES,
    BACKGROUNDS,
    CELL,
    COLORS,
    DIAMETERS,
    HELD_OUT_PAIRS,
    NEUTRAL,
    NEVER_SHOWN,
    NUMBERS,
    PATCH,
    PATTERNS,
    PICTURE,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
)
from .wordings import KIND_WEIGHTS, WORDINGS, YES_NO_KINDS, Wordings, WordingSet

__all__ = [
    "ATTRIBUTES",
    "BACKGROUNDS",
    "CELL",
    "COLORS",
    "DIAMETERS",
    "HELD_OUT_PAIRS",
    "KIND_WEIGHTS",
    "NEUTRAL",
    "NEVER_SHOWN",
    "NUMBERS",
    "PATCH",
    "PATTERNS",
    "PICTURE",
    "PLACES",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "WORDINGS",
    "YES_NO_KINDS",
    "Backdrop",
    "Question",
    "Scene",
    "SceneObject",
    "Texture",
    "WordingSet",
    "Wordings",
    "caption",
    "object_map",
    "parse_caption",
    "questions",
    "render",
    "render_with_map",
    "sample_scene",
    "stream",
]
