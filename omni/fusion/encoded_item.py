"""An item that an encoder has seen already, to stand where the item itself would: in a prompt, in a batch, in a cache."""

from collections.abc import Mapping
from typing import Any


class EncodedItem:
    """What the encoder said of one item, before the projector.

    No dataclass: in a message transformers would take it for a part of the message and turn it into a dictionary.

    Args:
        tokens: by name, `cls` float[1, D] and/or `grid` float[N, D], of torch or NumPy.
        grid_shape: shape of the grid, such as (14, 14); the token plan is made from it.
    """

    __slots__ = ("grid_shape", "tokens")

    def __init__(self, tokens: Mapping[str, Any], grid_shape: tuple[int, ...]) -> None:
        self.tokens, self.grid_shape = tokens, grid_shape

    def __repr__(self) -> str:
        return f"EncodedItem(tokens={self.tokens!r}, grid_shape={self.grid_shape!r})"
