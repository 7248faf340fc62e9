"""Parse the fields of a row into its pictures and its conversation.

A row names its pictures as `image`, `images`, `file_name`, `file_names` or `*_file_name(s)`, and has one of these:

* `caption` or `text`: the answer to the manifest's `prompt`;
* `question` and `answer`;
* `messages` (`role`: user, assistant; `content`: a string or blocks) or LLaVA's `conversations` (`from`, `value`). Each
  `{"type": "image"}` and each `<image>` in a user's text takes the next picture of the row. A line break beside `<image>`
  is removed. A block may name its own picture (`path` or `image`). A chat may have no pictures; `omni check-data` notes it.

An optional `kind` groups the scores of an evaluation. Other fields are ignored.
"""

import re
import unicodedata
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, Field, TypeAdapter, ValidationError, field_validator, model_validator

from omni.data.conversations import Message, ask
from omni.data.sources import ManifestError, short

_SAYINGS = ("messages", "conversations", "question", "caption", "text")
_PICTURES = re.compile(r"image|images|(.+_)?file_names?")
_PLACEHOLDER = re.compile(r"\n?<image>\n?")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)


class _TextBlock(BaseModel):
    type: Literal["text"]
    text: str


class _ImageBlock(BaseModel):
    """A block that names its picture, or takes the next one in the row's list."""

    type: Literal["image"]
    picture: str | None = Field(default=None, min_length=1, validation_alias=AliasChoices("path", "image", "url"))

    @model_validator(mode="before")
    @classmethod
    def _named_once(cls, block: Any) -> Any:
        if not isinstance(block, dict):
            return block
        given = {key: value for key, value in block.items() if value is not None}  # Arrow gives every block every field
        if len(names := [key for key in ("path", "image", "url") if key in given]) > 1:
            raise ValueError(f"a block names one picture, not one as {' and another as '.join(map(repr, names))}")
        return given


_Block = Annotated[_TextBlock | _ImageBlock, Field(discriminator="type")]


