"""The scenes as a `World`, the bundle that `omni.worlds` finds."""

from omni.worlds import World

from .dense import DensePretraining
from .evaluation import SceneSettings
from .picture_sets import TASKS, drawn_twice, picture_sets
from .recipe import Scenes

_KINDS = {"shape": 1.5, "color": 1.5, "where": 1.5, "count": 1.0, "exists": 1.5, "background": 0.5, "caption": 0.5}

scenes = World(
    data=Scenes,
    objectives={"dense": DensePretraining},
    settings=SceneSettings,
    tasks=TASKS,
    picture_sets=picture_sets,
    drawn_twice=drawn_twice,
    lesson={
        "train": {"count": 2_000_000, "first": 60_000_000, "questions": 12, "kinds": _KINDS},
        "evaluate": {"split": "test", "count": 48, "first": 1_000_000, "questions": 6, "kinds": _KINDS},
        "settings": {"pictures": 50, "kinds": [*_KINDS]},
    },
)
