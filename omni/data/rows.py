"""Parse the fields of a row into its items and its conversation.

A row names its items in columns of their modality, `image` or `images`, `audio`, and as `file_name`, `file_names` or
`*_file_name(s)`, where the suffix tells the modality. Beside them it has one of these:

* `caption` or `text`: the answer to the manifest's `prompt`;
* `question` and `answer`; without a question, or with an empty one, the items alone are asked, such as a spoken question;
* `messages` (`role`: user, assistant; `content`: a string or blocks) or LLaVA's `conversations` (`from`, `value`). Each
  block `{"type": "image"}` and each placeholder `<image>` in a user's text takes the next item of that modality of the
  row. A line break beside a placeholder is removed. A block may name its own file (`path`, `url` or its type), also as
  OpenAI's `image_url`, `input_audio` and `file`. A chat may have no items; `omni check-data` notes it.

An item is the path of a file, a data URI, an address where they are allowed, or the file itself: bytes, or a struct of
`bytes` and `path` as `datasets` writes it.

A row may say in `words` what each of its items shows or says; the objective "distillation" reads that.

In a question, too, a placeholder takes the next item. Items that a question has no placeholder for come before it, in the
order of the row. An optional `kind` groups the scores of an evaluation. Other fields are ignored.
"""

import base64
import binascii
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

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

from omni.data.conversations import Message, ask
from omni.data.sources import SAYINGS, Held, ManifestError, is_address, short
from omni.items import modality_of as modality_of_upload
from omni.registry import get_modality, load_modalities, modalities, open_item

_FILES = re.compile(r"(.+_)?file_names?")
_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?([^,]*);base64,", re.IGNORECASE)
_PART = re.compile(r"(?:input_)?([a-z0-9_]+?)(?:_url)?")


class Named(NamedTuple):
    """A file that a row names or holds, and its modality."""

    modality: str
    name: str | Held


@dataclass(frozen=True)
class Names:
    """The names under which rows have items of all known modalities.

    Attributes:
        columns: the columns that hold files of one modality, each with it: `images`, `audio`.
        tokens: the placeholders, each with its modality.
        suffixes: the suffixes of files, each with its modality.
    """

    columns: Mapping[str, str]
    tokens: Mapping[str, str]
    suffixes: Mapping[str, str]

    @classmethod
    def known(cls) -> "Names":
        """The names of all modalities, registered or installed."""
        columns, tokens, suffixes = dict[str, str](), dict[str, str](), dict[str, str]()
        for name in modalities():  # also of a broken plug-in, which a message names when a row has an item for it
            columns |= {name: name, f"{name}s": name}
        for modality in load_modalities()[0]:
            columns[modality.argument] = tokens[modality.token] = modality.name
            suffixes = dict.fromkeys(modality.suffixes, modality.name) | suffixes
        return cls(columns, tokens, suffixes)

    @cached_property
    def placeholder(self) -> re.Pattern[str]:
        """Finds the placeholders of all modalities, each with a line break on either side of it."""
        return re.compile(rf"\n?({'|'.join(map(re.escape, self.tokens)) or '(?!)'})\n?")

    def name_items(self, key: str) -> bool:
        """Whether a column names items."""
        return key in self.columns or _FILES.fullmatch(key) is not None

    def of_part(self, kind: str) -> str | None:
        """The modality of OpenAI's part of a message: "image_url" and "input_image" -> "image"; None if it is no item."""
        found = _PART.fullmatch(kind)
        return self.columns.get(found[1]) if found else None

    @property
    def remedy(self) -> str:
        """The names for an item in messages."""
        return f"name its file as {' or '.join(f'`{name}`' for name in dict.fromkeys(self.columns.values()))}"


class _TextBlock(BaseModel):
    type: Literal["text"]
    text: str


class _ItemBlock(BaseModel):
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
        file = _file(block[given[0]]) if given else None
        if modality is None:
            modality = _uploaded(block[kind])
        open_item(modality)  # a plug-in that opens no files, or is broken
        if len(given) > 1:
            noun = get_modality(modality).noun
            raise ValueError(f"a block names one {noun}, not one as {' and another as '.join(map(repr, given))}")
        return {"type": modality, "file": file}


def _file(value: Any) -> str | Held:
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
    modality = modality_of_upload(found[1]) if found and found[1] else None
    if modality is None:
        raise ValueError("a file has `file_data`, a data URI with the media type of a known item")
    return modality.name


def _type_of_block(block: Any) -> str:
    return "text" if isinstance(block, dict) and block.get("type") == "text" else "item"


_Block = Annotated[
    Annotated[_TextBlock, Tag("text")] | Annotated[_ItemBlock, Tag("item")], Discriminator(_type_of_block)
]


