"""A question about items becomes a prompt, and what a model says to it an answer."""

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
    """A question that cannot be asked; the message is one sentence."""


class Answer(BaseModel):
    """What a model said.

    Attributes:
        answer: its words.
        question: what it was asked, without spaces around.
        checkpoint: the folder that the model came from.
        complete: whether the model ended by itself; False if it was stopped at `max_new_tokens`.
        tokens_read, tokens_written: length of the prompt, items included, and of the answer.
        seconds: wall-clock time by what it was spent on: preparing the prompt, encoding the items, reading the prompt
            (to the first token) and writing the rest.
        confidence: the probability that the answer is right; None where the checkpoint does not know it.
        familiar: whether items and question are like those of training; None where the checkpoint does not know it.
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
    """The question without spaces around.

    Args:
        question: any text.
        in_words: whether something must be left; not where an item is the question.

    Raises:
        QuestionError: nothing is left, or it is no text that can be written down (broken bytes of a terminal).
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
        max_new_tokens: length of the answer, at most.
        limit: what the model takes of both together; None if that is not known.
        items: of the question, for the message.

    Raises:
        QuestionError: there is no room.
    """
    if limit is not None and tokens + max_new_tokens > limit:
        raise QuestionError(
            f"The question with {nouns(items)} is {tokens} tokens, with no room for an answer of {max_new_tokens} in the "
            f"{limit} that the model takes; pass fewer of them or a smaller max_new_tokens."
        )


def make_prompts(processor: OmniProcessor, asked: Sequence[tuple[str, Sequence[Any]]]) -> BatchFeature:
    """A batch of questions about items, ready for `generate`; an item may be a file, see `read_item`."""
    return write_prompts(processor, [ask(question, items=read_items(items)) for question, items in asked])


def write_prompts(processor: OmniProcessor, conversations: Sequence[list[Message]]) -> BatchFeature:
    """A batch of chats that end with a question, ready for `generate`; placeholders in their text are plain text.

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
            processor_kwargs={"padding": True, "padding_side": "left"},  # answers go on from the last token
        )
    except OldTransformers as error:
        raise QuestionError(str(error)) from error
