"""The world that the shipped weights were trained on: pictures of coloured shapes, and questions with their answers.

A `Scene` is a small frozen description: up to nine objects on a 3x3 grid, each with a shape, a colour, a size and a pattern,
in front of a background. All else follows from it: the picture (`render`), the object on each patch (`object_map`),
questions with certain answers (`questions`), and a sentence about it (`caption`, which `parse_caption` reads back).

    from omni import scenes

    scene = scenes.sample_scene(7)
    picture = scenes.render(scene)
    for question in scenes.questions(scene, rng_seed=0, n=8):
        print(question.kind, question.text, question.answer)

Three rules give scores on these scenes a meaning:

* **Deterministic.** The same seed and split give the same scene in every process. Each split has its own random stream, so
  a scene of one split does not occur in another.
* **Held-out compositions.** Ten of the hundred (shape, colour) pairs, `HELD_OUT_PAIRS`, occur neither in pictures nor in
  questions of the splits "train" and "test". Questions about objects in the split "pairs" are about these pairs, so a score
  on it tells composition from memory.
* **Guessing does not pay.** See `omni.scenes.questions`.

The framework works without this folder. Recipes and evaluations find scenes by name (`omni.worlds`). The names exported
here need only NumPy and Pillow.
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