class _Turn(BaseModel):
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
            if isinstance(block, _ItemBlock):
                blocks.append(block)
                continue
            block.text.encode()  # a lone surrogate, such as "\ud83d", raises here and not in a tokenizer
            for place, text in enumerate(names.placeholder.split(block.text)):
                if place % 2:
                    blocks.append(_ItemBlock.model_construct(type=names.tokens[text], file=None))
                elif text:
                    blocks.append(_TextBlock(type="text", text=text))
        return blocks


def _names(info: ValidationInfo) -> Names:
    names: Any = info.context
    assert isinstance(names, Names)
    return names


_TURNS = TypeAdapter(list[_Turn])


def parse_row(
    fields: dict[str, Any],
    prompt: str | None,
    promised: bool,
    answers: bool,
    names: Names,
    modality_of: Callable[[str | Held], str],
    addresses: bool = False,
) -> tuple[list[Named], list[Message], str | None]:
    """The files of a row in the order of their blocks, its conversation, and its kind.

    Args:
        fields: the names and values of the row.
        prompt: the question for a row that has only a caption. By default it asks to describe the items.
        promised: whether the layout requires an item in every row, chats included.
        answers: whether a row needs an answer.
        names: the modalities that are known.
        modality_of: tells the modality of a file that stands in a column for files of any.
        addresses: whether an item may be an address.

    Raises:
        ManifestError: the row is not valid. The message does not name its place.
    """
    given = {key: value for key, value in fields.items() if value is not None}
    sayings = [key for key in SAYINGS if key in given]
    listed = _listed(given, names, modality_of)
    if not answers and not sayings and "answer" not in given and listed:
        return _files(listed, addresses), [], None
    if not sayings and "answer" in given:
        sayings = ["answer"]
    if not sayings and any(key in fields for key in (*SAYINGS, "answer")):
        raise ManifestError("the answer is null, expected text; write one or remove the row.", "no answer")
    if len(sayings) != 1:
        raise ManifestError(
            "expected exactly one of `messages`, `conversations`, `question` and `answer`, `caption`, `text`, beside "
            f"the files of its items, found the fields {', '.join(map(repr, given)) or 'of an empty object'}."
        )
    kind, saying = given.get("kind", ""), sayings[0]
    if "answer" in given and saying in ("caption", "text"):
        raise ManifestError(
            f"expected `answer` beside `question`, found it beside `{saying}`, which is an answer itself; rename or remove "
            "one of the two."
        )
    if not isinstance(kind, str):
        raise ManifestError(f"`kind` should be text, found {short(kind)}.")
    chat = saying in ("messages", "conversations")
    if not listed and not chat:
        raise _no_item(saying, names)
    turns = _turns(given[saying] if chat else _ask(given, saying, prompt, listed, names), saying, names)
    files, conversation = _converse(turns, listed)
    if not files and promised:
        raise _no_item(saying, names)
    return _files(files, addresses), conversation, kind or None


def words_of(fields: Mapping[str, Any], items: int) -> tuple[str, ...]:
    """What each item of a row shows or says, in words: `words`, or the caption of a row with one item; else nothing.

    Raises:
        ManifestError: these are no texts, or not one for each item.
    """
    given = fields.get("words")
    if given is None:
        captions = [fields[key] for key in ("caption", "text") if isinstance(fields.get(key), str)]
        return (captions[0],) if captions and items == 1 else ()
    words = [given] if isinstance(given, str) else given
    if not isinstance(words, list) or not all(isinstance(text, str) and not is_blank(text) for text in words):
        raise ManifestError(f"`words` should be text, or a list of texts, found {short(given)}.")
    if len(words) != items:
        raise ManifestError(f"`words` should be one text for each of {items} items, found {len(words)}.")
    return tuple(words)


def describe(items: Sequence[str]) -> str:
    """The default question for rows that have only a caption, by the modalities of their items."""
    return f"Describe {' and '.join(f'the {get_modality(name).noun}' for name in dict.fromkeys(items))}."


def _no_item(saying: str, names: Names) -> ManifestError:
    return ManifestError(
        f"expected an item beside `{saying}`, found none; {names.remedy} or `file_name`, or remove the row.",
        "no picture",
    )


def _files(files: list[Named], addresses: bool) -> list[Named]:
    for modality, name in files:
        if isinstance(name, str) and is_address(name) and not addresses:
            noun = get_modality(modality).noun
            raise ManifestError(
                f"{short(name)} is an address, expected a file; download the {noun} first, or allow it by naming a folder "
                "for what is downloaded, as `addresses` of a recipe or --addresses."
            )
    return files


def _ask(
    given: dict[str, Any], saying: str, prompt: str | None, listed: Sequence[Named], names: Names
) -> list[Message]:
    """The chat of a row with a single question. Items that the question does not place come first."""
    asks = saying in ("question", "answer")
    question = given.get("question", "") if asks else prompt or describe([each.modality for each in listed])
    answering = "answer" if asks else saying
    answer = given.get(answering, "")
    for key, text in (("question", question), (answering, answer)):
        if not isinstance(text, str):
            raise ManifestError(f"`{key}` should be text, found {short(text)}.")
    if is_blank(answer):
        raise ManifestError(f"`{answering}` is empty, expected text; write it or remove the row.", "no answer")
    placed = {names.tokens[token] for token in names.placeholder.findall(question)}
    first = [each.modality for each in listed if each.modality not in placed]
    return ask("" if is_blank(question) else question, answer, first)


