"""Held-out scenes that an encoder is asked about, and the same objects drawn again."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

from omni.evaluation.picture_sets import DrawnTwice, PictureSet, wanted
from omni.evaluation.result import EncoderSettings

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
    """Held-out scenes with their tasks; those of a single object are asked about that object."""
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
    """Objects of other held-out scenes: by shape, size and place, and by colour, pattern and size."""
    forms: dict[Any, list[SceneObject]] = {}
    paints: dict[Any, list[SceneObject]] = {}
    for seed in range(3000):
        for item in sample_scene(10_000_000 + seed, "test").objects:
            forms.setdefault((item.shape, item.size, item.place), []).append(item)
            paints.setdefault((item.color, item.pattern, item.size), []).append(item)
    return forms, paints


def draw_again(scene: Scene) -> Scene:
    """The same objects at the same places, and so the same caption, but nothing else the same.

    Backdrop, noise and edges are those of another scene; each object takes proportions, angle, diameter and position in
    its cell from one object of another scene, and its shades, stripes and outline from a second one.
    """
    forms, paints = _palette()
    random = Random(scene.seed)
    other = sample_scene(20_000_000 + scene.seed, scene.split)
    objects = []
    for item in scene.objects:
        form = random.choice(forms[item.shape, item.size, item.place])
        known = paints[item.color, item.pattern, item.size]
        paint = next(found for found in random.sample(known, len(known)) if _stands_out(found, other.backdrop))
        objects.append(
            replace(
                item,
                **{name: getattr(form, name) for name in ("center", "diameter", "angle", "form")},
                **{name: getattr(paint, name) for name in ("rgb", "texture", "outline")},
                smooth=other.objects[0].smooth,
            )
        )
    return replace(other, seed=scene.seed, objects=tuple(objects))


def _stands_out(item: SceneObject, backdrop: Backdrop) -> bool:
    """By an outline, or by the distance of colours from which on scenes do without one."""
    distances = (
        sum((a - b) ** 2 for a, b in zip(item.rgb, end, strict=True)) for end in (backdrop.first, backdrop.second)
    )
    return item.outline is not None or min(distances) > 70**2


def different_scenes(count: int, first: int) -> list[Scene]:
    """Held-out scenes no two of which show the same objects at the same places."""
    found: dict[str, Scene] = {}
    seed = first
    while len(found) < count:
        scene = sample_scene(seed, "test")
        found.setdefault(caption(scene), scene)
        seed += 1
    return list(found.values())


def drawn_twice(count: int, first: int) -> DrawnTwice:
    """Different scenes from number `first` on, and the same objects drawn again."""
    originals = different_scenes(count, first)
    copies = [draw_again(scene) for scene in originals]
    return DrawnTwice(
        shows=[caption(scene) for scene in originals],
        sources=[f"scene {scene.seed} drawn again" for scene in originals],
        draw=lambda place: render(originals[place]),
        draw_again=lambda place: render(copies[place]),
    )
