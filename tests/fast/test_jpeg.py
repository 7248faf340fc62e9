"""Pixels of JPEG files without a picture of PIL: the same as with one."""

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from omni.fast.jpeg import read_pixels
from omni.vision.pictures import PictureError, read_picture


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).filter(ImageFilter.GaussianBlur(1))


@pytest.mark.parametrize("at_least", [None, 60])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_those_of_the_picture(orientation: int, at_least: int | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(noise(401, 300), exif=exif)
    picture = read_picture(data, at_least)
    found = read_pixels(data, at_least)
    assert isinstance(found.pixels, np.ndarray), "it has not been decoded the short way"
    assert found.pixels.shape == (picture.height, picture.width, 4)
    assert found.pixels.flags.c_contiguous
    np.testing.assert_array_equal(found.pixels[..., :3], np.asarray(picture))
    assert found.size == ((401, 300) if orientation < 5 else (300, 401))


@pytest.mark.parametrize("data", [encode(noise(9, 8), "PNG"), encode(noise(9, 8).convert("CMYK"))], ids=["PNG", "inks"])
def test_other_files_become_pictures(data: bytes) -> None:
    found = read_pixels(data)
    assert isinstance(found.pixels, Image.Image)
    np.testing.assert_array_equal(np.asarray(found.pixels), np.asarray(read_picture(data)))
    assert found.size == (9, 8)


def test_notes_and_refusals_are_the_same() -> None:
    whole = encode(noise(90, 70))
    assert read_pixels(whole).note is None
    assert read_pixels(whole[:-2]).note == read_picture(whole[:-2]).info["note"]
    with pytest.raises(PictureError) as expected:
        read_picture(whole[:-900])
    with pytest.raises(type(expected.value)) as found:
        read_pixels(whole[:-900])
    assert str(found.value) == str(expected.value)


def test_no_array_is_made_of_another_ones_picture() -> None:
    picture = noise(9, 8)
    pixels: NDArray[np.uint8] | Image.Image = read_pixels(picture).pixels
    assert isinstance(pixels, Image.Image)
    assert pixels is not picture
