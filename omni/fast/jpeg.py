"""JPEG files to pixels, without a picture of PIL in between.

The decoder is that of `read_picture`, so the pixels are the same. For a phone's photograph, copying the pixels into a
picture of PIL would take as long as decoding them.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from omni.vision.formats.jpeg import Jpeg
from omni.vision.pictures import Source, decode, open_picture, orientation

Pixels = Image.Image | NDArray[np.uint8]
"""An RGB picture of PIL; or uint8[H, W, 4]: red, green, blue and an unused byte."""


class ReadPixels(NamedTuple):
    """The pixels of a picture file."""

    pixels: Pixels
    size: tuple[int, int]
    """Width and height of the whole picture, before it is decoded smaller."""
    note: str | None
    """The decoder's warning about a file whose pixels are all there; None if it has none."""


def read_pixels(source: Source, at_least: int | None = None) -> ReadPixels:
    """The pixels that `read_picture` reads, for a colour JPEG file as an array.

    Raises:
        PictureError: as `read_picture`.
    """
    opened = open_picture(source, at_least)
    image = opened.image
    if isinstance(image, Jpeg) and image.mode == "RGB":
        try:
            pixels = _upright(image.pixels(), orientation(image))
        except Exception:  # `decode` raises it again, in one sentence
            pass
        else:
            return ReadPixels(pixels, opened.full_size, image.info.get("note"))
    picture = decode(opened)
    return ReadPixels(picture, opened.full_size, picture.info.get("note"))


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn stored pixels uint8[H, W, 4] upright."""
    if orientation not in range(2, 9):
        return pixels
    whole = pixels.view(np.uint32)
    if orientation in (5, 6, 7, 8):
        whole = whole.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        whole = whole[::-1]
    if orientation in (2, 3, 6, 7):
        whole = whole[:, ::-1]
    return np.ascontiguousarray(whole).view(np.uint8)
