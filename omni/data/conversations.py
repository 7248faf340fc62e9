"""An example is some items and the conversations about them: questions, and the answers to learn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from omni.items import Item

Message = dict[str, Any]


class ExampleError(ValueError):
    """An example cannot be trained on. The message says which, why, and what to do.

    `kind` is an attribute of the class, because a worker of a `DataLoader` passes on only the class and the message.
    """

    kind: Literal["malformed row", "too long", "control token"] = "malformed row"


class LongExampleError(ExampleError):
    """The example has more tokens than a sequence or the Thinker takes."""

    kind = "too long"


class ControlTokenError(ExampleError):
    """A text of the example holds a token that ends a turn or stands for an item."""

    kind = "control token"


@dataclass(frozen=True)
class Example:
    """Some items, and the conversations about them.

    Attributes:
        items: for each modality, the items in the order of their blocks, such as `{"image": [picture]}`. They are raw, or
            all of them are encoded already.
        conversations: chats of `{"role", "content"}` messages. Several chats about the same items become one sequence.
        source: where the example comes from, for messages.
        unseen: for each answer and each of its words, a word that training never shows in that place because
            it is held out, or "". The loss does not count against that word.
        words: for each modality, what its items show or say, in words; empty where that is not known.
    """

    items: Mapping[str, list[Any]]
    conversations: list[list[Message]]
    source: str = ""
    unseen: Sequence[Sequence[str]] = ()
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)


def with_items(conversation: Sequence[Message], items: Mapping[str, Sequence[Any]]) -> list[Message]:
    """A chat with the items in its blocks, by modality in the order of the blocks. Items of later turns are left out."""
    waiting = {name: iter(each) for name, each in items.items()}
    return [
        message
        if isinstance(message["content"], str)
        else {
            **message,
            "content": [
                {**block, kind: next(waiting[kind])} if (kind := block["type"]) != "text" else block
                for block in message["content"]
            ],
        }
        for message in conversation
    ]


def words_of(message: Message) -> str:
    """The text of a message, without spaces around."""
    content = message["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return " ".join(block["text"] for block in blocks if block["type"] == "text").strip()


def ask(question: str, answer: str | None = None, items: Sequence[Item | str] = ("image",)) -> list[Message]:
    """A chat of one question about some items, and its answer if there is one.

    Args:
        question, answer: the texts.
        items: the items; or the names of their modalities, if the chat does not carry them.
    """
    blocks = [
        {"type": item} if isinstance(item, str) else {"type": item.modality, item.modality: item.value}
        for item in items
    ]
    content = [*blocks, {"type": "text", "text": question}]
    messages: list[Message] = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages
