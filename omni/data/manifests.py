"""Pictures of your own: a folder, or a file that names them, as conversations to learn from or to be asked about.

    manifest = Manifest.read("birds")                  # or birds.jsonl, birds.json, birds.csv
    manifest[0].conversation                           # what is asked and answered, pictures as placeholders
    ManifestConversations(manifest)[0].items["image"]  # the pictures themselves, opened only now

What is found at the path tells the layouts apart:

| found                                   | rows                                                                       |
|-----------------------------------------|----------------------------------------------------------------------------|
| folder with metadata.jsonl or .csv      | the "imagefolder" of `datasets`: `file_name` and a text, a row each        |
| folder of folders of pictures           | one per file, sorted by path (2 before 10); the folder's name is the answer|
| .jsonl, or a .json of the same content  | an object per line                                                         |
| .json                                   | a list of objects, such as `{"image": "a.png", "caption": "a wren"}`       |
| .csv                                    | columns of the same names                                                  |

A row names its pictures as `image`, `images`, `file_name`, `file_names` or `*_file_name(s)`, and says one of:

* `caption` or `text`: the answer to the manifest's `prompt`;
* `question` and `answer`;
* `messages` (`role`: user, assistant; `content`: a string or blocks) or LLaVA's `conversations` (`from`, `value`). Each
  `{"type": "image"}` and each `<image>` in a user's text takes the next picture of the row; a line break beside
  `<image>` belongs to it. Blocks may name their picture themselves (`path` or `image`). Chats need no pictures; `omni
  check-data` notes those that have none.

`kind`, if there is one, groups the scores of an evaluation; other fields are yours. Relative paths start at the
manifest's folder, or at `root`. A row is parsed when it is asked for, so a mistake in it is raised then, with its place;
a manifest of which nothing at the start can be read, or no picture found, is refused at once.
"""

import csv
import hashlib
import io
import json
import os
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, overload

from pydantic import AliasChoices, BaseModel, Field, TypeAdapter, ValidationError, field_validator, model_validator

from omni.data.conversations import Example, Message, ask
from omni.vision.pictures import PictureError, read_picture

PROMPT = "Describe the picture."
METADATA = ("metadata.jsonl", "metadata.csv")
SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
"""Names of pictures, where names have to do: nothing is opened to find out."""

FIRST_ROWS = 100
"""So many rows are looked at before a manifest is refused as a whole."""

RowProblem = Literal["malformed row", "no picture", "no answer"]


class ManifestError(ValueError):
    """A manifest or a row of it that cannot be used; the message is one sentence: where, what is wrong, what to do."""

    def __init__(self, message: str, kind: RowProblem = "malformed row") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Row:
    """One example, its pictures still closed.

    Attributes:
        source: where it stands, for messages: file and line or entry, from 1.
        pictures: their files, in the order of the image blocks.
        conversation: user and assistant in turn, `content` a list of `{"type": "image"}` and `{"type": "text", "text"}`.
        kind: what an evaluation counts it under.
    """

    source: str
    pictures: tuple[Path, ...]
    conversation: list[Message]
    kind: str | None


