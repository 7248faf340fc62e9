"""Your own data set, a folder or a file that names pictures, sounds and other items, as conversations for training or
evaluation.

    manifest = Manifest.read("birds")                  # or birds.jsonl, birds.json, birds.csv
    manifest[0].conversation                           # questions and answers, with placeholders for items
    ManifestConversations(manifest)[0].items["image"]  # the pictures, which are opened on access

`sources` and `shards` list the layouts, and `rows` the fields of a row. Relative paths start at the manifest's folder, or at
`root`. A row is parsed on access, and raises its error then. A manifest is refused at once if none of its first rows can be
read, or none of their files exists.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, overload
from urllib.parse import urlsplit

from omni.data.addresses import fetch, local, place_of
from omni.data.conversations import Example, Message
from omni.data.layouts import open_shards, open_source
from omni.data.names import Names
from omni.data.rows import is_blank, names_of_files, parse_row, words_of
from omni.data.sources import Held, ManifestError, is_address
from omni.items import read_item
from omni.modality import ItemError
from omni.registry import get_modality, open_item

FIRST_ROWS = 100
"""Number of rows that are tried before a manifest is refused as a whole."""


class File(NamedTuple):
    """A file that becomes an item of this modality.

    Attributes:
        modality: its name.
        path: where it is; of a file that the row holds, what the row calls it.
        data: the bytes of a file that the row holds.
        address: from where it is fetched to `path`, if it is not there.
        allow_private: whether that may be in a private network.
    """

    modality: str
    path: Path
    data: bytes | None = None
    address: str | None = None
    allow_private: bool = False

    @property
    def source(self) -> Path | bytes:
        """The file in a form that `Modality.open` takes.

        Raises:
            ItemError: its address cannot be read.
        """
        if self.address is not None:
            fetch(self.address, self.path, allow_private=self.allow_private)
        return self.path if self.data is None else self.data

    def digest(self) -> str:
        """SHA-256 of its bytes.

        Raises:
            OSError, ItemError: it cannot be read.
        """
        source = self.source
        if isinstance(source, bytes):
            return hashlib.sha256(source).hexdigest()
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __str__(self) -> str:
        held = f"the {get_modality(self.modality).noun} in the row"
        return self.address or (repr(str(self.path)) if self.path.name else held)


@dataclass(frozen=True)
class Row:
    """One example, with its files not opened.

    Attributes:
        source: its place, for messages: file and line or entry, counted from 1.
        files: the files of its items, in the order of their blocks.
        conversation: messages of user and assistant in turn; `content` is a list of `{"type": "text", "text"}` and, for
            each item, of its modality, `{"type": "image"}`.
        kind: the kind of question under which an evaluation scores it.
        words: what each item shows or says, in the order of the files; empty if the row does not tell.
    """

    source: str
    files: tuple[File, ...]
    conversation: list[Message]
    kind: str | None
    words: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The first answer: the caption, the transcript or the class of the items. The row has one."""
        said = next(turn for turn in self.conversation if turn["role"] == "assistant")
        return "".join(block["text"] for block in said["content"])

    def of(self, modality: str) -> list[Path]:
        """The files of one modality, in the order of their blocks."""
        return [file.path for file in self.files if file.modality == modality]

    def open(self, openers: Mapping[str, Callable[[Path | bytes], Any]] | None = None) -> dict[str, list[Any]]:
        """The items by modality, in the order of their blocks.

        Args:
            openers: for a modality what makes an item of a path, or of the bytes of a file. By default the modality does.

        Raises:
            ItemError: a file cannot be read. The message begins with the row.
        """
        items: dict[str, list[Any]] = {}
        try:
            for file in self.files:
                opened = (openers or {}).get(file.modality) or open_item(file.modality)
                items.setdefault(file.modality, []).append(opened(file.source))
        except ItemError as error:
            raise type(error)(f"{self.source}: {error}") from error
        return items


