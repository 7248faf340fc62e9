"""Questions are asked as a user asks them, with the real pictures or with others in their place."""

import gc
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omni import scenes
from omni.data.conversations import ask
from omni.evaluation import EvaluationError, asking, evaluate
from omni.evaluation.asking import Example, Query, ask_all, shown
from omni.evaluation.manifest import ManifestQuestions
from omni.evaluation.scores import SIGHTS, Evaluation, Sight, uses_the_items
from omni.scenes.evaluation import SceneQuestions, SceneSettings
from omni.session import answer

KINDS = ("shape", "color", "count", "exists")


class Recorded(SceneQuestions):
    """Two questions about each of two pictures."""

    def __init__(self, side: int = 64) -> None:
        super().__init__("test", 2, 0)
        self.side = side

    def __getitem__(self, index: int) -> Example:
        picture = Image.new("RGB", (self.side, 2 * self.side), (index, 0, 0))
        queries = tuple(Query("color", ask(question), "red") for question in ("one", "two"))
        return Example(f"picture {index}", {"image": [picture]}, queries)


def test_the_shipped_checkpoint_sees(shipped: Any) -> None:
    questions = SceneQuestions("test", 20, 500_000, kinds=KINDS)
    asked = ask_all(*shipped, questions)
    real, blank = Evaluation.of(asked), Evaluation.of(ask_all(*shipped, questions, "blank"), "blank")
    assert {one.kind for one in asked} == set(KINDS)
    assert sum(s.accuracy for s in real.scores) / len(KINDS) > 0.7
    assert blank.score("shape").accuracy < 0.4
    assert blank.score("color").accuracy < 0.4
    assert uses_the_items([real, blank])
    assert not uses_the_items([real, real.model_copy(update={"sight": "blank"})])


def test_a_batch_is_answered_as_each_question_alone(shipped: Any) -> None:
    class Repeated(SceneQuestions):
        def __getitem__(self, index: int) -> Example:
            example = super().__getitem__(index)
            (picture,), times = example.items["image"], 1 + index % 2
            query = example.queries[index]
            chat = ask(query.text, items=["image"] * times)
            return Example(example.source, {"image": [picture] * times}, (Query(query.kind, chat, query.expected),))

    questions = Repeated("test", 6, 0)
    together = ask_all(*shipped, questions, batch_size=6)
    assert [asked.answer for asked in together] == [
        answer(*shipped, example.items["image"], example.queries[0].text).answer
        for example in map(questions.__getitem__, range(6))
    ]


def test_batches_lose_and_repeat_nothing(shipped: Any) -> None:
    done: list[int] = []
    by_size = [ask_all(*shipped, Recorded(), batch_size=size, progress=done.append) for size in (1, 3, 64)]
    assert [(a.example, a.source, a.question) for a in by_size[0]] == [
        (example, f"picture {example}", question) for example in (0, 1) for question in ("one", "two")
    ]
    assert by_size[0] == by_size[1] == by_size[2]
    assert done == [0, 1, 1, 2, 1, 2, 2]  # of four questions those of each batch, in examples
    assert len({a.prompt for a in by_size[0]}) == 2  # of the two questions; the pictures are no part of it


def test_long_answers_are_written_together(shipped: Any) -> None:
    """Asking for captions and colours takes no more steps than asking for the ones, and then for the others."""
    model, processor = shipped
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    hook = model.register_forward_hook(count)
    taken, answers = [], []
    for kinds in (["color"], ["caption"], ["caption", "color"]):
        questions, before = SceneQuestions("test", 3, 0, kinds=kinds), steps
        answers.append(ask_all(model, processor, questions, batch_size=3, max_new_tokens=20))
        taken.append(steps - before)
    hook.remove()
    assert taken[2] == taken[0] + taken[1]
    assert answers[2] == ask_all(model, processor, questions, batch_size=1, max_new_tokens=20)


