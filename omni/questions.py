"""A question about items becomes a prompt, and the model's output becomes an answer."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from transformers import BatchFeature

from omni.data.conversations import Message, ask
from omni.fusion.chats import OldTransformers
from omni.fusion.processing_omni import OmniProcessor
from omni.items import Item, nouns, read_items
from omni.knowing.familiarity import Familiar


class QuestionError(ValueError):
    """A question cannot be asked. The message is one sentence."""


class Answer(BaseModel):
    """A model's answer.

    Attributes:
        answer: its text.
        question: the question, without spaces around it.
        checkpoint: the folder that the model was loaded from.
        complete: whether the model ended by itself; False if it was stopped at `max_new_tokens`.
        tokens_read: length of the prompt, with the tokens of items.
        tokens_written: length of the answer.
        seconds: wall-clock time of each step: "preparing" the prompt, "encoding" the items, "reading" the prompt until
            the first token, and "writing" the rest.
        confidence: the probability that the answer is right; None if the checkpoint does not know it.
        familiar: whether items and question are like those of training; None if the checkpoint does not know it.
    """

    model_config = ConfigDict(frozen=True)

    answer: str
    question: str
    checkpoint: str
    complete: bool
    tokens_read: int
    tokens_written: int
    seconds: dict[str, float]
    confidence: float | None = None
    familiar: Familiar | None = None


def check_question(question: str, in_words: bool = True) -> str:
    """The question without spaces around it.

    Args:
        question: any text.
        in_words: whether the question needs words; not if an item asks.

    Raises:
        QuestionError: the question has no words, or is not valid Unicode.
    """
    question = question.strip()
    if not question and in_words:
        raise QuestionError("The question is empty; ask something.")
    try:
        question.encode("utf-8")
    except UnicodeEncodeError as error:
        raise QuestionError(f"The question {question!r} is not valid Unicode text; type it again.") from error
    return question


def expect_room(tokens: int, max_new_tokens: int, limit: int | None, items: Sequence[Item]) -> None:
    """Refuse a prompt that leaves no room for an answer.

    Args:
        tokens: length of the prompt.
        max_new_tokens: the largest length of the answer.
        limit: the largest length of both together; None if the model has no known limit.
        items: the items of the question, for the message.

    Raises:
        QuestionError: there is no room.
    """
    if limit is not None and tokens + max_new_tokens > limit:
        raise QuestionError(
            f"The question with {nouns(items)} is {tokens} tokens, with no room for an answer of {max_new_tokens} in the "
            f"{limit} that the model takes; pass fewer of them or a smaller max_new_tokens."
        )


def make_prompts(processor: OmniProcessor, asked: Sequence[tuple[str, Sequence[Any]]]) -> BatchFeature:
    """A batch of questions about items or files, ready for `generate`.

    Args:
        processor: the model's processor.
        asked: pairs of a question and its items, in any form of `read_item`.

    Raises:
        QuestionError: see `write_prompts`.
        ItemError: a file cannot be read.
    """
    return write_prompts(processor, [ask(question, items=read_items(items)) for question, items in asked])


def write_prompts(processor: OmniProcessor, conversations: Sequence[list[Message]]) -> BatchFeature:
    """A batch of chats that end with a question, ready for `generate`. Placeholders in their text are read as plain text.

    Raises:
        QuestionError: the installed transformers is too old for these chats.
    """
    try:
        return processor.apply_chat_template(
            list(conversations),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=True,
            processor_kwargs={"padding": True, "padding_side": "left"},  # the answer follows the last token
        )
    except OldTransformers as error:
        raise QuestionError(str(error)) from error