class _Turn(BaseModel):
    role: str = Field(validation_alias=AliasChoices("role", "from"))
    content: list[_Block] = Field(validation_alias=AliasChoices("content", "value"))

    @model_validator(mode="before")
    @classmethod
    def _pictures_elsewhere(cls, turn: Any) -> Any:
        if isinstance(turn, dict) and (names := [key for key in turn if key == "path" or _PICTURES.fullmatch(key)]):
            raise ValueError(
                f"a picture is named in a block of the content or beside the chat, not as {names[0]!r} here"
            )
        return turn

    @field_validator("role")
    @classmethod
    def _of_llava(cls, role: str) -> str:
        return {"human": "user", "gpt": "assistant"}.get(role, role)

    @field_validator("content", mode="before")
    @classmethod
    def _of_text(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @field_validator("content")
    @classmethod
    def _apart(cls, content: list[_Block]) -> list[_Block]:
        """Split texts at placeholders, which become blocks."""
        blocks: list[_Block] = []
        for block in content:
            if isinstance(block, _ImageBlock):
                blocks.append(block)
                continue
            block.text.encode()  # a lone surrogate, such as "\ud83d", raises here and not in a tokenizer
            for place, text in enumerate(_PLACEHOLDER.split(block.text)):
                blocks += [_ImageBlock(type="image")] if place else []
                blocks += [_TextBlock(type="text", text=text)] if text else []
        return blocks


_TURNS = TypeAdapter(list[_Turn])


def parse_row(
    fields: dict[str, Any], prompt: str, promised: bool, answers: bool
) -> tuple[list[str], list[Message], str | None]:
    """The names of a row's pictures, its conversation, and its kind.

    Args:
        fields: the names and values of the row.
        prompt: the question for a row that has only an answer.
        promised: whether the layout requires a picture in every row, chats included.
        answers: whether a row needs an answer.

    Raises:
        ManifestError: the row is not valid. The message does not name its place.
    """
    given = {key: value for key, value in fields.items() if value is not None}
    sayings = [key for key in _SAYINGS if key in given]
    if not answers and not sayings and (named := _named_pictures(given)):
        return _files(named), [], None
    if not sayings and any(key in fields for key in _SAYINGS):
        raise ManifestError("the answer is null, expected text; write one or remove the row.", "no answer")
    if len(sayings) != 1:
        raise ManifestError(
            "expected exactly one of `messages`, `conversations`, `question` and `answer`, `caption`, `text`, beside "
            f"`image`, `images` or `file_name`, found the fields {', '.join(map(repr, given)) or 'of an empty object'}."
        )
    kind, saying = given.get("kind", ""), sayings[0]
    if "answer" in given and saying in ("caption", "text"):
        raise ManifestError(
            f"expected `answer` beside `question`, found it beside `{saying}`, which is an answer itself; rename or remove "
            "one of the two."
        )
    if not isinstance(kind, str):
        raise ManifestError(f"`kind` should be text, found {short(kind)}.")
    listed = _named_pictures(given)
    chat = saying in ("messages", "conversations")
    turns = _turns(given[saying] if chat else _ask(given, saying, prompt, len(listed)), saying)
    pictures, conversation = _converse(turns, listed)
    if not pictures and (promised or not chat):
        raise ManifestError(
            f"expected a picture beside `{saying}`, found none; name it as `file_name` or `image`, or remove the row.",
            "no picture",
        )
    return _files(pictures), conversation, kind or None


def _files(pictures: list[str]) -> list[str]:
    for name in pictures:
        if _ADDRESS.match(name):
            raise ManifestError(f"{short(name)} is an address, expected a file; download the picture first.")
    return pictures


def _ask(given: dict[str, Any], saying: str, prompt: str, pictures: int) -> list[Message]:
    """The chat of a row with a single question. Its pictures come first, unless the question has placeholders."""
    question, answering = (given[saying], "answer") if saying == "question" else (prompt, saying)
    answer = given.get(answering, "")
    for key, text in ((saying, question), (answering, answer)):
        if not isinstance(text, str):
            raise ManifestError(f"`{key}` should be text, found {short(text)}.")
    if is_blank(answer):
        raise ManifestError(f"`{answering}` is empty, expected text; write it or remove the row.", "no answer")
    if saying == "question" and is_blank(question):
        raise ManifestError("`question` is empty, expected text; write it or remove the row.")
    return ask(question, answer, [] if _PLACEHOLDER.search(question) else ["image"] * pictures)


def _named_pictures(given: dict[str, Any]) -> list[str]:
    keys = [key for key in given if _PICTURES.fullmatch(key)]
    if len(keys) > 1 and {"image", "images"} & set(keys):
        raise ManifestError(
            f"pictures should be named once, found {' and '.join(map(repr, keys))}; remove all but one."
        )
    values = [given[key] for key in keys if given[key] != ""]  # an empty cell of a table names no picture
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    for name in names:
        if not isinstance(name, str) or not name:
            raise ManifestError(f"{keys[0]!r} should be a path or a list of paths, found {short(name)}.")
    return names


def _turns(messages: Any, field: str) -> list[_Turn]:
    try:
        return _TURNS.validate_python(messages)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        place = ".".join(map(str, (field, *found["loc"]))) if field in ("messages", "conversations") else field
        raise ManifestError(f"{place}: {found['msg']}, found {short(found['input'])}.") from error


def _converse(turns: list[_Turn], listed: list[str]) -> tuple[list[str], list[Message]]:
    """The pictures in the order of their blocks, and the chat as the processor takes it.

    Args:
        turns: the messages. An image block names its picture, or takes the next of `listed`.
        listed: the pictures that the row names outside of its chat.
    """
    marks = sum(isinstance(block, _ImageBlock) and block.picture is None for turn in turns for block in turn.content)
    if marks != len(listed):
        raise ManifestError(
            f"expected a placeholder <image> for each of {len(listed)} pictures, found {marks}; write one for each."
        )
    waiting = iter(listed)
    pictures: list[str] = []
    conversation: list[Message] = []
    for place, turn in enumerate(turns):
        speaker = ("user", "assistant")[place % 2]
        if turn.role != speaker:
            remedy = {"system": "put its text into the first question"}.get(turn.role, "let the two alternate")
            raise ManifestError(
                f"message {place + 1} should be the {speaker}'s, found the role {turn.role!r}; {remedy}."
            )
        texts = [block.text for block in turn.content if isinstance(block, _TextBlock)]
        shown = [block.picture or next(waiting) for block in turn.content if isinstance(block, _ImageBlock)]
        if speaker == "assistant" and is_blank("".join(texts)):
            raise ManifestError(f"message {place + 1} is an empty answer, expected text; write it.", "no answer")
        if speaker == "assistant" and shown:
            raise ManifestError(f"message {place + 1} is an answer with a picture, expected text alone; take it out.")
        if not shown and is_blank("".join(texts)):
            raise ManifestError(f"message {place + 1} is empty, expected a question or a picture; write one.")
        pictures += shown
        content = [block.model_dump(include={"type", "text"}) for block in turn.content]
        conversation.append({"role": turn.role, "content": content})
    if len(turns) % 2 or not turns:
        raise ManifestError(
            f"the last of {len(turns)} messages should be the assistant's; add the answer.", "no answer"
        )
    return pictures, conversation


def is_blank(text: str) -> bool:
    """Whether a text has no visible character: only spaces, control and format characters."""
    return all(character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text)
