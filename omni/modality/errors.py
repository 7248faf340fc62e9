"""A file cannot become an item: the errors that `Modality.open` raises."""

from typing import Literal

ItemProblem = Literal["missing", "truncated", "too large", "unreadable"]


class ItemError(ValueError):
    """A file cannot become an item. The message is one sentence: which file, what was expected and found, what to do.

    `kind` belongs to the class, because a worker of a `DataLoader` passes on only the class and the message of an error.
    """

    kind: ItemProblem = "unreadable"


class MissingItemError(ItemError):
    """There is no such file."""

    kind = "missing"


class LargeItemError(ItemError):
    """The file, or what it holds, is larger than it may be."""

    kind = "too large"
