"""Projectors turn an encoder's tokens into tokens of the language model; `num_tokens` says how many.

Shapes: B items, N patches, D width of the encoder, M tokens of the language model, T its width.

    cls  float[B, 1, D]  ─┐
                          ├─ projector ─▶ float[B, M, T]
    grid float[B, N, D]  ─┘

The token plan is `num_tokens`, and it is only here. The processor asks it how many placeholders to write, and the model
how many tokens to put in their places.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def num_tokens(output: str, projector: str, factor: int, grid_shape: tuple[int, ...]) -> int:
    """The number of tokens that an item with this grid becomes.

    Args:
        output: the encoder's outputs that the projector reads: "cls", "grid" or "cls+grid".
        projector: a key of `PROJECTORS`.
        factor: side k of the neighbourhoods that `unshuffle_mlp` folds into one token; 1 for other projectors.
        grid_shape: the item's grid of patches, such as (14, 14). In a grid of one axis, the last neighbourhood may be
            incomplete.

    Raises:
        ValueError: the factor does not divide a grid of several axes.
    """
    parts = output.split("+")
    if "grid" in parts and len(grid_shape) > 1 and any(side % factor for side in grid_shape):
        raise ValueError(
            f"{projector} folds neighbourhoods of {factor} along each side, but a grid of "
            f"{'x'.join(map(str, grid_shape))} patches is not divisible by {factor}; choose another factor or image size."
        )
    patches = math.prod(-(-side // factor) for side in grid_shape)
    return ("cls" in parts) + patches * ("grid" in parts)


class LinearProjector(nn.Module):
    """A linear layer with bias for every token: micro-Omni's `proj_v` (33,024 parameters from width 128 to 256)."""

    uses_factor = False

    def __init__(self, hidden_size: int, text_hidden_size: int, factor: int, grid_dims: int, output: str) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, text_hidden_size)

    def forward(self, tokens: Mapping[str, torch.Tensor], grid_shape: tuple[int, ...]) -> torch.Tensor:
        """`cls` float[B, 1, D] and/or `grid` float[B, N, D] -> float[B, M, T], CLS first."""
        return self.linear(torch.cat(list(tokens.values()), dim=1))


class MLPProjector(nn.Module):
    """Linear, exact GELU, linear for every token (Liu et al., 2023, "Improved Baselines with Visual Instruction Tuning")."""

    uses_factor = False

    def __init__(self, hidden_size: int, text_hidden_size: int, factor: int, grid_dims: int, output: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, text_hidden_size)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(text_hidden_size, text_hidden_size)

    def forward(self, tokens: Mapping[str, torch.Tensor], grid_shape: tuple[int, ...]) -> torch.Tensor:
        """`cls` float[B, 1, D] and/or `grid` float[B, N, D] -> float[B, M, T], CLS first."""
        return self.fc2(self.activation(self.fc1(torch.cat(list(tokens.values()), dim=1))))


class UnshuffleMLPProjector(nn.Module):
    """Concatenates k x k neighbours into one token; then linear, exact GELU, linear. CLS has a first layer of its own.

    This is pixel unshuffle before the MLP, as in InternVL (Chen et al., 2024). It makes k * k times fewer tokens without
    averaging.
    """

    uses_factor = True

    def __init__(self, hidden_size: int, text_hidden_size: int, factor: int, grid_dims: int, output: str) -> None:
        super().__init__()
        self.factor = factor
        if "cls" in output.split("+"):
            self.cls_fc1 = nn.Linear(hidden_size, text_hidden_size)
        if "grid" in output.split("+"):
            self.fc1 = nn.Linear(hidden_size * factor**grid_dims, text_hidden_size)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(text_hidden_size, text_hidden_size)

    def forward(self, tokens: Mapping[str, torch.Tensor], grid_shape: tuple[int, ...]) -> torch.Tensor:
        """`cls` float[B, 1, D] and/or `grid` float[B, N, D] -> float[B, M, T], CLS first."""
        hidden = []
        if "cls" in tokens:
            hidden.append(self.cls_fc1(tokens["cls"]))
        if "grid" in tokens:
            hidden.append(self.fc1(unshuffle(tokens["grid"], grid_shape, self.factor)))
        return self.fc2(self.activation(torch.cat(hidden, dim=1)))


def unshuffle(grid: torch.Tensor, grid_shape: tuple[int, ...], factor: int) -> torch.Tensor:
    """Fold neighbourhoods of k along each of the n grid axes into the width.

    float[B, N, D] -> float[B, N / k**n, k**n * D]. Neighbourhoods and the patches inside them are in reading order. Zeros
    complete the last neighbourhood of a grid of one axis.
    """
    batch, dims = grid.shape[0], len(grid_shape)
    if dims == 1 and (missing := -grid_shape[0] % factor):
        grid, grid_shape = F.pad(grid, (0, 0, 0, missing)), (grid_shape[0] + missing,)
    split = [size for side in grid_shape for size in (side // factor, factor)]
    outer, inner = range(1, 2 * dims, 2), range(2, 2 * dims + 1, 2)
    folded = grid.reshape(batch, *split, -1).permute(0, *outer, *inner, 2 * dims + 1)  # (B, g.., k.., D)
    return folded.reshape(batch, math.prod(side // factor for side in grid_shape), -1)


PROJECTORS: dict[str, type[Any]] = {
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "unshuffle_mlp": UnshuffleMLPProjector,
}
