"""Pictures of another size than the encoder's: refused, or with the learned positions stretched to it. The seed has neither.

Shapes: B pictures, C channels, H x W pixels, P patch size, N patches at the encoder's own size, D width.
"""

from typing import Any

import torch
from torch import nn

from omni.grids import interpolate

from .configuration_vision import OmniVisionConfig


def expect_pictures(pixel_values: torch.Tensor, config: OmniVisionConfig, any_size: bool) -> None:
    """Refuse anything but a batch of pictures, float[B, C, H, W], of the encoder's size.

    Args:
        pixel_values: the batch.
        config: of the encoder.
        any_size: accept any H and W that patches fill.

    Raises:
        ValueError: it is none; the message says what to do.
    """
    if pixel_values.ndim != 4:
        raise ValueError(f"Expected pictures of shape (B, C, H, W), found {tuple(pixel_values.shape)}.")
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"Expected pixel values as the image processor scales them, found {pixel_values.dtype}; pass pictures "
            "through the image processor with do_rescale and do_normalize as it was saved."
        )
    channels, height, width = pixel_values.shape[1:]
    size, patch = config.image_size, config.patch_size
    if channels != config.num_channels:
        raise ValueError(f"Expected pictures of {config.num_channels} channels, found {channels}.")
    if (height, width) != (size, size) and not any_size:
        raise ValueError(
            f"Expected pictures of {size}x{size} pixels, found {height}x{width}. Resize them with the image "
            "processor, or pass interpolate_pos_encoding=True to stretch the learned positions to this size."
        )
    if height % patch or width % patch:
        raise ValueError(
            f"Height and width must be multiples of the patch size {patch}, found {height}x{width}: the pixels "
            "beyond the last whole patch would be ignored."
        )


def stretched(positions: torch.Tensor, config: OmniVisionConfig, rows: int, columns: int) -> torch.Tensor:
    """Learned positions float[1, 1+N, D] for a grid of this size, float[1, 1 + rows * columns, D]."""
    side = config.grid_size
    if (rows, columns) == (side, side):
        return positions
    # in float32: bicubic weights lose too much in half precision
    table = interpolate(positions[0, 1:].float(), (side, side), (rows, columns), mode="bicubic")
    return torch.cat([positions[:, :1], table[None].to(positions.dtype)], dim=1)


@torch.no_grad()
def take_size(encoder: Any, side: int) -> None:
    """Make an encoder one of pictures of another height and width: its positions are interpolated, once.

    Raises:
        ValueError: `side` is no multiple of the patch size.
    """
    config = type(encoder.config)(**{**encoder.config.to_dict(), "image_size": side})
    embeddings = encoder.embeddings
    positions = stretched(embeddings.position_embeddings, encoder.config, config.grid_size, config.grid_size)
    embeddings.position_embeddings = nn.Parameter(positions.clone())
    encoder.config.image_size = side