def test_pictures_that_wait_for_their_batch_are_few(shipped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "WINDOW_BYTES", asking.WINDOW_BYTES // 100)  # and the pictures are as much smaller
    kept: list[weakref.ref[Image.Image]] = []
    most = 0

    class Large(Recorded):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> Example:
            nonlocal most
            example = super().__getitem__(index)
            kept.append(weakref.ref(example.items["image"][0]))
            gc.collect()
            most = max(most, sum(picture() is not None for picture in kept))
            return Example(example.source, example.items, example.queries[:1])

    asked = ask_all(*shipped, Large(side=200), batch_size=2, max_new_tokens=1)
    assert [a.example for a in asked] == list(range(16))
    enough = -(-asking.WINDOW_BYTES // 240_000)
    assert enough <= most <= enough + 1


def test_what_is_shown_in_the_place_of_a_picture() -> None:
    questions = SceneQuestions("test", 2, 5)
    real, blank, swapped, noise = (
        [np.asarray(shown(questions, index, questions[index], sight)["image"][0]) for index in (0, 1)]
        for sight in SIGHTS
    )
    assert all(
        np.array_equal(found, scenes.render(scenes.sample_scene(seed, "test")))
        for found, seed in zip(real, (5, 6), strict=True)
    )
    assert all((picture == 128).all() for picture in blank)
    assert all(abs(picture.mean() - 127.5) < 2 and picture.std() > 70 for picture in noise)
    assert not np.array_equal(*noise)
    assert not any(np.array_equal(one, other) for one in swapped for other in real)


@pytest.mark.parametrize("sight", SIGHTS)
def test_what_is_shown_is_as_large_as_the_picture(sight: Sight) -> None:
    questions = Recorded()
    if sight != "swapped":
        found = shown(questions, 0, questions[0], sight)["image"]
        assert [picture.size for picture in found] == [(64, 128)]


def test_an_answer_that_does_not_end_says_so(shipped: Any) -> None:
    captions = SceneQuestions("test", 3, 0, kinds=["caption"])
    assert [asked.complete for asked in ask_all(*shipped, captions, max_new_tokens=1)] == [False] * 3
    assert [asked.complete for asked in ask_all(*shipped, captions)] == [True] * 3


def test_a_prompt_without_room_for_an_answer_is_named(shipped: Any) -> None:
    class Crowded(Recorded):
        def __getitem__(self, index: int) -> Example:
            example = super().__getitem__(index)
            crowd = {"image": [*example.items["image"]] * 50}
            return Example(example.source, crowd, (Query("color", ask("one", items=["image"] * 50), "red"),))

    with pytest.raises(EvaluationError, match=r"picture 0 to picture 1: a prompt of \d+ tokens leaves no room"):
        ask_all(*shipped, Crowded())


def test_a_role_that_the_template_does_not_know_is_named(shipped: Any) -> None:
    class Strange(Recorded):
        def __getitem__(self, index: int) -> Example:
            example = super().__getitem__(index)
            chat = [{"role": "system", "content": "be kind"}, *example.queries[0].conversation]
            return Example(example.source, example.items, (Query("color", chat, "red"),))

    with pytest.raises(EvaluationError, match="picture 0 to picture 1: Roles are user and assistant, found system"):
        ask_all(*shipped, Strange())


def test_a_model_that_ignores_its_pictures_fails_the_sight_test(shipped: Any, copy: Path) -> None:
    """The shipped one, its projector's last layer emptied: any picture becomes the same tokens."""
    from omni.loading.checkpoint import load

    model, processor = load(copy)
    for path in copy.glob("familiarity*"):  # of the weights before
        path.unlink()
    with torch.no_grad():
        for parameter in list(model.model.image_projector.parameters())[-2:]:
            parameter.zero_()
    model.save_pretrained(copy)
    sight = evaluate(copy, SceneSettings(pictures=10, kinds=("shape", "color", "dark"), sight=True)).result.sight
    assert sight is not None
    assert not sight.passed
    assert len({found.accuracy for found in sight.overall.values()}) == 1


def test_every_turn_is_asked_with_the_true_turns_before_it(shipped: Any, make_manifest: Callable[..., Path]) -> None:
    turns = [("<image>what color is the object", " blue \n"), ("<image>and this one", "red"), ("how many", "two")]
    messages = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    path = make_manifest([{"images": ["0.png", "1.png"], "messages": messages, "kind": "chat"}], pictures=2)
    example = ManifestQuestions(path)[0]
    assert [query.text for query in example.queries] == ["what color is the object", "and this one", "how many"]
    assert [query.expected for query in example.queries] == ["blue", "red", "two"]  # without spaces around
    assert [len(query.conversation) for query in example.queries] == [1, 3, 5]
    prompts = [
        shipped[1].apply_chat_template(query.show(example.items), add_generation_prompt=True)
        for query in example.queries
    ]
    assert [text.count("<image>") for text in prompts] == [1, 2, 2]
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(prompts))
    asked = ask_all(*shipped, ManifestQuestions(path))
    assert [(a.kind, a.expected) for a in asked] == [("chat", "blue"), ("chat", "red"), ("chat", "two")]
