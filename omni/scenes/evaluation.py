"""The questions of an evaluation on held-out scenes: one of every possible kind about each scene."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field

from omni.data.conversations import ask
from omni.evaluation.asking import Example, Query
from omni.evaluation.scores import EvaluationError, Parts
from omni.evaluation.settings import Asking

from .captions import parse_caption
from .drawing import render
from .questions import Question, questions
from .scene import Scene, sample_scene
from .wordings import WORDINGS, WordingSet


def right_objects(expected: str, answer: str) -> list[bool]:
    """For each object of the expected caption, whether the answer has it: size, pattern, colour, shape and place."""
    wanted, found = (
        Counter(tuple(sorted(named.items())) for named in parse_caption(text)) for text in (expected, answer)
    )
    hits = (wanted & found).total()
    return [True] * hits + [False] * (wanted.total() - hits)


OBJECTS_OF_CAPTIONS = Parts(of="caption", kind="caption_objects", right=right_objects)


class SceneQuestions:
    """The scenes from number `first` on, each with one question of every kind that it allows.

    Args:
        split: "test" (not in training), or "pairs" (held-out pairs of shape and colour).
        pictures: number of scenes.
        first: seed of the first scene.
        wordings: the wordings of training, or held-out ones.
        kinds: the kinds of questions. By default all.

    Raises:
        EvaluationError: a kind of question is unknown, or no scene allows any of the kinds.
    """

    parts = OBJECTS_OF_CAPTIONS
    modalities = ("image",)

    def __init__(
        self, split: str, pictures: int, first: int, wordings: WordingSet = "seen", kinds: Sequence[str] | None = None
    ) -> None:
        self.split, self.pictures, self.first, self.wordings = split, pictures, first, wordings
        if unknown := sorted(set(kinds or ()) - set(WORDINGS)):
            raise EvaluationError(f"Unknown kinds of questions {unknown}; known: {', '.join(WORDINGS)}.")
        self.weights = dict.fromkeys(kinds or WORDINGS, 1.0)
        if not any(self._questions(self._scene(index)) for index in range(pictures)):
            raise EvaluationError(
                f"None of the {pictures} scenes allows a question of the kinds {', '.join(self.weights)}; ask about more."
            )

    def __len__(self) -> int:
        return self.pictures

    def __getitem__(self, index: int) -> Example:
        scene = self._scene(index)
        return Example(
            source=f"scene {scene.seed} of {scene.split}",
            items={"image": [render(scene)]},
            queries=tuple(Query(q.kind, ask(q.text), q.answer) for q in self._questions(scene)),
        )

    def swapped(self, index: int, modality: str) -> Sequence[Any]:
        """The picture of a scene a million numbers further, so that no question is about it."""
        return [render(sample_scene(self.first + index + 1_000_003, self.split))]

    def why_not_swapped(self, modality: str) -> str | None:
        """None, because there are always other scenes."""
        return None

    def data_hash(self, progress: Callable[[int], None] = lambda done: None) -> str:
        """sha256 of the pixels of every picture, and of the kinds and answers of its questions."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            example = self[index]
            digest.update(example.items["image"][0].tobytes())
            digest.update(json.dumps([[query.kind, query.expected] for query in example.queries]).encode())
            progress(index + 1)
        return digest.hexdigest()

    def _scene(self, index: int) -> Scene:
        return sample_scene(self.first + index, self.split)

    def _questions(self, scene: Scene) -> list[Question]:
        return questions(scene, scene.seed, wordings=self.wordings, weights=self.weights)


class SceneSettings(Asking):
    """A fused model on held-out scenes; see `SceneQuestions`."""

    about: Literal["scenes"] = "scenes"
    pictures: int = Field(default=500, ge=1)
    first: int = Field(default=0, ge=0)
    split: Literal["test", "pairs"] = "test"
    wordings: WordingSet = "seen"
    kinds: tuple[str, ...] | None = None

    def questionnaire(self) -> SceneQuestions:
        """The scenes and their questions. Raises `EvaluationError` if there is no question."""
        return SceneQuestions(self.split, self.pictures, self.first, self.wordings, self.kinds)

    @property
    def title(self) -> str:
        """The examples in a few words, for the heading of a table."""
        return f"{self.pictures} pictures of {self.split}, {self.wordings} wordings"
