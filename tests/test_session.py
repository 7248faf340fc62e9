"""A session answers every question as if it were the first, for any Thinker, and reads each picture once."""

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig
from transformers.cache_utils import DynamicCache, StaticCache

from omni import scenes
from omni.fusion import processing_omni
from omni.fusion.prefix import can_be_cut
from omni.loading.checkpoint import load
from omni.questions import QuestionError
from omni.session import Session, answer

SHIPPED = Path(__file__).resolve().parents[1] / "checkpoints" / "omni_tiny"
TAG = "blue <image>?" if processing_omni.UNMARKED else "blue?"  # older transformers cannot read it as text
QUESTIONS = ["what shape is it", "how many", "a red circle a blue square", "what", "what shape is it", TAG]


def pictures(count: int) -> list[Image.Image]:
    return [scenes.render(scenes.sample_scene(seed, "test")).resize((40, 30)) for seed in range(count)]


class Counted:
    """How often a tower runs, and on how many pictures."""

    def __init__(self, model: Any) -> None:
        self.batches: list[int] = []
        tower = model.model.image_tower
        tower.register_forward_pre_hook(
            lambda module, args, kwargs: self.batches.append(len(kwargs["pixel_values"])), with_kwargs=True
        )


# sliding windows (mistral, gemma2, gemma3) keep what cannot be taken back; the pictures are encoded once all the same
@pytest.mark.parametrize("thinker", ["qwen3", "llama", "gpt2", "opt", "mistral", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_every_answer_is_that_of_a_first_question(make_pair: Callable[..., Any], thinker: str, count: int) -> None:
    text = {"sliding_window": 8} if thinker in ("mistral", "gemma2", "gemma3_text") else {}
    model, processor = make_pair(thinker, text=text)
    shown = pictures(count)
    expected = [answer(model, processor, shown, question, 6) for question in QUESTIONS]
    assert len({each.answer for each in expected}) > 1
    counted = Counted(model)
    session = Session(model, processor, shown)
    for question, first in zip(QUESTIONS, expected, strict=True):
        again = session.ask(question, 6)
        assert (again.answer, again.tokens_read, again.complete) == (first.answer, first.tokens_read, first.complete)
    assert counted.batches == ([count] if count else [])


def test_what_was_read_is_not_read_again(make_pair: Callable[..., Any]) -> None:
    model, processor = make_pair("qwen3")
    lengths: list[int] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    session = Session(model, processor, pictures(2))
    first = session.ask("what shape is it", 1)
    session.ask("how many", 1)
    assert lengths[0] == first.tokens_read
    assert lengths[1] < first.tokens_read - 10  # the ten tokens of two pictures are not among them
    session.ask("how many", 1)
    assert lengths[2] == 1  # the same prompt: its last token, for the logits


@pytest.mark.parametrize(
    ("kind", "settings", "kept"),
    [
        ("llama", {}, True),
        ("gemma3_text", {}, False),  # some layers slide
        ("mistral", {"sliding_window": 8}, False),
        ("qwen3_next", {}, False),  # states
        ("falcon_h1", {}, False),  # states beside full attention
    ],
)
def test_only_a_cache_that_keeps_every_token_is_cut(kind: str, settings: dict[str, Any], kept: bool) -> None:
    config = AutoConfig.for_model(kind, **settings)
    assert can_be_cut(DynamicCache(config=config)) is kept
    assert not can_be_cut(StaticCache(config=config, max_cache_len=8))


def test_an_interrupted_question_does_no_harm(make_pair: Callable[..., Any]) -> None:
    model, processor = make_pair("qwen3")
    shown = pictures(1)
    session = Session(model, processor, shown)
    session.ask("how many", 4)

    class Broken:
        def put(self, value: torch.Tensor) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.ask("what shape is it", 4, streamer=Broken())
    for question in QUESTIONS:
        assert session.ask(question, 4).answer == answer(model, processor, shown, question, 4).answer


def test_the_shipped_checkpoint_says_the_same_in_a_session() -> None:
    model, processor = load(SHIPPED)
    for seed in range(4):
        scene = scenes.sample_scene(seed, "test")
        shown = [scenes.render(scene)]
        session = Session(model, processor, shown)
        for question in scenes.questions(scene, seed, 6):
            assert session.ask(question.text).answer == answer(model, processor, shown, question.text).answer


@pytest.mark.parametrize("thinker", ["qwen3", "gpt2", "gemma2"])
def test_a_streamed_answer_grows_to_the_whole_one(make_pair: Callable[..., Any], thinker: str) -> None:
    model, processor = make_pair(thinker)
    shown = pictures(2)
    session = Session(model, processor, shown)
    for question in QUESTIONS:
        whole = answer(model, processor, shown, question, 8)
        *growing, last = session.stream(f" {question} ", 8)
        assert last.model_dump(exclude={"seconds"}) == whole.model_dump(exclude={"seconds"})
        assert list(last.seconds) == ["preparing", "encoding", "reading", "writing"]
        assert last.seconds["reading"] > 0 < last.seconds["writing"]
        assert [(part.complete, part.seconds, part.question) for part in growing] == [(False, {}, question)] * len(
            growing
        )
        assert [part.tokens_read for part in growing] == [whole.tokens_read] * len(growing)
        assert len({part.answer for part in growing}) == len(growing)


def test_the_shipped_checkpoint_streams_word_by_word() -> None:
    model, processor = load(SHIPPED)
    session = Session(model, processor, [scenes.render(scenes.sample_scene(0, "test"))])
    *growing, last = session.stream("describe the picture")
    assert len(growing) > 8
    assert all(later.answer.startswith(earlier.answer) for earlier, later in pairwise([*growing, last]))
    assert growing[-1].answer == last.answer == session.ask("describe the picture").answer


def test_a_listener_that_stops_ends_the_answer(make_pair: Callable[..., Any]) -> None:
    model, processor = make_pair("qwen3")
    model.generation_config.eos_token_id = None  # it would write for ever
    session, steps = Session(model, processor, pictures(1)), 0

    def slowly(*args: Any) -> None:
        nonlocal steps
        steps += 1
        time.sleep(0.01)

    model.lm_head.register_forward_pre_hook(slowly)
    listening = session.stream("how many", 90)
    next(listening)
    listening.close()
    assert steps < 45
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    assert session.ask("how many", 4).answer == answer(model, processor, pictures(1), "how many", 4).answer


def test_a_question_that_cannot_be_asked_raises_for_the_listener(
    make_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(*make_pair("qwen3"), pictures(1))
    with pytest.raises(QuestionError, match="empty"):
        list(session.stream(" "))
    with pytest.raises(QuestionError, match="no room"):
        list(session.stream("how many", 1000))
    monkeypatch.setattr(processing_omni, "UNMARKED", "")  # as with an older transformers
    with pytest.raises(QuestionError, match="control token '<image>'"):
        list(session.stream("how many <image>"))
