"""Items in chats: the blocks that name them, and the chats that the installed transformers cannot read."""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import transformers

from omni.files import ReadError
from omni.items import MAX_BYTES, said_of_item
from omni.modality import Modality
from omni.registry import open_item

from .placeholders import UNMARKED

ALWAYS = ("image",)
"""The modalities whose items chats may have in every version of transformers."""

_ADDRESS = re.compile(r"(https?://|data:)", re.IGNORECASE)
"""The beginning of a web address or data URI. The preprocessor fetches it."""


class OldTransformers(ValueError):
    """A chat for which transformers 5.23 is needed; the message is one sentence."""


def readable(bundles: Iterable[Modality]) -> list[Modality]:
    """The modalities whose items a chat may have: all, or before transformers 5.23 pictures alone."""
    return [modality for modality in bundles if UNMARKED or modality.name in ALWAYS]


def refuse_new_chats(conversation: Any, options: dict[str, Any], bundles: Sequence[Modality], tokenizer: Any) -> None:
    """Refuse what transformers before 5.23 cannot read in a chat.

    Args:
        conversation: a chat or several.
        options: arguments of `apply_chat_template`; `sanitize_control_tokens` is removed, as transformers lacks it.
        bundles: the modalities of the processor.
        tokenizer: the tokenizer of the processor.

    Raises:
        OldTransformers: the chat has items that are no pictures, or, with `sanitize_control_tokens`, a text has a control
            token.
    """
    parts, names = list(_nested(conversation)), {modality.name: modality.token for modality in bundles}
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    types = [part.get("type") for part in parts if isinstance(part, Mapping)]
    found = [name for name in names if name not in ALWAYS and name in types]
    what = f"items of type {found[0]!r}" if found and options.get("tokenize") else ""
    if options.pop("sanitize_control_tokens", False):
        texts = [part for part in parts if isinstance(part, str)]
        meant = [token for token in {*special, *names.values()} if any(token in text for text in texts)]
        what = what or (f"the control token {min(meant)!r} in a text" if meant else "")
    if what:
        raise OldTransformers(
            f"The chat has {what}, which transformers {transformers.__version__} cannot read there; leave it out, "
            "or install transformers 5.23 or newer."
        )


class Kept:
    """An item in a chat on its way through transformers, which would make a dictionary of a dataclass or another object.

    Attributes:
        item: the item.
    """

    __slots__ = ("item",)

    def __init__(self, item: Any) -> None:
        self.item = item


def keep_items(chat: Any, names: Collection[str]) -> Any:
    """A chat, or several, with each item in a block of these modalities `Kept`. Names of files and pictures stay."""
    if isinstance(chat, (list, tuple)):
        return [keep_items(each, names) for each in chat]
    if not isinstance(chat, Mapping):
        return chat
    name = chat.get("type")
    if name in names and name not in ALWAYS and not isinstance(chat.get(name), (str, type(None))):
        return {**chat, name: Kept(chat[name])}
    return {**chat, "content": keep_items(chat["content"], names)} if "content" in chat else chat


def items_of_chats(
    bundles: Sequence[Modality], conversations: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, list[list[Any]]]:
    """The items in the blocks of each chat: for each modality's argument, a list of items per chat."""
    rows = [
        [block for message in chat if isinstance(message.get("content"), (list, tuple)) for block in message["content"]]
        for chat in conversations
    ]
    return {
        modality.argument: [
            [item for block in row if block["type"] == modality.name for item in _items_of_block(modality, block)]
            for row in rows
        ]
        for modality in bundles
    }


def _items_of_block(modality: Modality, block: Mapping[str, Any]) -> list[Any]:
    """The item in a block of a chat: `{"type": "signal", "signal": array}`, or a file by its "path"."""
    given = {key: value.item if isinstance(value, Kept) else value for key, value in block.items()}
    if modality.name == "image":  # transformers opens pictures
        return [given[key] for key in ("image", "url", "path", "base64") if key in given]
    files = [given[key] for key in ("path", "url") if key in given]
    if modality.name not in given:
        return [file if _ADDRESS.match(str(file)) else open_item(modality.name)(file) for file in files]
    item = given[modality.name]
    return [{"array": item, "sampling_rate": given["sampling_rate"]} if "sampling_rate" in given else item]


def opened(modality: Modality, given: Any) -> Any:
    """Open files, addresses and pictures of PIL as the modality does; leave arrays and base64 as they are.

    Raises:
        ItemError: there is nothing that can be read.
    """
    if not modality.is_item(given):
        return [opened(modality, each) for each in given]
    if isinstance(given, str) and _ADDRESS.match(given) and modality.open is not None:
        from omni.downloads import content_of  # most items are files

        try:
            given = content_of(given, MAX_BYTES)
        except ReadError as error:
            raise said_of_item(error) from error
    stays = hasattr(given, "shape") or (isinstance(given, str) and not os.path.exists(given))
    return given if stays or modality.open is None else modality.open(given)


def flat(modality: Modality, given: Any) -> Iterator[Any]:
    """The items of one item, a list of items, or a list per row."""
    if modality.is_item(given):
        yield given
        return
    for row in given:
        yield from [row] if modality.is_item(row) else row


def _nested(value: Any) -> Iterator[Any]:
    """A value and everything inside it, such as the messages, blocks and texts of a chat."""
    yield value
    if isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _nested(part)
