"""An item that an encoder has seen already, to stand where the item itself would: in a prompt, in a batch, in a cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EncodedItem:
    """What the encoder said of one item, before the projector.

    Attributes:
        tokens: by name, `cls` float[1, D] and/or `grid` float[N, D], of torch or NumPy.
        grid_shape: shape of the grid, such as (14, 14); the token plan is made from it.
    """

    tokens: Mapping[str, Any]
    grid_shape: tuple[int, ...]
