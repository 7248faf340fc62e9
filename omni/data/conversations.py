"""Training examples as conversations: what a user asks about some pictures, and the answer to learn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, Any]


class ExampleError(ValueError):
    """An example that cannot be learnt from; the message says which, why, and what to do.

    `kind` belongs to the class, as a worker of a `DataLoader` hands on the class and the message of an error alone.
    """

    kind: Literal["malformed row", "too long", "control token"] = "malformed row"


class LongExampleError(ExampleError):
    """More tokens than a row or the Thinker takes."""

    kind = "too long"


class ControlTokenError(ExampleError):
    """A text that would end a turn, or stand for an item."""

    kind = "control token"


@dataclass(frozen=True)
class Example:
    """Items and the conversations that are about them.

    Attributes:
        items: for each modality, the items in the order of their blocks, such as `{"image": [picture]}`; raw, or all of
            them encoded already.
        conversations: chats of `{"role", "content"}` messages. Several may share the items: they are learnt in one row.
        source: where it comes from, for messages.
        unseen: for each conversation and each word of its answer a word that could not have stood there in training, for
            what is held out, or ""; the loss shall not speak against it.
    """

    items: Mapping[str, list[Any]]
    conversations: list[list[Message]]
    source: str = ""
    unseen: Sequence[Sequence[str]] = ()


def ask(question: str, answer: str | None = None, images: int | Sequence[Any] = 1) -> list[Message]:
    """A chat of one question about some pictures, and its answer if there is one.

    Args:
        images: the pictures, or how many there are if they travel apart from the chat.
    """
    blocks = (
        [{"type": "image"}] * images if isinstance(images, int) else [{"type": "image", "image": i} for i in images]
    )
    content = [*blocks, {"type": "text", "text": question}]
    messages: list[Message] = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages
