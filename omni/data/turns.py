"""Parse the messages of a chat: roles, texts, and blocks that name or hold a file, in all the forms that rows have."""

import base64
import binascii
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from omni.data.names import Names
from omni.data.sources import Held, ManifestError, short
from omni.items import modality_of
from omni.registry import get_modality, open_item

_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?([^,]*);base64,", re.IGNORECASE)


class TextBlock(BaseModel):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ItemBlock(BaseModel):
    """A block that names its file, or takes the next one of its modality in the row's list."""

    type: str
    file: str | Held | None = None

    @model_validator(mode="before")
    @classmethod
    def _named_once(cls, block: Any, info: ValidationInfo) -> Any:
        if not isinstance(block, dict):
            return block
        kind, names = block.get("type"), _names(info)
        known = {*names.columns.values()}
        modality: str | None
        if isinstance(kind, str) and kind in known:
            given = [
                key for key in ("path", kind, "url") if block.get(key) is not None
            ]  # Arrow gives every block every field
            modality = kind
        elif isinstance(kind, str) and (kind == "file" or names.of_part(kind)):
            given, modality = [kind], names.of_part(kind)
            if block.get(kind) is None:
                raise ValueError(f"a block of type {kind!r} has its item as {kind!r}")
        else:
            raise ValueError(f"the type of a block is text or one of {', '.join(sorted(known))}")
        file = read_file(block[given[0]]) if given else None
        if modality is None:
            modality = _uploaded(block[kind])
        open_item(modality)  # a plug-in that opens no files, or is broken
        if len(given) > 1:
            noun = get_modality(modality).noun
            raise ValueError(f"a block names one {noun}, not one as {' and another as '.join(map(repr, given))}")
        return {"type": modality, "file": file}


def read_file(value: Any) -> str | Held:
    """A file as a row names it or holds it.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, Held):
        return value
    if isinstance(value, bytes):
        return Held(value, "")
    if isinstance(value, dict):  # such as those of `datasets`, and OpenAI's parts
        if isinstance(value.get("bytes"), bytes):
            name = value.get("path")
            return Held(value["bytes"], name if isinstance(name, str) else "")
        if isinstance(value.get("data"), str):
            return Held(_decoded(value["data"]), f"data.{value.get('format') or 'bin'}")
        value = next((value[key] for key in ("path", "url", "file_data") if value.get(key)), None)
    if not isinstance(value, str) or not value:
        raise ValueError("an item is a path, an address, a data URI or the bytes of a file")
    if found := _DATA.match(value):
        return Held(_decoded(value[found.end() :]), "")
    return value


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"a data URI holds base64, which this does not ({error})") from error


def _uploaded(value: Any) -> str:
    """The modality of a file, from the media type of its data URI."""
    text = value.get("file_data") if isinstance(value, dict) else None
    found = _DATA.match(text) if isinstance(text, str) else None
    modality = modality_of(found[1]) if found and found[1] else None
    if modality is None:
        raise ValueError("a file has `file_data`, a data URI with the media type of a known item")
    return modality.name


def _type_of_block(block: Any) -> str:
    return "text" if isinstance(block, dict) and block.get("type") == "text" else "item"


_Block = Annotated[Annotated[TextBlock, Tag("text")] | Annotated[ItemBlock, Tag("item")], Discriminator(_type_of_block)]


class Turn(BaseModel):
    """A message."""

    role: str = Field(validation_alias=AliasChoices("role", "from"))
    content: list[_Block] = Field(validation_alias=AliasChoices("content", "value"))

    @model_validator(mode="before")
    @classmethod
    def _items_elsewhere(cls, turn: Any, info: ValidationInfo) -> Any:
        names = _names(info)
        if isinstance(turn, dict) and (found := [key for key in turn if key == "path" or names.name_items(key)]):
            raise ValueError(f"an item is named in a block of the content or beside the chat, not as {found[0]!r} here")
        return turn

    @field_validator("role")
    @classmethod
    def _of_llava(cls, role: str) -> str:
        return {"human": "user", "gpt": "assistant"}.get(role, role)

    @field_validator("content", mode="before")
    @classmethod
    def _of_text(cls, content: Any, info: ValidationInfo) -> Any:
        for block in content if isinstance(content, list) else ():
            if not isinstance(block, dict):
                continue
            kind, names = block.get("type"), _names(info)
            given = (key for key, value in block.items() if value is not None and key != kind)
            if stranger := next((key for key in given if names.name_items(key) or names.of_part(key)), None):
                raise ValueError(f"a block of type {kind!r} names no file as {stranger!r}; give it a block of its own")
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @field_validator("content")
    @classmethod
    def _apart(cls, content: list[_Block], info: ValidationInfo) -> list[_Block]:
        """Split texts at placeholders, which become blocks."""
        names = _names(info)
        blocks: list[_Block] = []
        for block in content:
            if isinstance(block, ItemBlock):
                blocks.append(block)
                continue
            block.text.encode()  # a lone surrogate, such as "\ud83d", raises here and not in a tokenizer
            for place, text in enumerate(names.placeholder.split(block.text)):
                if place % 2:
                    blocks.append(ItemBlock.model_construct(type=names.tokens[text], file=None))
                elif text:
                    blocks.append(TextBlock(type="text", text=text))
        return blocks


def _names(info: ValidationInfo) -> Names:
    names: Any = info.context
    assert isinstance(names, Names)
    return names


_TURNS = TypeAdapter(list[Turn])


def read_turns(messages: Any, field: str, names: Names) -> list[Turn]:
    """The messages of a row's field.

    Raises:
        ManifestError: they are not valid. The message does not name the row.
    """
    try:
        return _TURNS.validate_python(messages, context=names)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        place = ".".join(map(str, (field, *found["loc"]))) if field in ("messages", "conversations") else field
        message = found["msg"].removeprefix("Value error, ")
        raise ManifestError(f"{place}: {message}, found {short(found['input'])}.") from error
