"""The scenes as a `World`, the bundle that `omni.worlds` finds."""

from omni.worlds import World

from .dense import DensePretraining
from .evaluation import SceneSettings
from .picture_sets import TASKS, drawn_twice, picture_sets
from .recipe import Scenes

scenes = World(
    data=Scenes,
    objectives={"dense": DensePretraining},
    settings=SceneSettings,
    tasks=TASKS,
    picture_sets=picture_sets,
    drawn_twice=drawn_twice,
)