class Manifest(Sequence[Row]):
    """The rows of a data set; see the module for what can be read. Cheap to keep, to pickle and to share with workers.

    Attributes:
        path: what was read.
        root: where relative paths start.
        folder: the folder whose files its rows are about (metadata.jsonl, metadata.csv, classes), if it is of that layout.
        by_class: whether rows are the files of folders named by their answer.
    """

    def __init__(self, path: Path, root: Path | None, prompt: str, answers: bool = True) -> None:
        self.path, self.prompt, self.answers = path, prompt, answers
        self._rows = _open(path)
        self.folder = path if path.is_dir() else None
        self.by_class = isinstance(self._rows, _Classes)
        self.root = root or (path if path.is_dir() else path.parent)

    @classmethod
    def read(
        cls, path: str | Path, root: str | Path | None = None, prompt: str = PROMPT, answers: bool = True
    ) -> "Manifest":
        """Find the rows of a data set, and look at the first ones.

        Args:
            path: a folder, or a .jsonl, .json or .csv file.
            root: where relative paths start; by default the manifest's folder.
            prompt: the question of rows that have only an answer: captions, classes.
            answers: without them rows may name pictures and say nothing; their conversation is empty.

        Raises:
            ManifestError: nothing there, another layout, no rows, none of the first rows readable, none of their pictures
                found (a wrong `root`), or an empty `prompt`.
        """
        if _blank(prompt):
            raise ManifestError(
                "The prompt is empty, expected a question for rows that have only an answer; write one."
            )
        if root is not None and not Path(root).is_dir():
            raise ManifestError(
                f"The root {str(root)!r} is no folder, expected the one where the pictures are; correct it."
            )
        manifest = cls(Path(path), None if root is None else Path(root), prompt, answers)
        if root is not None and manifest.by_class:
            raise ManifestError(f"{str(path)!r} is itself the folder of its pictures and needs no root; leave it out.")
        if not len(manifest):
            raise ManifestError(f"{str(path)!r} has 0 rows, expected at least one; check that it is the right file.")
        manifest._look_at_the_start()
        return manifest

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """Parse a row; raises `ManifestError` with its place."""
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        index = range(len(self))[index]
        source = self.source(index)
        try:
            fields, promised = self._rows.fields(index), self.folder is not None
            names, conversation, kind = _parse(fields, self.prompt, promised, self.answers)
        except ManifestError as error:
            raise ManifestError(f"{source}: {error}", error.kind) from error
        return Row(source, tuple(self.root / name for name in names), conversation, kind)

    def source(self, index: int) -> str:
        """Where a row stands, also one that cannot be parsed."""
        return self._rows.source(index)

    def digest(self) -> str:
        """SHA-256 over what all rows say and over the bytes of their pictures, wherever the files are.

        Raises:
            ManifestError: a row cannot be parsed, or a picture of it cannot be read.
        """

        @lru_cache(maxsize=1024)  # rows that share a picture stand together
        def of_file(path: Path) -> str:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        total = hashlib.sha256()
        for row in self:
            try:
                content = [row.kind, row.conversation, [of_file(path) for path in row.pictures]]
            except OSError as error:
                raise ManifestError(
                    f"{row.source}: {str(error.filename)!r} cannot be read ({error.strerror}); check the path."
                ) from error
            total.update(json.dumps(content, sort_keys=True).encode() + b"\n")
        return total.hexdigest()

    def rows_digest(self) -> str:
        """SHA-256 over what is written in its file, or over the names of the files in its classes; no picture is opened."""
        return self._rows.digest()

    def _look_at_the_start(self) -> None:
        """Refuse what is understood nowhere; a single bad row among good ones is left to whoever asks for it."""
        rows: list[Row] = []
        errors: list[ManifestError] = []
        first = min(len(self), FIRST_ROWS)
        for index in range(first):
            try:
                row = self[index]
            except ManifestError as error:
                errors.append(error)
                continue
            if any(map(os.path.exists, row.pictures)):
                return
            rows.append(row)
        lost = next((row for row in rows if row.pictures), None)
        if lost is not None:
            raise ManifestError(
                f"{lost.source}: the picture {str(lost.pictures[0])!r} does not exist, nor any other of the first {first} "
                f"rows; relative paths start in the folder {str(self.root)!r}, name another one as root."
            )
        if not rows:
            raise ManifestError(f"None of the first {first} rows can be read; {errors[0]}", errors[0].kind)


class ManifestConversations:
    """The rows of a manifest with their pictures, which are opened when an example is asked for.

    Args:
        manifest: the rows.
        open_picture: makes an item of a picture's path; a `TokenCache` has another way to do it.

    Raises:
        ManifestError, PictureError: on access, a row or a picture of it that cannot be read; the row is named in front.
    """

    def __init__(self, manifest: Manifest, open_picture: Callable[[Path], Any] = read_picture) -> None:
        self.manifest, self.open_picture = manifest, open_picture

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Example:
        row = self.manifest[index]
        try:
            pictures = [self.open_picture(path) for path in row.pictures]
        except PictureError as error:
            raise type(error)(f"{row.source}: {error}") from error
        return Example({"image": pictures} if pictures else {}, [row.conversation], row.source)


# --- Rows on disk -----------------------------------------------------------------------------------------------------


_EXPECTED = "a folder of pictures or a .jsonl, .json or .csv file"


def _open(path: Path) -> "_File | _Classes":
    try:
        if path.is_dir():
            found = [path / name for name in METADATA if (path / name).is_file()]
            if len(found) > 1:
                raise ManifestError(
                    f"{str(path)!r} holds {' and '.join(METADATA)}, expected one of them; remove the other."
                )
            return _File(found[0]) if found else _Classes(path)
        if path.is_file():
            return _File(path)
    except OSError as error:
        raise ManifestError(
            f"{str(error.filename)!r} cannot be read ({error.strerror}); check its permissions."
        ) from error
    where = "" if path.is_absolute() else f" in {os.getcwd()!r}"
    raise ManifestError(f"{str(path)!r} does not exist{where}, expected {_EXPECTED}; check the path.")


