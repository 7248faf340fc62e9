"""Ask a model every question as a user asks it, with its items or with others in their place, and keep its answers.

A `Questionnaire` is a sequence of `Example`s; each has items and the questions about them. The rows of a manifest make
one (`omni.evaluation.manifest`). A world makes another (`omni.worlds`).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from transformers import LogitsProcessorList

from omni.data.conversations import Message, with_items, words_of
from omni.knowing.confidence import Certainty
from omni.questions import write_prompts
from omni.registry import get_modality

from .scores import Asked, EvaluationError, Parts, Sight

Items = Mapping[str, Sequence[Any]]
"""For each modality its items, in the order of their blocks: `{"image": [picture], "audio": [sound]}`."""

WINDOW, WINDOW_BYTES = 16, 150_000_000
"""Questions are sorted by the length of their answers within a window of this many batches, or bytes of items."""


@dataclass(frozen=True)
class Query:
    """One question.

    Attributes:
        kind: questions of one kind are scored together.
        conversation: the messages up to the question, with a block of its type for each item: `{"type": "image"}`.
        expected: the right answer, without spaces around it.
    """

    kind: str
    conversation: list[Message]
    expected: str

    @property
    def text(self) -> str:
        """The words of the last message."""
        return words_of(self.conversation[-1])

    def show(self, items: Items) -> list[Message]:
        """The conversation with the items in its blocks. Items of later turns are left out."""
        return with_items(self.conversation, items)


@dataclass(frozen=True)
class Example:
    """Items, their source, and the questions about them."""

    source: str
    items: Items
    queries: tuple[Query, ...]


class Questionnaire(Protocol):
    """The examples of one evaluation. Each is made when it is asked for."""

    @property
    def modalities(self) -> Sequence[str]:
        """The modalities of all items."""

    @property
    def parts(self) -> Parts | None:
        """The kind of answers that are also scored part by part, if any."""

    def __len__(self) -> int:
        """The number of examples."""

    def __getitem__(self, index: int) -> Example:
        """One example; the same every time."""

    def swapped(self, index: int, modality: str) -> Sequence[Any]:
        """As many items of this modality, from another example."""

    def why_not_swapped(self, modality: str) -> str | None:
        """Why an example has no other one to swap items of this modality with; None if each has one."""

    def data_hash(self, progress: Callable[[int], None] = lambda done: None) -> str:
        """sha256 of all items and expected answers. Raises if one of them cannot be read."""


def ask_all(
    model: Any,
    processor: Any,
    questionnaire: Questionnaire,
    sight: Sight = "real",
    modality: str | None = None,
    *,
    batch_size: int = 64,
    max_new_tokens: int = 192,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Asked]:
    """Ask every question.

    A batch takes as many steps as its longest answer has tokens. So questions with expected answers of similar length are
    asked together. That changes no answer, because an answer does not depend on the rest of its batch.

    Args:
        model, processor: see `omni.loading.checkpoint.load`.
        questionnaire: the examples.
        sight: what to show: the "real" items, "blank" ones (grey pictures, silence), "swapped" ones of another example, or
            "noise".
        modality: the modality whose items are not the real ones. By default all are.
        batch_size: number of questions in a batch.
        max_new_tokens: number of tokens after which an answer is stopped.
        progress: called after each batch with the approximate number of examples done.

    Returns:
        The answers, in the order of the questions.

    Raises:
        EvaluationError: the model cannot read a question, or there is no room for its answer.
    """
    asked: dict[int, Asked] = {}  # by number of the question
    waiting: list[_Waiting] = []
    for index in range(len(questionnaire)):
        example = questionnaire[index]
        items = shown(questionnaire, index, example, sight, modality)
        share = _size(items) / max(len(example.queries), 1)
        first = len(asked) + len(waiting)
        waiting += [
            _Waiting(number, index, example.source, query, query.show(items), share)
            for number, query in enumerate(example.queries, start=first)
        ]
        whole = len(waiting) // batch_size
        if index == len(questionnaire) - 1:
            due = len(waiting)
        elif whole >= WINDOW or sum(each.bytes for each in waiting) >= WINDOW_BYTES:
            due = whole * batch_size
        else:
            continue
        for answers in _ask_window(model, processor, waiting[:due], batch_size, max_new_tokens):
            asked |= answers
            progress((index + 1) * len(asked) // (first + len(example.queries)))
        del waiting[:due]
    return [asked[number] for number in range(len(asked))]


@dataclass(frozen=True)
class _Waiting:
    number: int  # of the question
    example: int
    source: str
    query: Query
    conversation: list[Message]
    bytes: float  # those of the items of the example, divided among its questions


def _size(items: Items) -> int:
    """Bytes of the items, as far as their modalities say."""
    contents = ((get_modality(name).content, each) for name, each in items.items())
    return sum(len(content(item)) for content, each in contents if content is not None for item in each)


def _ask_window(
    model: Any, processor: Any, window: Sequence[_Waiting], batch_size: int, max_new_tokens: int
) -> Iterator[dict[int, Asked]]:
    """For each batch, its answers by number of the question."""
    ordered = sorted(window, key=lambda each: len(each.query.expected))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        try:
            replies = _generate(model, processor, [each.conversation for each in batch], max_new_tokens)
        except EvaluationError as error:
            sources = list(dict.fromkeys(each.source for each in sorted(batch, key=lambda each: each.number)))
            where = sources[0] if len(sources) == 1 else f"one of {sources[0]} to {sources[-1]}"
            raise EvaluationError(f"The model cannot be asked about {where}: {error}") from error
        answers: dict[int, Asked] = {}
        for each, reply in zip(batch, replies, strict=True):
            q, source = each.query, each.source
            about = each.example, reply.complete, reply.prompt, reply.confidence
            answers[each.number] = Asked(q.kind, q.text, q.expected, reply.answer, source, *about)
        yield answers


def shown(
    questionnaire: Questionnaire, index: int, example: Example, sight: Sight, modality: str | None = None
) -> Items:
    """The items of an example, or others in the place of those of a modality; see `ask_all`."""
    if sight == "real":
        return example.items
    items = {**example.items}
    for name in items if modality is None else {modality} & items.keys():
        if sight == "swapped":
            items[name] = questionnaire.swapped(index, name)
            continue
        stand_ins = get_modality(name).stand_ins
        assert stand_ins is not None  # or this sight is left out
        items[name] = [stand_ins(item, index)[sight] for item in items[name]]
    return items


@dataclass(frozen=True)
class _Reply:
    answer: str
    complete: bool
    prompt: str
    confidence: float | None


@torch.inference_mode()
def _generate(model: Any, processor: Any, conversations: Sequence[list[Message]], max_new_tokens: int) -> list[_Reply]:
    """Greedy answers to a batch of chats that end with a question."""
    try:
        inputs = write_prompts(processor, conversations).to(model.device)
    except (TemplateError, ValueError) as error:  # such as a role that the chat template does not know
        raise EvaluationError(str(error)) from error
    rows, mask = inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()
    prompts = [[token for token, seen in zip(*row, strict=True) if seen] for row in zip(rows, mask, strict=True)]
    longest, limit = max(map(len, prompts)), getattr(model.config.text_config, "max_position_embeddings", None)
    if limit is not None and longest + max_new_tokens > limit:
        raise EvaluationError(
            f"a prompt of {longest} tokens leaves no room for an answer of {max_new_tokens} in the {limit} that the "
            "model takes; allow fewer new tokens, or ask about fewer items at once."
        )
    certainty, known = Certainty(), model.familiarity
    noted = {} if known is None else {"logits_processor": LogitsProcessorList([certainty])}
    output = model.generate(**inputs, **noted, max_new_tokens=max_new_tokens, do_sample=False)
    written = output[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(written, skip_special_tokens=True)
    ends = model.generation_config.eos_token_id
    likely = [None] * len(texts) if known is None else map(known.confidence, certainty.of(written, ends))
    ends = torch.tensor([] if ends is None else ends, dtype=torch.long, device=written.device)
    complete = torch.isin(written, ends).any(-1).tolist()
    hashes = [hashlib.sha256(json.dumps(prompt).encode()).hexdigest() for prompt in prompts]
    return [
        _Reply(text.strip(), done, hashed, sure)
        for text, done, hashed, sure in zip(texts, complete, hashes, likely, strict=True)
    ]
