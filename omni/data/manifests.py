"""Your own data set, a folder or a file that names pictures, as conversations for training or evaluation.

    manifest = Manifest.read("birds")                  # or birds.jsonl, birds.json, birds.csv
    manifest[0].conversation                           # questions and answers, with placeholders for pictures
    ManifestConversations(manifest)[0].items["image"]  # the pictures, which are opened on access

`sources` lists the layouts, and `rows` the fields of a row. Relative paths start at the manifest's folder, or at `root`. A
row is parsed on access, and raises its error then. A manifest is refused at once if none of its first rows can be read, or
none of their pictures exists.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

from omni.data.conversations import Example, Message
from omni.data.rows import is_blank, parse_row
from omni.data.sources import ManifestError, open_source
from omni.registry import ItemError, open_item

PROMPT = "Describe the picture."

FIRST_ROWS = 100
"""Number of rows that are tried before a manifest is refused as a whole."""


@dataclass(frozen=True)
class Row:
    """One example, with its pictures not opened.

    Attributes:
        source: its place, for messages: file and line or entry, counted from 1.
        pictures: the picture files, in the order of the image blocks.
        conversation: messages of user and assistant in turn; `content` is a list of `{"type": "image"}` and
            `{"type": "text", "text"}`.
        kind: the kind of question under which an evaluation scores it.
    """

    source: str
    pictures: tuple[Path, ...]
    conversation: list[Message]
    kind: str | None


class Manifest(Sequence[Row]):
    """The rows of a data set. See the module for its layouts.

    Attributes:
        path: the file or folder.
        root: the folder that relative paths start from.
        folder: the folder that holds all pictures, in layouts that have one (metadata.jsonl, metadata.csv, classes).
        by_class: whether each row is a file in a folder that is named by its answer.
    """

    def __init__(self, path: Path, root: Path | None, prompt: str, answers: bool = True) -> None:
        self.path, self.prompt, self.answers = path, prompt, answers
        self._rows = open_source(path)
        self.folder = path if path.is_dir() else None
        self.by_class = self._rows.by_class
        self.root = root or (path if path.is_dir() else path.parent)

    @classmethod
    def read(
        cls, path: str | Path, root: str | Path | None = None, prompt: str = PROMPT, answers: bool = True
    ) -> "Manifest":
        """Open a data set, and try its first rows.

        Args:
            path: a folder, or a .jsonl, .json or .csv file.
            root: the folder that relative paths start from. By default the manifest's folder.
            prompt: the question for rows that have only an answer: captions, classes.
            answers: whether rows need an answer. If not, a row may name only pictures; its conversation is then empty.

        Raises:
            ManifestError: there is nothing at `path`, or another layout, or no rows; none of the first rows can be read;
                none of their pictures exists (a wrong `root`); or `prompt` is empty.
        """
        if is_blank(prompt):
            raise ManifestError(
                "The prompt is empty, expected a question for rows that have only an answer; write one."
            )
        if root is not None and not Path(root).is_dir():
            raise ManifestError(
                f"The root {str(root)!r} is no folder, expected the one that holds the pictures; correct it."
            )
        manifest = cls(Path(path), None if root is None else Path(root), prompt, answers)
        if root is not None and manifest.by_class:
            raise ManifestError(f"{str(path)!r} is itself the folder of its pictures; leave out the root.")
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
            names, conversation, kind = parse_row(fields, self.prompt, promised, self.answers)
        except ManifestError as error:
            raise ManifestError(f"{source}: {error}", error.kind) from error
        return Row(source, tuple(self.root / name for name in names), conversation, kind)

    def source(self, index: int) -> str:
        """The place of a row, for messages. The row need not be valid."""
        return self._rows.place(index)

    def digest(self) -> str:
        """SHA-256 of the contents of all rows and of the bytes of their pictures. It does not depend on paths.

        Raises:
            ManifestError: a row cannot be parsed, or a picture of it cannot be read.
        """

        @lru_cache(maxsize=1024)  # rows that share a picture are often neighbours
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
        """SHA-256 of the manifest's file, or of the names of the files in its classes. No picture is opened."""
        return self._rows.digest()

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
            if any(map(os.path.exists, row.pictures)):
                return
            rows.append(row)
        lost = next((row for row in rows if row.pictures), None)
        if lost is not None:
            raise ManifestError(
                f"{lost.source}: the picture {str(lost.pictures[0])!r} does not exist, nor does any other of the first "
                f"{first} rows; relative paths start at the folder {str(self.root)!r}, name another one as root."
            )
        if not rows:
            raise ManifestError(f"None of the first {first} rows can be read; {errors[0]}", errors[0].kind)


class ManifestConversations:
    """The rows of a manifest as examples. Pictures are opened on access.

    Args:
        manifest: the rows.
        open_picture: opens a picture's path. By default, its modality does.

    Raises:
        ManifestError, ItemError: on access, a row or one of its pictures cannot be read. The message begins with the row.
    """

    def __init__(self, manifest: Manifest, open_picture: Callable[[Path], Any] | None = None) -> None:
        self.manifest = manifest
        self.open_picture: Callable[[Path], Any] = open_picture or open_item("image")

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Example:
        row = self.manifest[index]
        try:
            pictures = [self.open_picture(path) for path in row.pictures]
        except ItemError as error:
            raise type(error)(f"{row.source}: {error}") from error
        return Example({"image": pictures} if pictures else {}, [row.conversation], row.source)
