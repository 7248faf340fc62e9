"""What a recipe says of scenes under `train` and `evaluate`."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from omni.training.recipe import Drawn

from .conversations import SceneCaptions, SceneConversations
from .questions import questions
from .scene import sample_scene
from .vocabulary import PLACES
from .wordings import KIND_WEIGHTS


class Scenes(Drawn):
    """Pictures drawn while training: `count` scenes of the split, from seed `first` on.

    `neutral` objects have colours that nobody asks for; `characters` is the share of pictures that show a made-up character
    instead of a scene (objective "dense"); `questions` are drawn by the weights of their `kinds`.
    """

    split: Literal["train", "test", "pairs"] = "train"
    count: int = Field(gt=0, le=2**62)
    first: int = Field(default=0, ge=0, le=2**62)
    min_objects: int = Field(default=1, ge=1, le=len(PLACES))
    max_objects: int = Field(default=6, ge=1, le=len(PLACES))
    neutral: float = Field(default=0.0, ge=0.0, le=1.0)
    characters: float = Field(default=0.0, ge=0.0, le=1.0)
    questions: int = Field(default=8, gt=0)
    kinds: dict[str, Annotated[float, Field(ge=0)]] = dict(KIND_WEIGHTS)

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        if self.min_objects > self.max_objects:
            raise ValueError(f"`min_objects` is {self.min_objects}, more than `max_objects`, {self.max_objects}")
        if unknown := sorted(set(self.kinds) - set(KIND_WEIGHTS)):
            raise ValueError(f"unknown {', '.join(map(repr, unknown))} in `kinds`; there are {', '.join(KIND_WEIGHTS)}")
        if not any(self.kinds.values()):
            raise ValueError("`kinds` has no kind with a weight above 0, so no question can be drawn")
        return self

    def scene_options(self) -> dict[str, Any]:
        """What `sample_scene` takes."""
        return {"min_objects": self.min_objects, "max_objects": self.max_objects, "neutral": self.neutral}

    def check(self, objective: str) -> None:
        """See `Drawn`; only the objective "dense" learns characters."""
        if self.characters and objective != "dense":
            raise ValueError("`characters` are for the objective 'dense': nothing is asked or said about them")

    def conversations(self) -> SceneConversations:
        """Scenes with questions."""
        return SceneConversations(
            self.split, self.count, self.first, self.questions, self.kinds, **self.scene_options()
        )

    def captions(self) -> SceneCaptions:
        """Scenes with captions."""
        return SceneCaptions(self.split, self.count, self.first, **self.scene_options())

    def texts(self) -> Iterator[str]:
        """One question of every kind about 4,000 scenes, and the answers."""
        for seed in range(4000):
            for question in questions(sample_scene(seed, "train"), seed):
                yield from (question.text, question.answer)
