"""The inputs of the contestants: scenes as tensors, and picture files like those of a camera."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from omni import scenes
from omni.vision.image_processing_vision import OmniImageProcessor

SIZES = ((640, 480), (1920, 1080))
"""Width and height of picture files."""

DRAWN = 64
"""Number of different scenes in a batch, at most. Drawing one takes 3 ms, and a batch on a GPU has a thousand."""


def scene(number: int) -> Image.Image:
    """A held-out scene of 224 x 224 pixels."""
    return scenes.render(scenes.sample_scene(number, "test"))


@cache
@torch.inference_mode(False)  # training uses the cached tensor, too
def pixels(count: int) -> torch.Tensor:
    """Scenes, prepared by the image processor, float[count, 3, 224, 224]."""
    prepared: torch.Tensor = OmniImageProcessor()([scene(i) for i in range(count)], return_tensors="pt")["pixel_values"]
    return prepared


def batch(count: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Prepared scenes on a device, float[count, 3, 224, 224]. They repeat after `DRAWN`."""
    drawn = pixels(min(count, DRAWN)).to(device, dtype)
    return drawn.repeat(-(-count // DRAWN), 1, 1, 1)[:count]


@cache
def raw(count: int) -> torch.Tensor:
    """The same scenes, not prepared, uint8[count, 224, 224, 3]."""
    return torch.from_numpy(np.stack([np.asarray(scene(i)) for i in range(count)]))


def photo(number: int, size: tuple[int, int]) -> Image.Image:
    """A scene, enlarged to (width, height), with the fine and coarse noise of a photograph.

    A JPEG with more detail takes longer to decode, so a smooth drawing would be too easy. With this noise, files of quality
    85 have 0.25 to 0.3 bytes a pixel, as those of cameras.
    """
    values = np.asarray(scene(number).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    random, (width, height) = np.random.default_rng(number), size
    for scale, strength in ((1, 4), (2, 6), (4, 8), (8, 10)):
        coarse = random.normal(0, strength, (-(-height // scale), -(-width // scale))).astype(np.float32)
        values = values + np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))[..., None]
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def write_photos(folder: Path, count: int, size: tuple[int, int]) -> list[str]:
    """Write `count` photos as JPEG files, and return their paths."""
    paths = [folder / f"{number:04}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        photo(number, size).save(path, quality=85)
    return [str(path) for path in paths]