def _listed(given: dict[str, Any], names: Names, modality_of: Callable[[str | Held], str]) -> list[Named]:
    """The files that a row names outside of its chat, in the order of its columns."""
    listed = list[Named]()
    keys = dict[str, dict[str, None]]()  # by modality
    for key in filter(names.name_items, given):
        value = given[key]
        if value == "":  # an empty cell of a table names nothing
            continue
        for each in value if isinstance(value, list) else [value]:
            try:
                name = _file(each)
            except ValueError as error:
                if isinstance(each, str) and each:
                    raise ManifestError(f"{key!r} cannot be read: {error}; encode it again.") from error
                raise ManifestError(f"{key!r} should be a path or a list of paths, found {short(each)}.") from error
            modality = names.columns[key] if key in names.columns else modality_of(name)
            try:
                open_item(modality)
            except ValueError as error:  # a plug-in that opens no files, or is broken
                raise ManifestError(f"{key!r} cannot be read: {error}") from error
            listed.append(Named(modality, name))
            keys.setdefault(modality, {})[key] = None
    for modality, found in keys.items():
        if len(found) > 1 and not names.columns.keys().isdisjoint(found):
            raise ManifestError(
                f"{get_modality(modality).noun}s should be named once, found {' and '.join(map(repr, found))}; remove "
                "all but one."
            )
    return listed


def names_of_files(fields: Mapping[str, Any]) -> list[str | Held]:
    """The values in the columns of a row for files of any modality."""
    values = [value for key, value in fields.items() if _FILES.fullmatch(key)]
    found = list[str | Held]()
    for each in (each for value in values for each in (value if isinstance(value, list) else [value])):
        with suppress(ValueError):  # raised when the row is asked for
            found.append(_file(each))
    return found


def _turns(messages: Any, field: str, names: Names) -> list[_Turn]:
    try:
        return _TURNS.validate_python(messages, context=names)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        place = ".".join(map(str, (field, *found["loc"]))) if field in ("messages", "conversations") else field
        message = found["msg"].removeprefix("Value error, ")
        raise ManifestError(f"{place}: {message}, found {short(found['input'])}.") from error


def _converse(turns: list[_Turn], listed: Sequence[Named]) -> tuple[list[Named], list[Message]]:
    """The files in the order of their blocks, and the chat as the processor takes it.

    Args:
        turns: the messages. A block of an item names its file, or takes the next of its modality in `listed`.
        listed: the files that the row names outside of its chat.
    """
    blocks = [block for turn in turns for block in turn.content if isinstance(block, _ItemBlock)]
    marks, there = Counter(block.type for block in blocks if block.file is None), Counter(each[0] for each in listed)
    for name in {**there, **marks}:
        if marks[name] != there[name]:
            modality = get_modality(name)
            raise ManifestError(
                f"expected a placeholder {modality.token} for each of {there[name]} {modality.noun}s, found "
                f"{marks[name]}; write one for each."
            )
    waiting = {name: iter([each.name for each in listed if each.modality == name]) for name in there}
    files: list[Named] = []
    conversation: list[Message] = []
    for place, turn in enumerate(turns):
        speaker = ("user", "assistant")[place % 2]
        if turn.role != speaker:
            remedy = {"system": "put its text into the first question"}.get(turn.role, "let the two alternate")
            raise ManifestError(
                f"message {place + 1} should be the {speaker}'s, found the role {turn.role!r}; {remedy}."
            )
        texts = [block.text for block in turn.content if isinstance(block, _TextBlock)]
        shown = [block for block in turn.content if isinstance(block, _ItemBlock)]
        if speaker == "assistant" and is_blank("".join(texts)):
            raise ManifestError(f"message {place + 1} is an empty answer, expected text; write it.", "no answer")
        if speaker == "assistant" and shown:
            noun = get_modality(shown[0].type).noun
            raise ManifestError(f"message {place + 1} is an answer with a {noun}, expected text alone; take it out.")
        if not shown and is_blank("".join(texts)):
            raise ManifestError(f"message {place + 1} is empty, expected a question or an item; write one.")
        files += [Named(block.type, block.file or next(waiting[block.type])) for block in shown]
        content = [block.model_dump(include={"type", "text"}) for block in turn.content]
        conversation.append({"role": turn.role, "content": content})
    if len(turns) % 2 or not turns:
        raise ManifestError(
            f"the last of {len(turns)} messages should be the assistant's; add the answer.", "no answer"
        )
    return files, conversation


def is_blank(text: str) -> bool:
    """Whether a text has no visible character: only spaces, control and format characters."""
    return all(character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text)
