"""The loss does not deny what training never shows: which words, which tokens, and what it does to gradients."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from omni import scenes
from omni.data.collate import IGNORED
from omni.data.conversations import Example, ask
from omni.scenes.conversations import SceneConversations
from omni.training.tokenizer import train_tokenizer
from omni.training.unseen import UnseenTokens, loss_without_unseen

KINDS = dict.fromkeys(scenes.WORDINGS, 1.0)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = [q.answer for seed in range(300) for q in scenes.questions(scenes.sample_scene(seed), seed)]
    return train_tokenizer(texts, 600, {"image": "<image>"})


def asked(split: str, count: int = 300) -> list[tuple[scenes.Scene, scenes.Question]]:
    drawn = (scenes.sample_scene(seed, split) for seed in range(count))
    return [(scene, q) for scene in drawn for q in scenes.questions(scene, 0, 12, weights=KINDS)]


def test_a_word_is_left_out_where_the_answer_would_name_a_held_out_pair() -> None:
    kinds = set()
    for scene, question in asked("train"):
        words = question.answer.replace(",", "").split()
        if not any(question.unseen):
            assert question.kind not in ("shape", "color", "relation", "caption")
            continue
        kinds.add(question.kind)
        assert len(question.unseen) == len(words)
        shapes = {item.shape for item in scene.objects}
        colors = {item.color for item in scene.objects}
        for place, (word, other) in enumerate(zip(words, question.unseen, strict=True)):
            if not other:
                assert word not in (*scenes.SHAPES, *scenes.COLORS) or question.kind == "both"
                continue
            # an object of this picture has the other half of the pair
            single = {plural: shape for shape in scenes.SHAPES for plural in (shape, shape + "s", shape + "es")}
            other = single.get(other, other)
            assert scenes.NEVER_SHOWN[other] in (colors if other in scenes.SHAPES else shapes)
            if question.kind in ("relation", "caption"):
                neighbour = words[place + 1] if other in scenes.COLORS else words[place - 1]
                assert scenes.NEVER_SHOWN[other] == neighbour
    assert kinds == {"shape", "color", "relation", "caption", "both"}


@pytest.mark.parametrize("kind", ["shape", "color"])
def test_the_word_depends_on_the_object_that_is_asked_about(kind: str) -> None:
    found = 0
    for scene, question in asked("train"):
        if question.kind == kind and len(scene.objects) == 1:
            (item,) = scene.objects
            assert question.unseen == (scenes.NEVER_SHOWN[item.color if kind == "shape" else item.shape],)
            found += 1
    assert found > 5


def test_nothing_is_left_out_of_an_evaluation() -> None:
    for split in ("test", "pairs"):
        assert not any(question.unseen for _, question in asked(split, 50))
        assert not any(any(u) for i in range(20) for u in SceneConversations(split, 20)[i].unseen)


def test_the_tokens_stand_at_the_words_that_they_could_replace(tokenizer: Any) -> None:
    examples, rows = [], []
    for start in range(0, 60, 3):
        questions = [q for _, q in asked("train", 40)[start : start + 3]]
        examples.append(
            Example({}, [ask(q.text, q.answer, []) for q in questions], unseen=[q.unseen for q in questions])
        )
        row: list[int] = []
        for question in questions:
            row += [IGNORED, IGNORED, *tokenizer(question.answer + "<|end|>").input_ids]
        rows.append(row)
    length = max(map(len, rows))
    labels = torch.tensor([row + [IGNORED] * (length - len(row)) for row in rows])
    found = UnseenTokens(tokenizer)(labels, examples)
    assert found.shape == labels.shape
    expected = 0
    for row, example, spoken in zip(found.tolist(), examples, labels.tolist(), strict=True):
        pairs = [
            (word.strip(",") if number == 0 else " " + word.strip(","), other if number == 0 else " " + other)
            for conversation, unseen in zip(example.conversations, example.unseen, strict=True)
            if any(unseen)
            for number, (word, other) in enumerate(
                zip(conversation[-1]["content"][0]["text"].split(), unseen, strict=True)
            )
            if other
        ]
        read = [(spoken[i], token) for i, token in enumerate(row) if token != IGNORED]
        first = [tuple(tokenizer(text).input_ids[0] for text in pair) for pair in pairs]
        assert read == first
        expected += len(read)
    assert expected > 30


def test_a_tokenizer_that_joins_words_is_said_and_adjusts_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Joined:
        def __call__(self, text: str, add_special_tokens: bool) -> Any:
            return type("Encoded", (), {"input_ids": [len(text)]})

    labels = torch.tensor([[IGNORED, 11, 0]])
    example = Example({}, [ask("what", "cyan circle", [])], unseen=[("purple", "hexagon")])
    transformers_logger = pytest.importorskip("transformers").utils.logging.get_logger("omni.training.unseen")
    transformers_logger.addHandler(caplog.handler)
    try:
        assert (UnseenTokens(Joined())(labels, [example]) == IGNORED).all()
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert "does not split 'cyan circle'" in caplog.text


def test_the_loss_is_that_of_a_softmax_without_them() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    unseen = torch.tensor([8, IGNORED, 0, IGNORED, 7, 6])
    loss = loss_without_unseen(logits, labels, 9, unseen=unseen, shift_labels=labels)
    rows = []
    for row, label, other in zip(logits, labels.tolist(), unseen.tolist(), strict=True):
        kept = [i for i in range(9) if i != other]
        rows.append(F.cross_entropy(row[kept][None], torch.tensor([kept.index(label)])))
    torch.testing.assert_close(loss, torch.stack(rows).mean())
    loss.backward()
    for place, other in itertools.product(range(6), range(9)):
        assert (logits.grad[place, other] == 0) == (unseen[place] == other)
    plain = loss_without_unseen(logits, labels, 9, shift_labels=labels)
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels))