class _File:
    """Where each row of a file begins and ends, in bytes: 24 bytes of memory, however long the row is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts, self.ends, self.numbers = array("Q"), array("Q"), array("Q")
        self.unit = "line"
        self.columns: list[str] = []
        with path.open("rb") as file:
            self.changed = _changed(file)
            bom = file.read(3) == b"\xef\xbb\xbf"
            file.seek(3 if bom else 0)
            suffix = path.suffix.lower()
            if suffix == ".csv":
                self._find_records(file)
            elif suffix == ".jsonl" or (suffix == ".json" and not _is_list(file)):
                self._find_lines(file)
            elif suffix == ".json":
                self._find_entries(file)
            else:
                raise ManifestError(f"{str(path)!r} is of an unknown kind, expected {_EXPECTED}; convert it to one.")

    def __len__(self) -> int:
        return len(self.starts)

    def source(self, index: int) -> str:
        return f"{self.path}, {self.unit} {self.numbers[index]}"

    def digest(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def fields(self, index: int) -> dict[str, Any]:
        """The names and values of a row."""
        raw = self._bytes(index)
        try:
            text = raw.decode()
            if self.columns:
                cells = next(csv.reader(io.StringIO(text, newline=""), strict=True))
                if len(cells) != len(self.columns):
                    raise ValueError(f"there are {len(cells)}")
                return dict(zip(self.columns, cells, strict=True))
            fields = json.loads(text.rstrip(), object_pairs_hook=_different_names)
        except ManifestError:
            raise
        except UnicodeDecodeError as error:
            raise ManifestError(
                f"expected text in UTF-8, found {raw[error.start :][:4]!r}; convert the file."
            ) from error
        except json.JSONDecodeError as error:
            raise ManifestError(
                f"expected an object of JSON, found {_short(text)} ({error.msg} in column {error.colno}); correct it."
            ) from error
        except (ValueError, RecursionError, csv.Error) as error:
            expected = f"{len(self.columns)} cells ({', '.join(self.columns)})" if self.columns else "an object of JSON"
            raise ManifestError(f"expected {expected}, found {_short(text)} ({error}); correct it.") from error
        if not isinstance(fields, dict):
            raise ManifestError(f"expected an object of JSON, found {_short(fields)}; give its values names.")
        return fields

    def _bytes(self, index: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                if _changed(file) == self.changed:
                    file.seek(self.starts[index])
                    return file.read(self.ends[index] - self.starts[index])
        except OSError as error:
            raise ManifestError(f"the file cannot be read any more ({error.strerror}); start again.") from error
        raise ManifestError("the file was changed after it was first read; start again.")

    def _add(self, start: int, end: int, number: int) -> None:
        self.starts.append(start)
        self.ends.append(end)
        self.numbers.append(number)

    def _find_lines(self, file: io.BufferedReader) -> None:
        start = file.tell()
        for number, line in enumerate(file, start=1):
            if line.strip():  # a blank line is no row
                self._add(start, start + len(line), number)
            start += len(line)

    # Below, each byte is read as one character (Latin-1), which makes offsets of characters those of bytes. What has a
    # meaning in CSV and JSON is ASCII, and no byte of another character in UTF-8 is.

    def _find_records(self, file: io.BufferedReader) -> None:
        start = end = file.tell()

        def lines() -> Iterator[str]:
            nonlocal end
            for line in file:
                end += len(line)
                yield line.decode("latin-1")

        reader, number = csv.reader(lines()), 1
        try:
            for record in reader:
                if record:
                    self._add(start, end, number)
                start, number = end, reader.line_num + 1
        except csv.Error as error:
            raise ManifestError(
                f"{self.path}, line {number}: expected cells of CSV, found a mistake ({error}); put cells of several lines "
                "into double quotes."
            ) from error
        if len(self):
            start, end, number = (places.pop(0) for places in (self.starts, self.ends, self.numbers))
            file.seek(start)
            head = file.read(end - start).decode(errors="replace")
            self.columns = next(csv.reader(io.StringIO(head, newline="")))
            if len(self.columns) == 1 and (other := re.search(r"[;\t|]", head)):
                raise ManifestError(
                    f"{self.path}, line {number}: expected commas between the names of columns, found {other[0]!r}; save "
                    "the table with commas."
                )
            if twice := sorted({name for name in self.columns if self.columns.count(name) > 1}):
                raise ManifestError(
                    f"{self.path}, line {number}: columns should have different names, found {', '.join(map(repr, twice))} "
                    "more than once; rename them."
                )

    def _find_entries(self, file: io.BufferedReader) -> None:
        self.unit = "entry"
        before = file.tell()
        text = file.read().decode("latin-1")
        space, parse = re.compile(r"[ \t\r\n]*"), json.JSONDecoder().raw_decode

        def skip(place: int) -> int:
            found = space.match(text, place)
            assert found is not None
            return found.end()

        try:
            place = skip(skip(0) + 1)
            while not text.startswith("]", place):
                _, end = parse(text, place)
                self._add(before + place, before + end, len(self) + 1)
                place = skip(end)
                if text.startswith(",", place):
                    place = skip(place + 1)
                elif not text.startswith("]", place):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
            if skip(place + 1) != len(text):
                raise json.JSONDecodeError("Extra data", text, skip(place + 1))
        except json.JSONDecodeError as error:
            raise ManifestError(
                f"{self.path}, line {error.lineno}: expected a list of objects in JSON, found a mistake in column "
                f"{error.colno} ({error.msg}); correct it."
            ) from error


def _different_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of which `json` itself would keep the last of several values of one name."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = sorted({name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1})
        raise ManifestError(f"{', '.join(map(repr, twice))} stands more than once in one object; keep one of them.")
    return fields


def _is_list(file: io.BufferedReader) -> bool:
    """Whether the text that begins here is one JSON list; several programs write lines of objects as .json."""
    start = file.tell()
    first = next((line.lstrip()[:1] for line in file if line.strip()), b"")
    file.seek(start)
    return first == b"["


def _changed(file: io.BufferedReader) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


class _Classes:
    """The files in the folders of a folder, as one text and where each name in it begins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        entries = _entries(path)
        folders = [entry for entry in entries if entry.is_dir()]
        inside = {folder: _entries(folder) for folder in folders}
        described = [folder for folder in folders if any((folder / name).is_file() for name in METADATA)]
        nested = [entry for folder in folders for entry in inside[folder] if entry.is_dir()]
        whole = folders and all(any(entry.is_dir() for entry in inside[folder]) for folder in folders)
        if described or whole or (folders and all(folder.name.lower() in _PARTS for folder in folders)):
            raise ManifestError(
                f"{str(path)!r} holds the parts of a data set, {_listed(described or folders)}; name one of these folders."
            )
        if nested:
            raise ManifestError(
                f"{str(nested[0].parent)!r} should hold the pictures of one class, found the folder {nested[0].name!r} in "
                "it; move what it holds up, or out."
            )
        if files := [entry for entry in entries if entry.suffix.lower() in (".jsonl", ".json", ".csv")]:
            raise ManifestError(
                f"{str(path)!r} holds {_listed(files)}, expected {' or '.join(METADATA)}, or folders alone; name the file "
                "that describes the pictures, or move it elsewhere if none does."
            )
        if len(folders) < 2 or any(entry.suffix.lower() in SUFFIXES for entry in entries):
            raise ManifestError(
                f"{str(path)!r} should hold {' or '.join(METADATA)}, or a folder of pictures for each of several classes, "
                f"found {_listed(entries)}; write {METADATA[0]}, an object of JSON in a line for each picture."
            )
        names = sorted((f"{folder.name}/{file.name}" for folder in folders for file in inside[folder]), key=_natural)
        blobs = [os.fsencode(name) for name in names]
        self.names, self.starts = b"".join(blobs), array("Q", [0])
        for blob in blobs:
            self.starts.append(self.starts[-1] + len(blob))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def _name(self, index: int) -> str:
        return os.fsdecode(self.names[self.starts[index] : self.starts[index + 1]])

    def source(self, index: int) -> str:
        return str(self.path / self._name(index))

    def digest(self) -> str:
        return hashlib.sha256(self.names + self.starts.tobytes()).hexdigest()

    def fields(self, index: int) -> dict[str, Any]:
        name = self._name(index)
        return {"file_name": name, "text": name.split("/")[0]}


