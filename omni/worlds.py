"""Worlds: code that draws pictures and knows what they show.

A recipe that names no data trains on a world, and an evaluation that names no data asks about one. The framework imports no
world. It knows the name and the place of each, and loads it on demand. It works without any.

    world = find_world()                                            # the scenes of `omni.scenes`
    examples = world.data(split="train", count=100).conversations()
    questions = world.settings(pictures=5).questionnaire()

A world is one frozen bundle, as a modality is (`omni.registry`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

DRAWN = "scenes"
"""The world of recipes and evaluations that name no data."""


class WorldError(ValueError):
    """The world is not declared, or not installed."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything that training and evaluation need to know about a world.

    Attributes:
        data: the section of a recipe that trains on it, a subclass of `omni.training.sections.Drawn`.
        objectives: the objectives that need this world, by name. Each is called with the recipe.
        settings: the settings of an evaluation on it, a subclass of `omni.evaluation.settings.Asking`.
        tasks: names of the tasks for an encoder.
        picture_sets: takes `EncoderSettings`, returns the sets of pictures with the labels of these tasks.
        lesson: for `omni teach`, the sections `train` and `evaluate` of a recipe, the `settings` of the evaluation, and the
            `stages`: pairs of a share of the steps and changes to the section `train`.
        drawn_twice: takes a number of pictures and the index of the first, returns an
            `omni.evaluation.picture_sets.DrawnTwice`.
    """

    data: type[Any]
    objectives: Mapping[str, Callable[[Any], Any]]
    settings: type[Any]
    tasks: tuple[str, ...]
    picture_sets: Callable[[Any], Any]
    drawn_twice: Callable[[int, int], Any]
    lesson: Mapping[str, Any]


_declared: dict[str, str] = {}


def declare_world(name: str, value: str) -> None:
    """Declare where the `World` of this name is, as "package.module:attribute". Nothing is loaded."""
    _declared[name] = value


def worlds() -> tuple[str, ...]:
    """The names of all declared worlds, installed or not. Nothing is loaded."""
    return tuple(_declared)


def find_world(name: str = DRAWN) -> World:
    """Load the world of this name.

    Raises:
        WorldError: no world of this name is declared, or its package is not installed.
    """
    if name not in _declared:
        raise WorldError(f"Unknown world {name!r}; known: {', '.join(_declared)}.")
    module, _, attribute = _declared[name].partition(":")
    try:
        loaded = import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the world is installed, but a package that it needs is not
        raise WorldError(
            f"The pictures of {name} come from {error.name}, which is not installed; install it, or name data of your own."
        ) from error
    world: World = getattr(loaded, attribute)
    return world
