"""Bytes that are scaled in the training process are what the image processor makes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from omni.training.pixels import AS_BYTES, Normalization, take_bytes
from omni.vision.configuration_vision import OmniVisionConfig
from omni.vision.image_processing_vision import OmniImageProcessor
from omni.vision.modeling_vision import OmniVisionModel

SETTINGS = [
    {},
    {"do_normalize": False},
    {"do_rescale": False},
    {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
]


def pictures() -> list[Image.Image]:
    sizes = [(224, 224, 3), (50, 70, 3)]
    return [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, size).astype(np.uint8))
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("settings", SETTINGS)
def test_bytes_become_what_the_processor_makes(settings: dict) -> None:
    processor = OmniImageProcessor(**settings)
    expected = processor(pictures(), return_tensors="pt")["pixel_values"].float()
    raw = processor(pictures(), **AS_BYTES, return_tensors="pt")["pixel_values"]
    assert raw.dtype == torch.uint8
    torch.testing.assert_close(Normalization(processor)(raw), expected, atol=1e-6, rtol=1e-6)


def test_a_model_takes_bytes_and_scaled_pixels_alike() -> None:
    processor, model = OmniImageProcessor(), OmniVisionModel(OmniVisionConfig(num_hidden_layers=1)).eval()
    raw = processor(pictures(), **AS_BYTES, return_tensors="pt")["pixel_values"]
    scaled = processor(pictures(), return_tensors="pt")["pixel_values"]
    take_bytes(model, processor)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=raw).cls, model(pixel_values=scaled).cls, atol=1e-5, rtol=1e-5)
    assert "mean" not in " ".join(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_an_encoder_without_scaling_refuses_bytes(dtype: torch.dtype) -> None:
    model: nn.Module = OmniVisionModel(OmniVisionConfig(num_hidden_layers=1))
    with pytest.raises(ValueError, match=f"as the image processor scales them, found {dtype}"):
        model(pixel_values=torch.zeros(1, 3, 224, 224, dtype=dtype))


def test_a_picture_of_the_right_size_is_not_resized() -> None:
    picture = pictures()[0]
    made = OmniImageProcessor()(picture, **AS_BYTES, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(made, np.asarray(picture).transpose(2, 0, 1))
