"""Projectors: from an encoder's tokens to tokens of the language model; and how many of them there will be.

Shapes: B items, N patches, D width of the encoder, M tokens handed over, T width of the language model.

    cls  float[B, 1, D]  ─┐
                          ├─ projector ─▶ float[B, M, T]
    grid float[B, N, D]  ─┘

The token plan lives here and nowhere else: `num_tokens` says how many tokens an item becomes, and the processor (which
writes that many placeholders) and the model (which fills them) both ask it.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def num_tokens(output: str, projector: str, factor: int, grid_shape: tuple[int, ...]) -> int:
    """Tokens that an item with this grid becomes.

    Args:
        output: what is handed over, "cls", "grid" or "cls+grid".
        projector: a key of `PROJECTORS`.
        factor: side k of the neighbourhoods that `unshuffle_mlp` folds into one token; 1 for the others.
        grid_shape: the item's grid of patches, such as (14, 14).

    Raises:
        ValueError: a grid that the factor does not divide.
    """
    parts = output.split("+")
    if "grid" in parts and any(side % factor for side in grid_shape):
        raise ValueError(
            f"{projector} folds neighbourhoods of {factor} along each side, but a grid of "
            f"{'x'.join(map(str, grid_shape))} patches is not divisible by {factor}. Choose another factor or image size."
        )
    patches = math.prod(side // factor for side in grid_shape)
    return ("cls" in parts) + patches * ("grid" in parts)


class LinearProjector(nn.Module):
    """One linear layer with bias for every token: the seed's `proj_v` (33,024 parameters from 128 to 256)."""

    uses_factor = False

    def __init__(self, hidden_size: int, text_hidden_size: int, factor: int, grid_dims: int, output: str) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, text_hidden_size)

    def forward(self, tokens: Mapping[str, torch.Tensor], grid_shape: tuple[int, ...]) -> torch.Tensor:
        """`cls` float[B, 1, D] and/or `grid` float[B, N, D] -> float[B, M, T], CLS first."""
        return self.linear(torch.cat(list(tokens.values()), dim=1))


class MLPProjector(nn.Module):
    """Linear, exact GELU, linear for every token (Liu et al., "Improved Baselines with Visual Instruction Tuning")."""

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
    """k x k neighbours side by side into one token, then linear, exact GELU, linear; CLS has a first layer of its own.

    Pixel unshuffle before the MLP as in InternVL (Chen et al., 2024): k * k times fewer tokens, nothing averaged away.
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

    float[B, N, D] -> float[B, N / k**n, k**n * D]. Neighbourhoods and the patches inside them are in reading order.
    """
    batch, dims = grid.shape[0], len(grid_shape)
    split = [size for side in grid_shape for size in (side // factor, factor)]
    outer, inner = range(1, 2 * dims, 2), range(2, 2 * dims + 1, 2)
    folded = grid.reshape(batch, *split, -1).permute(0, *outer, *inner, 2 * dims + 1)  # (B, g.., k.., D)
    return folded.reshape(batch, math.prod(side // factor for side in grid_shape), -1)


def compute_dtype(projector: nn.Module) -> torch.dtype | None:
    """What a projector takes its tokens in: the type of its first floating-point parameter.

    None where all of its parameters are quantized to integers: then it takes them as they are.
    """
    return next((each.dtype for each in projector.parameters() if each.is_floating_point()), None)


PROJECTORS: dict[str, type[Any]] = {
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "unshuffle_mlp": UnshuffleMLPProjector,
}
