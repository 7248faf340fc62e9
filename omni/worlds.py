"""Worlds: pictures that are drawn when asked for, by code that knows all there is to see on them.

A recipe without data of its own learns from a world, and an evaluation without data of its own asks about one. The framework
imports no world: it knows the name of each and where it is, and loads it when it is asked for. It works without any.

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
    """A world that nobody declared, or that is not installed."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything that training and evaluation have to know of a world.

    Attributes:
        data: how a recipe asks for its pictures, an `omni.training.recipe.Drawn`.
        objectives: by name, what can be learnt from its pictures alone; each is called with the recipe.
        settings: how an evaluation asks about its pictures, an `omni.evaluation.result.Asking`.
        tasks: what an encoder is asked about its pictures.
        picture_sets: from `EncoderSettings`, the sets of pictures with the answers to these tasks.
        drawn_twice: from a number of pictures and the number of the first one, an `omni.evaluation.picture_sets.DrawnTwice`.
    """

    data: type[Any]
    objectives: Mapping[str, Callable[[Any], Any]]
    settings: type[Any]
    tasks: tuple[str, ...]
    picture_sets: Callable[[Any], Any]
    drawn_twice: Callable[[int, int], Any]


_declared: dict[str, str] = {}


def declare_world(name: str, value: str) -> None:
    """Say where the `World` of this name is, as "package.module:attribute"; it is loaded when asked for."""
    _declared[name] = value


def worlds() -> tuple[str, ...]:
    """The names of all worlds that were declared, also of those that are not installed; nothing is loaded."""
    return tuple(_declared)


def find_world(name: str = DRAWN) -> World:
    """The world of this name.

    Raises:
        WorldError: no world of this name was declared, or its package is not there.
    """
    if name not in _declared:
        raise WorldError(f"Unknown world {name!r}; known: {', '.join(_declared)}.")
    module, _, attribute = _declared[name].partition(":")
    try:
        loaded = import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the world is there, and lacks something
        raise WorldError(
            f"The pictures of {name} come from {error.name}, which is not installed; install it, or name data of your own."
        ) from error
    world: World = getattr(loaded, attribute)
    return world
