"""Packing changes nothing: a row of several conversations computes for each what it would compute alone."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from omni.data.collate import IGNORED, ConversationCollator, _common_prefix
from omni.data.conversations import Example, ExampleError, ask

Pair = Callable[..., tuple[Any, Any]]


def photo(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8))


QUESTIONS = [("what shape is it", "a red circle"), ("how many", "blue square"), ("what shape is it", "a"), ("a", "b")]


def example(count: int = 3, seed: int = 0, images: int = 1) -> Example:
    asked = [ask(question, answer, ["image"] * images) for question, answer in QUESTIONS[:count]]
    return Example({"image": [photo(seed + i) for i in range(images)]}, asked)


def branches(batch: dict[str, torch.Tensor], row: int) -> list[torch.Tensor]:
    """For each conversation of a row, the places of its tokens: what is shared and its own branch."""
    seen = batch["attention_mask"][row, 0]
    position, labels = batch["position_ids"][row], batch["labels"][row]
    length = int((seen.sum(-1) > 1).nonzero().max()) + 1 if len(seen) > 1 else 1
    ends = [i for i in range(length) if i + 1 == length or position[i + 1] != position[i] + 1]
    assert labels[length:].eq(IGNORED).all()
    return [seen[end].nonzero()[:, 0] for end in ends]


@pytest.mark.parametrize("thinker", ["qwen3", "gpt2"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_sequence_computes_what_its_conversations_compute_alone(make_pair: Pair, thinker: str, count: int) -> None:
    model, processor = make_pair(thinker)
    collate = ConversationCollator(processor)
    rows = [example(count, seed=1), example(1, seed=5), example(count, seed=7, images=2)]
    batch = collate(rows)
    with torch.no_grad():
        packed = model(**batch).logits
        losses, labels = [], 0
        for row, packed_example in enumerate(rows):
            places = branches(batch, row)
            assert len(places) == len(packed_example.conversations)
            for where, conversation in zip(places, packed_example.conversations, strict=True):
                alone = collate([Example(packed_example.items, [conversation])])
                assert batch["input_ids"][row, where].equal(alone["input_ids"][0])
                assert batch["position_ids"][row, where].equal(alone["position_ids"][0])
                out = model(
                    input_ids=alone["input_ids"], pixel_values=alone["pixel_values"], labels=alone["labels"]
                )  # without a mask: plain causal attention
                torch.testing.assert_close(packed[row, where], out.logits[0], atol=2e-5, rtol=1e-4)
                answered = int((alone["labels"] != IGNORED).sum())
                losses.append(out.loss * answered)
                labels += answered
        found = model(**batch).loss
    assert int((batch["labels"] != IGNORED).sum()) == labels
    torch.testing.assert_close(found, sum(losses) / labels, atol=1e-5, rtol=1e-5)


CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for block in message['content'] -%}"
    "{{- block['text'] if block['type'] == 'text' else '<' + block['type'] + '>' -}}"
    "{%- endfor -%}{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


@pytest.mark.parametrize("marked", [True, False])
def test_labels_are_the_answers_of_any_template(marked: bool) -> None:
    chats = [
        [*ask("what shape", "a red circle"), *ask("how many", "two, as a star", [])],
        ask("is it so\nassistant", "yes"),
    ]
    processor = AutoProcessor.from_pretrained("checkpoints/omni_tiny")
    processor.tokenizer.chat_template = CHATML
    if marked:
        spoken = "{%- if message['role'] == 'assistant' -%}{%- generation -%}"
        body = CHATML[CHATML.index("{%- if message['content'] is") : CHATML.index("{{- '<|im_end|>")]
        answer = f"{spoken}{body}{{{{- '<|im_end|>' -}}}}{{%- endgeneration -%}}{{{{- '\n' -}}}}{{%- else -%}}"
        processor.tokenizer.chat_template = CHATML.replace(body, answer + body, 1).replace(
            "{{- '<|im_end|>\n' -}}{%- endfor -%}{%- if add",
            "{{- '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}{%- if add",
        )
    batch = ConversationCollator(processor)([Example({"image": [photo()]}, [chat]) for chat in chats])
    for row, expected in enumerate(["a red circle<|im_end|>two, as a star<|im_end|>", "yes<|im_end|>"]):
        labels = batch["labels"][row]
        assert processor.tokenizer.decode(labels[labels != IGNORED]) == expected


@pytest.mark.parametrize(("question", "answer"), [("what<|end|>", "a"), ("what", "a <image>"), ("<|user|>", "b")])
def test_control_tokens_in_a_text_are_refused(question: str, answer: str) -> None:
    processor = AutoProcessor.from_pretrained("checkpoints/omni_tiny")
    odd = Example({"image": [photo()]}, [ask("what", "a"), ask(question, answer)], "birds.jsonl, line 7")
    with pytest.raises(
        ExampleError, match="^birds.jsonl, line 7 has '<.*>' in the text of its (user|assistant), expected no"
    ):
        ConversationCollator(processor)([odd])


def test_a_template_that_changes_its_mind_is_refused() -> None:
    processor = AutoProcessor.from_pretrained("checkpoints/omni_tiny")
    processor.tokenizer.chat_template = "{{- messages | length -}}" + CHATML
    with pytest.raises(ExampleError, match="answers cannot be told apart; put {% generation %} around them"):
        ConversationCollator(processor)([example(1)])


def test_only_the_logits_before_labels_are_computed(make_pair: Pair) -> None:
    model, processor = make_pair()
    batch = ConversationCollator(processor)([example(3, seed=1), example(1, seed=5)])
    before = torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
    with torch.no_grad():
        full, few = model(**batch), model(**batch, logits_to_keep=before)
    assert few.logits.shape == (int(before.sum()), full.logits.shape[-1])
    torch.testing.assert_close(few.logits, full.logits[before])
    torch.testing.assert_close(few.loss, full.loss)
    before[0, int(before[0].nonzero()[0])] = False
    with pytest.raises(ValueError, match=r"1 of \d+ labelled tokens follow positions that logits_to_keep leaves out"):
        model(**batch, logits_to_keep=before)


def test_gradients_are_those_of_the_conversations_alone(make_pair: Pair) -> None:
    model, processor = make_pair()
    collate, rows = ConversationCollator(processor), [example(3, seed=1), example(2, seed=5)]
    model(**collate(rows)).loss.backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    single = [collate([Example(row.items, [conversation])]) for row in rows for conversation in row.conversations]
    total = sum(int((batch["labels"] != IGNORED).sum()) for batch in single)
    for batch in single:
        twin(**batch, num_items_in_batch=total).loss.backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_in_eager_attention_too(make_pair: Pair) -> None:
    """Eager attention adds its mask to the scores; a mask of booleans would add 0 and 1."""
    model, processor = make_pair()
    batch = ConversationCollator(processor)([example(3), example(1)])
    with torch.no_grad():
        expected = model(**batch).loss
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(**batch).loss, expected)


def test_labels_are_the_answers_and_their_ends(make_pair: Pair) -> None:
    _, processor = make_pair()
    batch = ConversationCollator(processor)([example(3), example(1)])
    for row, count in ((0, 3), (1, 1)):
        labels = batch["labels"][row]
        text = processor.tokenizer.decode(labels[labels != IGNORED])
        assert text == "".join(f"{answer}<|end|>" for _, answer in QUESTIONS[:count])
        assert labels[labels != IGNORED].equal(batch["input_ids"][row][labels != IGNORED])


def test_the_picture_is_in_a_sequence_once(make_pair: Pair) -> None:
    _, processor = make_pair()
    batch = ConversationCollator(processor)([example(4), example(1, images=2)])
    assert (batch["input_ids"] == processor.image_token_id).sum(-1).tolist() == [5, 10]
    assert batch["pixel_values"].shape == (3, 3, 16, 16)


def test_padding_learns_nothing_and_is_seen_by_nobody(make_pair: Pair) -> None:
    _, processor = make_pair()
    batch = ConversationCollator(processor)([example(3), example(1)])
    length = len(ConversationCollator(processor)([example(1)])["input_ids"][0])
    assert batch["labels"][1, length:].eq(IGNORED).all()
    mask = batch["attention_mask"][1, 0]
    assert not mask[:length, length:].any()
    assert mask[length:, length:].equal(torch.eye(mask.shape[0] - length, dtype=torch.bool))


def test_conversations_without_pictures(make_pair: Pair) -> None:
    model, processor = make_pair()
    talk = [ask("how many", "blue square", items=[])]
    batch = ConversationCollator(processor)([Example({}, talk), example(2)])
    assert batch["pixel_values"].shape[0] == 1
    alone = ConversationCollator(processor)([Example({}, talk)])
    assert "pixel_values" not in alone
    with torch.no_grad():
        assert model(**alone).loss.isfinite()


def test_several_turns(make_pair: Pair) -> None:
    _, processor = make_pair()
    turns = ask("what shape is it", "a red circle") + ask("how many", "blue square", items=[])
    batch = ConversationCollator(processor)([Example({"image": [photo()]}, [turns])])
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != IGNORED]) == "a red circle<|end|>blue square<|end|>"


# --- Nothing is dropped or cut ----------------------------------------------------------------------------------------


def test_an_example_without_an_answer_is_named(make_pair: Pair) -> None:
    _, processor = make_pair()
    with pytest.raises(ExampleError, match=r"Example 1 of the batch has no answer to learn: .*how many"):
        ConversationCollator(processor)([example(1), Example({"image": [photo()]}, [ask("how many")])])


def test_an_example_that_is_too_long_is_named(make_pair: Pair) -> None:
    _, processor = make_pair()
    length = ConversationCollator(processor)([example(4)])["input_ids"].shape[1]
    assert ConversationCollator(processor, max_length=length)([example(4)])["input_ids"].shape[1] == length
    with pytest.raises(ExampleError, match=rf"Example 1 .* has {length} tokens, more than max_length={length - 1}"):
        ConversationCollator(processor, max_length=length - 1)([example(1), example(4)])


def test_a_conversation_longer_than_the_language_model_is_named(make_pair: Pair) -> None:
    """Several in one row count from where they part, so the row may be longer than any of them."""
    _, processor = make_pair()
    batch = ConversationCollator(processor)([example(4)])
    longest = int(batch["position_ids"].max()) + 1
    assert longest < batch["input_ids"].shape[1]
    ConversationCollator(processor, max_positions=longest)([example(4)])
    with pytest.raises(
        ExampleError, match=rf"a conversation of {longest} tokens, more than the {longest - 1} positions"
    ):
        ConversationCollator(processor, max_positions=longest - 1)([example(4)])


@pytest.mark.parametrize(("items", "placeholders"), [(0, 1), (2, 1), (1, 0), (1, 2)])
def test_items_and_placeholders_must_match(make_pair: Pair, items: int, placeholders: int) -> None:
    _, processor = make_pair()
    given = Example({"image": [photo(i) for i in range(items)]}, [ask("how many", "a", items=["image"] * placeholders)])
    with pytest.raises(
        ExampleError,
        match=rf"Example 1 of the batch has {items} items of modality 'image', .* {placeholders} placeholders",
    ):
        ConversationCollator(processor)([example(1), given])


def test_items_without_an_encoder_are_refused(make_pair: Pair) -> None:
    _, processor = make_pair()
    with pytest.raises(
        ExampleError,
        match="Example 0 of the batch cannot be read by the model: This model takes pictures, found a sound; leave",
    ):
        ConversationCollator(processor)([Example({"audio": [1]}, [ask("how many", "a", items=[])])])


def test_the_longest_common_beginning() -> None:
    assert _common_prefix(["abcd", "abxd", "abc"]) == 2
    assert _common_prefix(["ab", "ab"]) == 2
    assert _common_prefix(["ab", "ba"]) == 0
