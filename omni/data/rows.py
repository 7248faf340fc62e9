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

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from omni.data.conversations import Message, ask
from omni.data.names import FILES, Names
from omni.data.sources import SAYINGS, Held, ManifestError, is_address, short
from omni.data.turns import ItemBlock, TextBlock, Turn, read_file, read_turns
from omni.registry import get_modality, open_item


class Named(NamedTuple):
    """A file that a row names or holds, and its modality."""

    modality: str
    name: str | Held


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
    turns = read_turns(given[saying] if chat else _ask(given, saying, prompt, listed, names), saying, names)
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
                name = read_file(each)
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
    values = [value for key, value in fields.items() if FILES.fullmatch(key)]
    found = list[str | Held]()
    for each in (each for value in values for each in (value if isinstance(value, list) else [value])):
        with suppress(ValueError):  # raised when the row is asked for
            found.append(read_file(each))
    return found


def _converse(turns: list[Turn], listed: Sequence[Named]) -> tuple[list[Named], list[Message]]:
    """The files in the order of their blocks, and the chat as the processor takes it.

    Args:
        turns: the messages. A block of an item names its file, or takes the next of its modality in `listed`.
        listed: the files that the row names outside of its chat.
    """
    blocks = [block for turn in turns for block in turn.content if isinstance(block, ItemBlock)]
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
        texts = [block.text for block in turn.content if isinstance(block, TextBlock)]
        shown = [block for block in turn.content if isinstance(block, ItemBlock)]
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
