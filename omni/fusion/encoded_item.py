"""An item after its encoder. It may take the place of the item itself: in a prompt, in a batch, in a cache."""

from collections.abc import Mapping
from typing import Any


class EncodedItem:
    """The encoder's tokens of one item, before the projector.

    This is not a dataclass: transformers would turn a dataclass inside of a message into a dictionary.

    Args:
        tokens: by name, `cls` float[1, D] and/or `grid` float[N, D], of torch or NumPy.
        grid_shape: shape of the grid, such as (14, 14). The token plan follows from it.
    """

    __slots__ = ("grid_shape", "tokens")

    def __init__(self, tokens: Mapping[str, Any], grid_shape: tuple[int, ...]) -> None:
        self.tokens, self.grid_shape = tokens, grid_shape

    def __repr__(self) -> str:
        return f"EncodedItem(tokens={self.tokens!r}, grid_shape={self.grid_shape!r})"
