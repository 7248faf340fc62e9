"""An encoder in a faster form: what `Modality.pack` returns."""

from typing import Any, Protocol


class Packed(Protocol):
    """An encoder and its preprocessor in a faster form, with the same tokens up to rounding.

    Attributes:
        path: one word for the way it computes, for reports.
    """

    path: str

    def read(self, source: Any, at_least: int | None = None) -> tuple[Any, tuple[int, int], str | None]:
        """Read an item from its file.

        Args:
            source: the file.
            at_least: the picture may be decoded smaller, as long as both sides have at least this number of pixels.

        Returns:
            The item in a form that `prepare` takes, its full size, and a note if the decoder warned.
        """

    def prepare(self, item: Any) -> Any:
        """One item as an array. All arrays have one shape; `__call__` takes a batch of them."""

    def __call__(self, prepared: Any, cls_only: bool = False) -> Any:
        """The encoder's output for B prepared items; with `cls_only`, for the CLS token alone."""