_PARTS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"})
"""Folders of these names alone are parts of a data set rather than classes."""


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, but for what systems leave behind: hidden files, caches of thumbnails."""
    left = ("thumbs.db", "desktop.ini")
    return sorted(entry for entry in folder.iterdir() if not (entry.name.startswith(".") or entry.name.lower() in left))


def _listed(paths: Sequence[Path]) -> str:
    names = [repr(path.name) for path in paths[:3]]
    return ", ".join(names) + (f" and {len(paths) - 3:,} more" if len(paths) > 3 else "") if names else "nothing"


def _natural(name: str) -> list[list[int | str]]:
    """Sorts 2 before 10, and equally on every system."""
    return [[int(p) if p.isdigit() else p for p in re.split(r"([0-9]+)", part)] for part in name.split("/")]


# --- From fields to a conversation ------------------------------------------------------------------------------------

_SAYINGS = ("messages", "conversations", "question", "caption", "text")
_PICTURES = re.compile(r"image|images|(.+_)?file_names?")
_PLACEHOLDER = re.compile(r"\n?<image>\n?")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)


class _TextBlock(BaseModel):
    type: Literal["text"]
    text: str


class _ImageBlock(BaseModel):
    """Names its picture, or takes the next one that the row lists."""

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
        """Placeholders within text become blocks."""
        blocks: list[_Block] = []
        for block in content:
            if isinstance(block, _ImageBlock):
                blocks.append(block)
                continue
            block.text.encode()  # half of a character ("\ud83d" alone) is an error here, not in a tokenizer
            for place, text in enumerate(_PLACEHOLDER.split(block.text)):
                blocks += [_ImageBlock(type="image")] if place else []
                blocks += [_TextBlock(type="text", text=text)] if text else []
        return blocks


_TURNS = TypeAdapter(list[_Turn])


def _parse(
    fields: dict[str, Any], prompt: str, promised: bool, answers: bool
) -> tuple[list[str], list[Message], str | None]:
    """The names of a row's pictures, its conversation, and its kind.

    Args:
        fields: the row as it stands in the file.
        promised: whether this layout gives every row a picture, chats included.
        answers: whether a row has to say something.
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
        raise ManifestError(f"`kind` should be text, found {_short(kind)}.")
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
            raise ManifestError(f"{_short(name)} is an address, expected a file; download the picture first.")
    return pictures


