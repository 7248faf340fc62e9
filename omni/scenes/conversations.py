"""Scenes as training data: conversations about them, or pictures with captions."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from omni.data.conversations import Example, ask

from .captions import caption
from .drawing import render
from .questions import questions
from .scene import Scene, sample_scene
from .wordings import KIND_WEIGHTS


class SceneConversations:
    """The scenes `first` to `first + count - 1` of a split, each with questions. They are drawn on access, always the same.

    Args:
        split, count, first: which scenes.
        questions: number of questions about each scene, at most.
        kinds: how often each kind of question is tried.
        options: options of `sample_scene`.
    """

    def __init__(
        self,
        split: str,
        count: int,
        first: int = 0,
        questions: int = 8,
        kinds: Mapping[str, float] = KIND_WEIGHTS,
        **options: Any,
    ) -> None:
        self.split, self.count, self.first = split, count, first
        self.questions, self.kinds, self.options = questions, dict(kinds), options

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        seed = self.first + index
        scene = sample_scene(seed, self.split, **self.options)
        asked = questions(scene, seed, self.questions, weights=self.kinds)
        items = {"image": [render(scene)]}
        chats, unseen = [ask(q.text, q.answer) for q in asked], [q.unseen for q in asked]
        return Example(items, chats, unseen=unseen, words={"image": [caption(scene)]})


class SceneCaptions:
    """The same scenes, each with its caption. See `SceneConversations` for the arguments."""

    def __init__(self, split: str, count: int, first: int = 0, **options: Any) -> None:
        self.split, self.count, self.first, self.options = split, count, first, options

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return render(self._scene(index)), self.caption(index)

    def caption(self, index: int) -> str:
        """The caption of a scene, without drawing it."""
        return caption(self._scene(index))

    def _scene(self, index: int) -> Scene:
        return sample_scene(self.first + index, self.split, **self.options)
