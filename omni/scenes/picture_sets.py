"""The picture sets of scenes for evaluating an encoder: held-out scenes, and the same objects drawn again."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

from omni.evaluation.picture_sets import DrawnTwice, PictureSet, wanted
from omni.evaluation.settings import EncoderSettings

from .captions import caption
from .drawing import render
from .scene import Backdrop, Scene, SceneObject, sample_scene

SCENE_TASKS: dict[str, Callable[[Scene], str]] = {
    "count": lambda scene: str(len(scene.objects)),
    "background": lambda scene: scene.background,
    "dark": lambda scene: "dark" if scene.dark else "light",
}
OBJECT_TASKS: dict[str, Callable[[Scene], str]] = {
    "shape": lambda scene: scene.objects[0].shape,
    "color": lambda scene: scene.objects[0].color,
    "size": lambda scene: scene.objects[0].size,
    "pattern": lambda scene: scene.objects[0].pattern,
}
TASKS = (*SCENE_TASKS, *OBJECT_TASKS)


def picture_sets(settings: EncoderSettings) -> list[PictureSet]:
    """Scenes with several objects, and scenes with a single one."""
    return [scene_pictures(settings, "scene", 6), scene_pictures(settings, "object", 1)]


def scene_pictures(settings: EncoderSettings, name: str, max_objects: int) -> PictureSet:
    """Held-out scenes with their tasks. Scenes with a single object have the tasks of an object."""
    count = settings.fit_pictures + settings.pictures
    tasks = OBJECT_TASKS if max_objects == 1 else SCENE_TASKS
    drawn = [sample_scene(settings.first + place, "test", max_objects=max_objects) for place in range(count)]
    return PictureSet(
        name=name,
        draw=lambda place: render(drawn[place]),
        labels={task: [answer(scene) for scene in drawn] for task, answer in tasks.items() if wanted(settings, task)},
        fit=range(settings.fit_pictures),
        ask=range(settings.fit_pictures, count),
    )


# --- The same objects, drawn again ------------------------------------------------------------------------------------


@cache
def _palette() -> tuple[dict[Any, list[SceneObject]], dict[Any, list[SceneObject]]]:
    """Objects of other held-out scenes: by (shape, size, place), and by (colour, pattern, size)."""
    forms: dict[Any, list[SceneObject]] = {}
    paints: dict[Any, list[SceneObject]] = {}
    for seed in range(3000):
        for thing in sample_scene(10_000_000 + seed, "test").objects:
            forms.setdefault((thing.shape, thing.size, thing.place), []).append(thing)
            paints.setdefault((thing.color, thing.pattern, thing.size), []).append(thing)
    return forms, paints


def draw_again(scene: Scene) -> Scene:
    """A scene with the same objects at the same places, and so the same caption, but with nothing else in common.

    Backdrop, noise and edges come from another scene. Each object takes its proportions, angle, diameter and position in
    its cell from an object of another scene, and its shades, stripes and outline from a third one.
    """
    forms, paints = _palette()
    random = Random(scene.seed)
    other = sample_scene(20_000_000 + scene.seed, scene.split)
    objects = []
    for thing in scene.objects:
        form = random.choice(forms[thing.shape, thing.size, thing.place])
        known = paints[thing.color, thing.pattern, thing.size]
        paint = next(found for found in random.sample(known, len(known)) if _stands_out(found, other.backdrop))
        objects.append(
            replace(
                thing,
                **{name: getattr(form, name) for name in ("center", "diameter", "angle", "form")},
                **{name: getattr(paint, name) for name in ("rgb", "texture", "outline")},
                smooth=other.objects[0].smooth,
            )
        )
    return replace(other, seed=scene.seed, objects=tuple(objects))


def _stands_out(thing: SceneObject, backdrop: Backdrop) -> bool:
    """Whether an object is visible: it has an outline, or a colour far enough from the backdrop to need none."""
    distances = (
        sum((a - b) ** 2 for a, b in zip(thing.rgb, end, strict=True)) for end in (backdrop.first, backdrop.second)
    )
    return thing.outline is not None or min(distances) > 70**2


def different_scenes(count: int, first: int) -> list[Scene]:
    """Held-out scenes. No two show the same objects at the same places."""
    found: dict[str, Scene] = {}
    seed = first
    while len(found) < count:
        scene = sample_scene(seed, "test")
        found.setdefault(caption(scene), scene)
        seed += 1
    return list(found.values())


def drawn_twice(count: int, first: int) -> DrawnTwice:
    """Different scenes from number `first` on, each with a second drawing of its objects."""
    originals = different_scenes(count, first)
    copies = [draw_again(scene) for scene in originals]
    return DrawnTwice(
        shows=[caption(scene) for scene in originals],
        sources=[f"scene {scene.seed} drawn again" for scene in originals],
        draw=lambda place: render(originals[place]),
        draw_again=lambda place: render(copies[place]),
    )
