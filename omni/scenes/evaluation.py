"""Questions about held-out scenes: one of every possible kind about each."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

from omni import scenes
from omni.data.conversations import ask
from omni.evaluation.asking import Item, Pictures, Query, ask_all
from omni.evaluation.scores import Asked, Evaluation, EvaluationError, Sight, score

Wordings = Literal["seen", "held_out"]


class SceneQuestions:
    """Scene `first + i` of a split, with one question of every kind that it allows.

    Args:
        split: "test" (never seen), or "pairs" (with held-out pairs of shape and colour).
        pictures: how many scenes.
        first: seed of the first one.
        wordings: those of the training questions, or held-out ones.
        kinds: the kinds of questions; all by default.

    Raises:
        EvaluationError: an unknown kind of question, or kinds that none of the scenes allows.
    """

    def __init__(
        self, split: str, pictures: int, first: int, wordings: Wordings = "seen", kinds: Sequence[str] | None = None
    ) -> None:
        self.split, self.pictures, self.first, self.wordings = split, pictures, first, wordings
        if unknown := sorted(set(kinds or ()) - set(scenes.WORDINGS)):
            raise EvaluationError(f"Unknown kinds of questions {unknown}; known: {', '.join(scenes.WORDINGS)}.")
        self.weights = dict.fromkeys(kinds or scenes.WORDINGS, 1.0)
        if not any(self._questions(self._scene(index)) for index in range(pictures)):
            raise EvaluationError(
                f"None of the {pictures} scenes allows a question of the kinds {', '.join(self.weights)}; ask about more."
            )

    def __len__(self) -> int:
        return self.pictures

    def __getitem__(self, index: int) -> Item:
        scene = self._scene(index)
        return Item(
            source=f"scene {scene.seed} of {scene.split}",
            pictures=(scenes.render(scene),),
            queries=tuple(Query(q.kind, ask(q.text), q.answer) for q in self._questions(scene)),
        )

    def swapped(self, index: int) -> Pictures:
        """A picture that is not among those asked about, unless there are a million of them."""
        return (scenes.render(scenes.sample_scene(self.first + index + 1_000_003, self.split)),)

    def why_not_swapped(self) -> str | None:
        """There are always other scenes."""
        return None

    def data_hash(self, progress: Callable[[int], None] = lambda done: None) -> str:
        """Over the pixels of every picture, and the kinds and answers of its questions."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            item = self[index]
            digest.update(item.pictures[0].tobytes())
            digest.update(json.dumps([[query.kind, query.expected] for query in item.queries]).encode())
            progress(index + 1)
        return digest.hexdigest()

    def _scene(self, index: int) -> scenes.Scene:
        return scenes.sample_scene(self.first + index, self.split)

    def _questions(self, scene: scenes.Scene) -> list[scenes.Question]:
        return scenes.questions(scene, scene.seed, wordings=self.wordings, weights=self.weights)


def evaluate_scenes(
    model: Any,
    processor: Any,
    *,
    split: Literal["test", "pairs"] = "test",
    pictures: int = 500,
    first: int = 0,
    wordings: Wordings = "seen",
    sight: Sight = "real",
    kinds: Sequence[str] | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Evaluation, list[Asked]]:
    """Ask one question of every possible kind about each of `pictures` scenes.

    Args:
        model, processor: a fused model that answers about pictures.
        split, pictures, first, wordings, kinds: see `SceneQuestions`.
        sight, batch_size, progress: see `ask_all`.

    Returns:
        The scores, and every question with its answer.
    """
    questions = SceneQuestions(split, pictures, first, wordings, kinds)
    asked = ask_all(model, processor, questions, sight, batch_size=batch_size, progress=progress)
    return Evaluation(sight=sight, scores=score(asked)), asked
