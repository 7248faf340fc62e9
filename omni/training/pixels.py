"""Workers hand pictures to the training process as bytes, a quarter of the memory; they are normalised there."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BaseImageProcessor

from omni.registry import get_modality

AS_BYTES = {"do_rescale": False, "do_normalize": False}
"""Settings with which an image processor leaves pixels as they are."""


class Normalization(nn.Module):
    """The last step of an image processor: `(pixel * rescale_factor - mean) / std`."""

    def __init__(self, processor: BaseImageProcessor) -> None:
        super().__init__()
        self.factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8[B, 3, H, W] -> float32[B, 3, H, W], on the device of the pixels."""
        self.to(pixels.device)
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return (pixels.float() * self.factor - mean) / std


def take_bytes(model: nn.Module, processor: BaseImageProcessor) -> None:
    """Make a model with inputs `pixel_values` float[B, 3, H, W] accept uint8[B, 3, H, W] too."""
    normalization = Normalization(processor)

    def normalize(_: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        pixels = inputs.get("pixel_values")
        if pixels is not None and pixels.dtype == torch.uint8:
            inputs["pixel_values"] = normalization(pixels)
        return args, inputs

    model.register_forward_pre_hook(normalize, with_kwargs=True)


def cross_as_bytes(model: nn.Module, preprocessors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Make a model accept pictures as bytes, if omni's image processor prepares them.

    Returns:
        For each modality, the settings with which its preprocessor must be called; empty if nothing changes.
    """
    processor = preprocessors.get("image")
    if processor is None or not isinstance(processor, get_modality("image").preprocessor_class):
        return {}
    take_bytes(model, processor)
    return {"image": AS_BYTES}