class Manifest(Sequence[Row]):
    """The rows of a data set. See the module for its layouts.

    Attributes:
        path: the file or folder.
        root: the folder that relative paths start from.
        folder: the folder that holds all files, in layouts that have one (metadata.jsonl, metadata.csv, classes).
        by_class: whether each row is a file in a folder that is named by its answer.
        addresses: the folder for what is downloaded; None if addresses are refused.
        allow_private: whether addresses may be in private networks.
        blocks: how many rows are read together, see `Source`.
    """

    def __init__(
        self,
        path: Path,
        root: Path | None,
        prompt: str | None,
        answers: bool = True,
        addresses: Path | None = None,
        allow_private: bool = False,
    ) -> None:
        self.path, self.prompt, self.answers = path, prompt, answers
        self.addresses, self.allow_private = addresses, allow_private
        self.names = Names.known()
        shards = open_shards(path)
        self._rows = open_source(path) if shards is None else shards
        self.blocks = self._rows.blocks
        self.folder = path if shards is None and path.is_dir() else None
        self.by_class = self._rows.by_class
        self.root = root or (path if path.is_dir() else path.parent)

    @classmethod
    def read(
        cls,
        path: str | Path,
        root: str | Path | None = None,
        prompt: str | None = None,
        answers: bool = True,
        addresses: str | Path | None = None,
        allow_private: bool = False,
    ) -> "Manifest":
        """Open a data set, and try its first rows.

        Args:
            path: a folder, a .jsonl, .json, .csv, .parquet or .tar file, or a pattern of the last two. With `addresses` also
                the address of a file, or several that a pattern matches.
            root: the folder that relative paths start from. By default the manifest's folder.
            prompt: the question for rows that have only a caption or a class. By default "Describe the picture.",
                or the same about other items.
            answers: whether rows need an answer. If not, a row may name only files; its conversation is then empty.
            addresses: a folder that keeps the files fetched from addresses. Without it addresses are refused.
            allow_private: fetch from this machine and private networks, too. Others may have written the rows.

        Raises:
            ManifestError: there is nothing at `path`, or another layout, or no rows; none of the first rows can be read;
                none of their files exists (a wrong `root`); or `prompt` is empty.
        """
        if prompt is not None and is_blank(prompt):
            raise ManifestError(
                "The prompt is empty, expected a question for rows that have only a caption; write one."
            )
        if root is not None and not Path(root).is_dir():
            raise ManifestError(
                f"The root {str(root)!r} is no folder, expected the one that holds the files; correct it."
            )
        kept = None if addresses is None else Path(addresses)
        place = place_of(path, kept, allow_private)
        manifest = cls(place, None if root is None else Path(root), prompt, answers, kept, allow_private)
        if root is not None and manifest.by_class:
            raise ManifestError(f"{str(path)!r} is itself the folder of its files; leave out the root.")
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
        """Parse a row. Raises `ManifestError` with its place."""
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        index = range(len(self))[index]
        source = self.source(index)
        try:
            fields, promised = self._rows.fields(index), self.folder is not None
            named, conversation, kind = parse_row(
                fields, self.prompt, promised, self.answers, self.names, self._modality_of, self.addresses is not None
            )
            words = words_of(fields, len(named))
        except ManifestError as error:
            raise ManifestError(f"{source}: {error}", error.kind) from error
        files = tuple(self._file(modality, name) for modality, name in named)
        return Row(source, files, conversation, kind, words)

    def _file(self, modality: str, name: str | Held) -> File:
        if isinstance(name, Held):
            return File(modality, Path(name.name), name.data)
        if self.addresses is not None and is_address(name):
            return File(modality, local(name, self.addresses), None, name, self.allow_private)
        return File(modality, self.root / name)

    def source(self, index: int) -> str:
        """The place of a row, for messages. The row need not be valid."""
        return self._rows.place(index)

    def digest(self) -> str:
        """SHA-256 of the contents of all rows and of the bytes of their files. It does not depend on paths.

        Raises:
            ManifestError: a row cannot be parsed, or a file of it cannot be read.
        """

        @lru_cache(maxsize=1024)  # rows that share a file are often neighbours
        def of_path(file: File) -> str:
            return file.digest()

        def of_file(file: File) -> str:
            return of_path(file) if file.data is None else file.digest()

        total = hashlib.sha256()
        for row in self:
            try:
                content = [row.kind, row.conversation, [of_file(file) for file in row.files]]
            except OSError as error:
                raise ManifestError(
                    f"{row.source}: {str(error.filename)!r} cannot be read ({error.strerror}); check the path."
                ) from error
            total.update(json.dumps(content, sort_keys=True).encode() + b"\n")
        return total.hexdigest()

    def rows_digest(self) -> str:
        """SHA-256 of the manifest's file, or of the names of the files in its classes. No item is opened."""
        return self._rows.digest()

    def _modality_of(self, name: str | Held) -> str:
        """The modality of a file in a column for files of any modality, from its suffix."""
        return self._by_suffix(name) or self._usual

    def _by_suffix(self, name: str | Held) -> str | None:
        text = name.name if isinstance(name, Held) else urlsplit(name).path if is_address(name) else name
        return self.names.suffixes.get(os.path.splitext(text)[1].lower())

    @cached_property
    def _usual(self) -> str:
        """The modality of files whose suffix tells none: that of the first with one, else that of the first content."""
        found = list[str | Held]()
        for index in range(min(len(self), FIRST_ROWS)):
            try:
                found += names_of_files(self._rows.fields(index))
            except ManifestError:  # raised when the row is asked for
                continue
        if usual := next(filter(None, map(self._by_suffix, found)), None):
            return usual
        problems = list[str]()
        for name in found:
            try:
                return read_item(self._file("", name).source).modality
            except ItemError as error:
                problems.append(str(error))
        raise ManifestError(problems[0] if problems else "no file tells by its suffix what it holds; rename them.")

    def _look_at_the_start(self) -> None:
        """Refuse a manifest without a good row at its start. A bad row among good ones raises on access."""
        rows: list[Row] = []
        errors: list[ManifestError] = []
        first = min(len(self), FIRST_ROWS)
        for index in range(first):
            try:
                row = self[index]
            except ManifestError as error:
                errors.append(error)
                continue
            if any(file.data is not None or file.address or os.path.exists(file.path) for file in row.files):
                return
            rows.append(row)
        lost = next((row for row in rows if row.files), None)
        if lost is not None:
            modality, path = lost.files[0][:2]
            raise ManifestError(
                f"{lost.source}: the {get_modality(modality).noun} {str(path)!r} does not exist, nor does any other of the "
                f"first {first} rows; relative paths start at the folder {str(self.root)!r}, name another one as root."
            )
        if not rows:
            raise ManifestError(f"None of the first {first} rows can be read; {errors[0]}", errors[0].kind)


class ManifestConversations:
    """The rows of a manifest as examples. Items are opened on access.

    Args:
        manifest: the rows.
        openers: for a modality what makes an item of a path, or of the bytes of a file. By default the modality does.

    Raises:
        ManifestError, ItemError: on access, a row or one of its files cannot be read. The message begins with the row.
    """

    def __init__(self, manifest: Manifest, openers: Mapping[str, Callable[[Path | bytes], Any]] | None = None) -> None:
        self.manifest, self.openers = manifest, dict(openers or {})
        self.blocks = manifest.blocks

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Example:
        row = self.manifest[index]
        words: dict[str, list[str]] = {}
        for file, text in zip(row.files, row.words, strict=bool(row.words)):
            words.setdefault(file.modality, []).append(text)
        return Example(row.open(self.openers), [row.conversation], row.source, words=words)
