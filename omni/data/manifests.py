"""A data set of your own: a folder, or a file that names pictures, as conversations to learn from or to be asked about.

    manifest = Manifest.read("birds")                  # or birds.jsonl, birds.json, birds.csv
    manifest[0].conversation                           # what is asked and answered, pictures as placeholders
    ManifestConversations(manifest)[0].items["image"]  # the pictures themselves, opened only now

`sources` says which layouts there are, `rows` what a row may say. Relative paths start at the manifest's folder, or at
`root`. A row is parsed when it is asked for, so a mistake in it is raised then, with its place; a manifest of which nothing
at the start can be read, or no picture found, is refused at once.
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
"""So many rows are looked at before a manifest is refused as a whole."""


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
    """The rows of a data set; see the module for what can be read.

    Attributes:
        path: what was read.
        root: where relative paths start.
        folder: the folder whose files its rows are about (metadata.jsonl, metadata.csv, classes), if it is of that layout.
        by_class: whether rows are the files of folders named by their answer.
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
        if is_blank(prompt):
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
            names, conversation, kind = parse_row(fields, self.prompt, promised, self.answers)
        except ManifestError as error:
            raise ManifestError(f"{source}: {error}", error.kind) from error
        return Row(source, tuple(self.root / name for name in names), conversation, kind)

    def source(self, index: int) -> str:
        """Where a row stands, also one that cannot be parsed."""
        return self._rows.place(index)

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
        open_picture: makes an item of a picture's path, by default as its modality does.

    Raises:
        ManifestError, ItemError: on access, a row or a picture of it that cannot be read; the row is named in front.
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
