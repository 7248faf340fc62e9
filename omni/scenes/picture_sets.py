"""Labelled pictures that an encoder is asked about: held-out scenes, the same objects drawn again, scanned digits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from omni import scenes
from omni.evaluation.result import EncoderSettings

SCENE_TASKS: dict[str, Callable[[scenes.Scene], str]] = {
    "count": lambda scene: str(len(scene.objects)),
    "background": lambda scene: scene.background,
    "dark": lambda scene: "dark" if scene.dark else "light",
}
OBJECT_TASKS: dict[str, Callable[[scenes.Scene], str]] = {
    "shape": lambda scene: scene.objects[0].shape,
    "color": lambda scene: scene.objects[0].color,
    "size": lambda scene: scene.objects[0].size,
    "pattern": lambda scene: scene.objects[0].pattern,
}
KINDS = (*SCENE_TASKS, *OBJECT_TASKS, "same objects", "digit")
SEED = 0


@dataclass(frozen=True)
class PictureSet:
    """A set of labelled pictures, drawn when asked for: some to fit on, then those that are asked about.

    Attributes:
        name: of the set, for messages.
        draw: makes the picture at a place.
        labels: for each task, the answer of every picture.
        fit: places to learn from.
        ask: places to ask about.
        pixels: float[N, P], of pictures that came as numbers.
    """

    name: str
    draw: Callable[[int], Image.Image]
    labels: Mapping[str, Sequence[str]]
    fit: Sequence[int]
    ask: Sequence[int]
    pixels: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.fit) + len(self.ask)


def scene_pictures(settings: EncoderSettings, name: str, max_objects: int) -> PictureSet:
    """Held-out scenes with their tasks; those of a single object are asked about that object."""
    count = settings.fit_pictures + settings.pictures
    tasks = OBJECT_TASKS if max_objects == 1 else SCENE_TASKS
    drawn = [scenes.sample_scene(settings.first + place, "test", max_objects=max_objects) for place in range(count)]
    return PictureSet(
        name=name,
        draw=lambda place: scenes.render(drawn[place]),
        labels={task: [answer(scene) for scene in drawn] for task, answer in tasks.items() if wanted(settings, task)},
        fit=range(settings.fit_pictures),
        ask=range(settings.fit_pictures, count),
    )


def wanted(settings: EncoderSettings, kind: str) -> bool:
    """Whether this kind of question is to be asked."""
    return settings.kinds is None or kind in settings.kinds


def digit_pictures(side: int) -> PictureSet:
    """The 1,797 scanned digits of scikit-learn, enlarged; a stratified fifth of them is asked about."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    scans = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), of 17 greys
    labels = [str(label) for label in digits.target]
    fit, ask = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=SEED)

    def draw(place: int) -> Image.Image:
        return Image.fromarray(scans[place]).resize((side, side), Image.Resampling.BICUBIC).convert("RGB")

    pixels = digits.images.reshape(len(scans), -1)
    return PictureSet("digit", draw, {"digit": labels}, sorted(fit.tolist()), sorted(ask.tolist()), pixels)


# --- The same objects, drawn again ------------------------------------------------------------------------------------


@cache
def _palette() -> tuple[dict[Any, list[scenes.SceneObject]], dict[Any, list[scenes.SceneObject]]]:
    """Objects of other held-out scenes: by shape, size and place, and by colour, pattern and size."""
    forms: dict[Any, list[scenes.SceneObject]] = {}
    paints: dict[Any, list[scenes.SceneObject]] = {}
    for seed in range(3000):
        for item in scenes.sample_scene(10_000_000 + seed, "test").objects:
            forms.setdefault((item.shape, item.size, item.place), []).append(item)
            paints.setdefault((item.color, item.pattern, item.size), []).append(item)
    return forms, paints


def draw_again(scene: scenes.Scene) -> scenes.Scene:
    """The same objects at the same places, and so the same caption, but nothing else the same.

    Backdrop, noise and edges are those of another scene; each object takes proportions, angle, diameter and position in
    its cell from one object of another scene, and its shades, stripes and outline from a second one.
    """
    forms, paints = _palette()
    random = Random(scene.seed)
    other = scenes.sample_scene(20_000_000 + scene.seed, scene.split)
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


def _stands_out(item: scenes.SceneObject, backdrop: scenes.Backdrop) -> bool:
    """By an outline, or by the distance of colours from which on scenes do without one."""
    distances = (
        sum((a - b) ** 2 for a, b in zip(item.rgb, end, strict=True)) for end in (backdrop.first, backdrop.second)
    )
    return item.outline is not None or min(distances) > 70**2


def different_scenes(count: int, first: int) -> list[scenes.Scene]:
    """Held-out scenes no two of which show the same objects at the same places."""
    found: dict[str, scenes.Scene] = {}
    seed = first
    while len(found) < count:
        scene = scenes.sample_scene(seed, "test")
        found.setdefault(scenes.caption(scene), scene)
        seed += 1
    return list(found.values())
