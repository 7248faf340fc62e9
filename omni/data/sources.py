"""Where rows come from: what each kind of source offers, and the error for those that cannot be used."""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

RowProblem = Literal["malformed row", "no picture", "no answer"]

SAYINGS = ("messages", "conversations", "question", "caption", "text")
"""The fields that hold what a row says, apart from `answer`."""


class Held(NamedTuple):
    """A file that stands in the row itself.

    Attributes:
        data: its bytes.
        name: what it is called there, or "".
    """

    data: bytes
    name: str


class ManifestError(ValueError):
    """A manifest or a row of it cannot be used. The message is one sentence: where, what is wrong, what to do."""

    def __init__(self, message: str, kind: RowProblem = "malformed row") -> None:
        super().__init__(message)
        self.kind = kind


class Source(Protocol):
    """The rows of a file or folder, not yet interpreted.

    Attributes:
        by_class: whether each row is a file in a folder that is named by its answer.
        blocks: how many rows are read together, block after block; None where each is read alone.
    """

    by_class: bool = False
    blocks: Sequence[int] | None = None

    def __len__(self) -> int: ...

    def place(self, index: int) -> str:
        """The place of a row, for messages: a file and the line or entry, counted from 1."""

    def fields(self, index: int) -> dict[str, Any]:
        """The names and values of a row. Raises `ManifestError` without its place."""

    def digest(self) -> str:
        """SHA-256 of the file, or of the names of the files. No item is opened."""


_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def is_address(name: str) -> bool:
    """Whether a name is an address, such as "https://example.org/a.png"."""
    return _ADDRESS.match(name) is not None


def short(value: Any) -> str:
    """A value, shortened for messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