def _ask(given: dict[str, Any], saying: str, prompt: str, pictures: int) -> list[Message]:
    """The chat of a row that has but one question; its pictures come first, unless it says where."""
    question, answering = (given[saying], "answer") if saying == "question" else (prompt, saying)
    answer = given.get(answering, "")
    for key, text in ((saying, question), (answering, answer)):
        if not isinstance(text, str):
            raise ManifestError(f"`{key}` should be text, found {_short(text)}.")
    if _blank(answer):
        raise ManifestError(f"`{answering}` is empty, expected text; write it or remove the row.", "no answer")
    if saying == "question" and _blank(question):
        raise ManifestError("`question` is empty, expected text; write it or remove the row.")
    return ask(question, answer, 0 if _PLACEHOLDER.search(question) else pictures)


def _named_pictures(given: dict[str, Any]) -> list[str]:
    keys = [key for key in given if _PICTURES.fullmatch(key)]
    if len(keys) > 1 and {"image", "images"} & set(keys):
        raise ManifestError(
            f"pictures should be named once, found {' and '.join(map(repr, keys))}; remove all but one."
        )
    values = [given[key] for key in keys if given[key] != ""]  # an empty cell of a table names nothing
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    for name in names:
        if not isinstance(name, str) or not name:
            raise ManifestError(f"{keys[0]!r} should be a path or a list of paths, found {_short(name)}.")
    return names


def _turns(messages: Any, field: str) -> list[_Turn]:
    try:
        return _TURNS.validate_python(messages)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        place = ".".join(map(str, (field, *found["loc"]))) if field in ("messages", "conversations") else field
        raise ManifestError(f"{place}: {found['msg']}, found {_short(found['input'])}.") from error


def _converse(turns: list[_Turn], listed: list[str]) -> tuple[list[str], list[Message]]:
    """The pictures in the order of their blocks, and the chat as the processor takes it.

    Args:
        turns: their blocks name a picture each, or take one of `listed`, those that the row names apart from its chat.
    """
    marks = sum(isinstance(block, _ImageBlock) and block.picture is None for turn in turns for block in turn.content)
    if marks != len(listed):
        raise ManifestError(
            f"expected a placeholder <image> for each of {len(listed)} pictures, found {marks}; write as many as there are "
            "pictures."
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
        if speaker == "assistant" and _blank("".join(texts)):
            raise ManifestError(f"message {place + 1} is an empty answer, expected text; write it.", "no answer")
        if speaker == "assistant" and shown:
            raise ManifestError(f"message {place + 1} is an answer with a picture, expected text alone; take it out.")
        if not shown and _blank("".join(texts)):
            raise ManifestError(f"message {place + 1} is empty, expected a question or a picture; write one.")
        pictures += shown
        content = [block.model_dump(include={"type", "text"}) for block in turn.content]
        conversation.append({"role": turn.role, "content": content})
    if len(turns) % 2 or not turns:
        raise ManifestError(
            f"the last of {len(turns)} messages should be the assistant's; add the answer.", "no answer"
        )
    return pictures, conversation


def _blank(text: str) -> bool:
    """Whether nothing of it would be seen: spaces, and characters that control others."""
    return all(character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
