"""Projectors turn an encoder's tokens into tokens of the language model; `num_tokens` says how many.

Shapes: B items, N patches, D width of the encoder, M tokens of the language model, T its width.

    cls  float[B, 1, D]  ─┐
                          ├─ projector ─▶ float[B, M, T]
    grid float[B, N, D]  ─┘

The token plan is `num_tokens`, and it is only here. The processor asks it how many placeholders to write, and the model
how many tokens to put in their places.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from omni.grids import GridPositions, unshuffle
from omni.whitening import Whitening


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


class Projector(nn.Module):
    """Encoder tokens to tokens of the language model. Subclasses say how, in `_project`.

    Args:
        hidden_size, text_hidden_size: D and T.
        factor: see `num_tokens`.
        grid_dims: number of axes of the grid.
        output: the encoder's outputs that are read.
        positions: the shape of a table of learned vectors, such as (7, 7), one for each token of the grid; None for none.
        whitened: whether the tokens that are read pass `omni.whitening` first.
    """

    uses_factor = False

    def __init__(
        self,
        hidden_size: int,
        text_hidden_size: int,
        factor: int,
        grid_dims: int,
        output: str,
        positions: Sequence[int] | None = None,
        whitened: bool = False,
    ) -> None:
        super().__init__()
        self.factor = factor
        self.positions = GridPositions(positions, text_hidden_size) if positions else None
        widths = {"cls": hidden_size, "grid": hidden_size * (factor**grid_dims if self.uses_factor else 1)}
        self.whitening = nn.ModuleDict({part: Whitening(widths[part]) for part in output.split("+") if whitened})

    def forward(self, tokens: Mapping[str, torch.Tensor], grid_shape: tuple[int, ...]) -> torch.Tensor:
        """`cls` float[B, 1, D] and/or `grid` float[B, N, D] -> float[B, M, T], CLS first."""
        if self.uses_factor and "grid" in tokens:
            tokens = {**tokens, "grid": unshuffle(tokens["grid"], grid_shape, self.factor)}
        if self.whitening:
            tokens = {part: self.whitening[part](value) for part, value in tokens.items()}
        projected = self._project(tokens)
        if self.positions is None:
            return projected
        table: torch.Tensor = self.positions(tuple(-(-side // self.factor) for side in grid_shape))
        return projected + F.pad(table, (0, 0, projected.shape[1] - len(table), 0))

    def _project(self, tokens: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """As `forward`, of neighbourhoods that are folded already, and without positions."""
        raise NotImplementedError


class LinearProjector(Projector):
    """A linear layer with bias for every token: micro-Omni's `proj_v` (33,024 parameters from width 128 to 256)."""

    def __init__(self, hidden_size: int, text_hidden_size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(hidden_size, text_hidden_size, *args, **kwargs)
        self.linear = nn.Linear(hidden_size, text_hidden_size)

    def _project(self, tokens: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.linear(torch.cat(list(tokens.values()), dim=1))


class MLPProjector(Projector):
    """Linear, exact GELU, linear for every token (Liu et al., 2023, "Improved Baselines with Visual Instruction Tuning")."""

    def __init__(self, hidden_size: int, text_hidden_size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(hidden_size, text_hidden_size, *args, **kwargs)
        self.fc1 = nn.Linear(hidden_size, text_hidden_size)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(text_hidden_size, text_hidden_size)

    def _project(self, tokens: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(torch.cat(list(tokens.values()), dim=1))))


class UnshuffleMLPProjector(Projector):
    """Concatenates k x k neighbours into one token; then linear, exact GELU, linear. CLS has a first layer of its own.

    This is pixel unshuffle before the MLP, as in InternVL (Chen et al., 2024). It makes k * k times fewer tokens without
    averaging.
    """

    uses_factor = True

    def __init__(
        self, hidden_size: int, text_hidden_size: int, factor: int, grid_dims: int, output: str, **kwargs: Any
    ) -> None:
        super().__init__(hidden_size, text_hidden_size, factor, grid_dims, output, **kwargs)
        if "cls" in output.split("+"):
            self.cls_fc1 = nn.Linear(hidden_size, text_hidden_size)
        if "grid" in output.split("+"):
            self.fc1 = nn.Linear(hidden_size * factor**grid_dims, text_hidden_size)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(text_hidden_size, text_hidden_size)

    def _project(self, tokens: Mapping[str, torch.Tensor]) -> torch.Tensor:
        hidden = []
        if "cls" in tokens:
            hidden.append(self.cls_fc1(tokens["cls"]))
        if "grid" in tokens:
            hidden.append(self.fc1(tokens["grid"]))
        return self.fc2(self.activation(torch.cat(hidden, dim=1)))


PROJECTORS: dict[str, type[Projector]] = {
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "unshuffle_mlp": UnshuffleMLPProjector,
}
