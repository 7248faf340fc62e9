"""Grids of tokens: folding neighbours into one token, and learned positions for a grid of any shape."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def unshuffle(grid: torch.Tensor, grid_shape: tuple[int, ...], factor: int) -> torch.Tensor:
    """Fold neighbourhoods of k tokens along each of the n grid axes into the width.

    float[B, N, D] -> float[B, N / k**n, k**n * D]. Neighbourhoods, and the tokens inside them, are in reading order. In a
    grid of one axis, zeros complete the last neighbourhood.

    Args:
        grid: the tokens.
        grid_shape: the shape of the grid, with N places.
        factor: k; must divide every side of a grid with several axes.
    """
    batch, dims = grid.shape[0], len(grid_shape)
    if dims == 1 and (missing := -grid_shape[0] % factor):
        grid, grid_shape = F.pad(grid, (0, 0, 0, missing)), (grid_shape[0] + missing,)
    split = [size for side in grid_shape for size in (side // factor, factor)]
    outer, inner = range(1, 2 * dims, 2), range(2, 2 * dims + 1, 2)
    folded = grid.reshape(batch, *split, -1).permute(0, *outer, *inner, 2 * dims + 1)  # (B, g.., k.., D)
    return folded.reshape(batch, math.prod(side // factor for side in grid_shape), -1)


INTERPOLATIONS = {2: "bilinear", 3: "trilinear"}
"""Interpolations by the number of axes. A grid of one axis has no table of positions: its length differs from item to item,
and the Thinker knows the order of its tokens."""


class GridPositions(nn.Embedding):
    """A table of learned vectors, one for each place of a grid.

    Args:
        shape: the shape of the grid, such as (7, 7).
        width: the width of a vector.
    """

    def __init__(self, shape: Sequence[int], width: int) -> None:
        super().__init__(math.prod(shape), width)
        self.shape = tuple(shape)

    def forward(self, shape: tuple[int, ...]) -> torch.Tensor:  # type: ignore[override]
        """The vectors for the places of a grid of this shape, in reading order: float[places, width]."""
        if shape == self.shape:
            return self.weight
        return interpolate(self.weight, self.shape, shape, INTERPOLATIONS[len(shape)])


def interpolate(table: torch.Tensor, old: Sequence[int], new: Sequence[int], mode: str) -> torch.Tensor:
    """Interpolate vectors float[places, D] of a grid of shape `old` for a grid of shape `new`: float[new places, D]."""
    spread = table.T.reshape(1, -1, *old)
    return F.interpolate(spread, tuple(new), mode=mode, align_corners=False).flatten(2)[0].T
