"""The sections `train` and `evaluate` of a recipe that trains on scenes."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from omni.training.sections import TALKS, Drawn

from .conversations import SceneCaptions, SceneConversations
from .questions import questions
from .scene import sample_scene
from .vocabulary import PLACES
from .wordings import KIND_WEIGHTS

MIX = {"typed": 3.0, "spoken": 4.0, "two": 0.5, "said": 3.0, "beeps": 1.0}
"""How often each kind of conversation is drawn where there are voices."""


class Scenes(Drawn):
    """Scenes that are drawn while a model trains.

    Attributes:
        split, count, first: `count` scenes of the split, from seed `first` on.
        min_objects, max_objects: number of objects in a scene.
        neutral: share of objects that are grey or brown; see `sample_scene`.
        characters: share of pictures that show a character in place of a scene; for the objective "dense".
        questions: number of questions about each scene, at most.
        kinds: how often each kind of question is tried.
        voices: a folder of `omni.scenes.corpus`, whose sounds are heard.
        group: who speaks there.
        synthesizers: how often each one speaks; by default all that are there, by the square root of their sayings.
        said: the kinds of sayings, see `omni.scenes.sayings`; by default all.
        fastest: words in a second; faster sayings are left out.
        rough: part of the sounds that go through rooms, noise and telephones.
        mix: how often each kind of conversation is drawn, see `omni.scenes.spoken`; for the objective "answers".
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
    voices: str | None = None
    group: Literal["seen", "held_out", "stranger"] = "seen"
    synthesizers: dict[str, Annotated[float, Field(gt=0)]] | None = None
    said: list[str] | None = None
    fastest: float | None = Field(default=None, gt=0)
    rough: float = Field(default=0.7, ge=0, le=1)
    mix: dict[str, Annotated[float, Field(ge=0)]] = dict(MIX)

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        if self.min_objects > self.max_objects:
            raise ValueError(f"`min_objects` is {self.min_objects}, more than `max_objects`, {self.max_objects}")
        if unknown := sorted(set(self.kinds) - set(KIND_WEIGHTS)):
            raise ValueError(f"unknown {', '.join(map(repr, unknown))} in `kinds`; known: {', '.join(KIND_WEIGHTS)}")
        if unknown := sorted(set(self.mix) - set(MIX)):
            raise ValueError(f"unknown {', '.join(map(repr, unknown))} in `mix`; known: {', '.join(MIX)}")
        if not any(self.kinds.values()):
            raise ValueError("`kinds` has no kind with a weight above 0, so no question can be drawn")
        return self

    def scene_options(self) -> dict[str, Any]:
        """The options of `sample_scene`."""
        return {"min_objects": self.min_objects, "max_objects": self.max_objects, "neutral": self.neutral}

    def check(self, objective: str) -> None:
        """Check the settings for an objective; see `Drawn`. Only "dense" trains on characters."""
        if self.characters and objective != "dense":
            raise ValueError("`characters` are for the objective 'dense'; no question or caption is about them")
        if self.voices is None and objective in ("transcription", "alignment"):
            raise ValueError(f"the objective {objective!r} needs `voices`, a folder of omni.scenes.corpus")
        if self.voices is not None and objective not in ("transcription", "alignment", *TALKS):
            raise ValueError(
                f"`voices` are for the objectives 'transcription', 'alignment', {', '.join(map(repr, TALKS))}"
            )

    def conversations(self) -> Any:
        """Scenes with questions; with `voices` also sounds."""
        typed = SceneConversations(
            self.split, self.count, self.first, self.questions, self.kinds, **self.scene_options()
        )
        if self.voices is None:
            return typed
        from .spoken import Heard

        return Heard(self.sayings(), typed, self.mix)

    def captions(self) -> SceneCaptions:
        """Scenes with captions."""
        return SceneCaptions(self.split, self.count, self.first, **self.scene_options())

    def sayings(self) -> Any:
        """Sayings in many voices."""
        from .spoken import Sayings  # which needs the plug-in for sounds

        assert self.voices is not None
        return Sayings(
            *(self.voices, self.split, self.group, self.count, self.first, self.synthesizers, self.rough),
            *(self.said, self.fastest),
        )

    def asked_by(self) -> list[str]:
        """Sounds, where questions are spoken."""
        return ["audio"] if self.voices is not None and self.mix.get("spoken") else []

    def texts(self) -> Iterator[str]:
        """One question of every kind about each of 4,000 scenes, and the answers."""
        for seed in range(4000):
            for question in questions(sample_scene(seed, "train"), seed):
                yield from (question.text, question.answer)
