"""An encoder in a faster form: what `Modality.pack` returns."""

from collections.abc import Sequence
from typing import Any, Protocol


class Packed(Protocol):
    """An encoder and its preprocessor in a faster form, with the same tokens up to rounding.

    Attributes:
        path: one word for the way it computes, for reports.
    """

    path: str

    def read(self, source: Any, at_least: int | None = None) -> tuple[Any, tuple[int, int] | None, str | None]:
        """Read an item from its file.

        Args:
            source: the file.
            at_least: the picture may be decoded smaller, as long as both sides have at least this number of pixels.

        Returns:
            The item in a form that `prepare` takes, its full size if items have one, and a note if its file is odd.
        """

    def prepare(self, item: Any) -> Any:
        """One item as an array."""

    def batch(self, prepared: Sequence[Any]) -> Any:
        """Some prepared items in the form that `__call__` takes."""

    def grid_shapes(self, batch: Any) -> list[tuple[int, ...]]:
        """The grid of tokens of each item of a batch, as `Modality.grid_shapes`."""

    def __call__(self, batch: Any, cls_only: bool = False) -> Any:
        """The encoder's output for a batch; with `cls_only`, that of CLS alone."""
