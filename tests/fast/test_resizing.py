"""Scaling against Pillow's own: the same bytes, whatever the sizes."""

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image

from omni.fast import resizing
from omni.fast.resizing import resize


def draw(width: int, height: int, seed: int) -> Image.Image:
    """Noise of all values, or of 0 and 255 alone, where rounding and overflow show."""
    random = np.random.default_rng(seed)
    values = (
        random.integers(0, 256, (height, width, 3)) if seed % 2 else random.integers(0, 2, (height, width, 3)) * 255
    )
    return Image.fromarray(values.astype(np.uint8))


def with_fourth_byte(picture: Image.Image) -> NDArray[np.uint8]:
    """uint8[H, W, 4], the last of each something that would show."""
    values = np.asarray(picture)
    return np.concatenate([values, 255 - values[..., :1]], axis=2)


def sizes() -> list[tuple[int, int, int, int]]:
    """Width and height before and after: photographs, the same size, single pixels, and whatever chance gives."""
    random = np.random.default_rng(7)
    small = [tuple(map(int, random.integers(1, 50, 4))) for _ in range(40)]
    large = [(*map(int, random.integers(1, 700, 2)), 224, 224) for _ in range(20)]
    chosen = [(640, 480, 224, 224), (480, 640, 224, 224), (224, 224, 224, 224), (224, 100, 224, 50), (1, 1, 224, 224)]
    return [*chosen, (1, 100, 9, 9), (1, 101, 9, 9), (3, 700, 30, 224), (1300, 5, 3, 8), (17, 17, 1, 1), *small, *large]


def test_the_bytes_are_those_of_pillow(compiles: bool) -> None:
    assert (resizing._library() is not None) == compiles
    for seed, (width, height, new_width, new_height) in enumerate(sizes()):
        picture = draw(width, height, seed)
        expected = np.asarray(picture.resize((new_width, new_height), Image.Resampling.BILINEAR))
        found = resize(picture, new_width, new_height, Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(found, expected, f"{width}x{height} to {new_width}x{new_height}")
        found = resize(with_fourth_byte(picture), new_width, new_height, Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(found, expected, f"{width}x{height} to {new_width}x{new_height}, pixels")


def test_a_picture_in_several_pieces_of_memory_is_scaled_too() -> None:
    picture = Image.new("RGB", (2200, 2000), (10, 200, 30))
    picture.paste((250, 0, 5), (300, 1500, 1900, 1990))
    assert resizing._pixels(picture) is None
    expected = np.asarray(picture.resize((224, 224), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize(picture, 224, 224, Image.Resampling.BILINEAR), expected)


def test_a_picture_in_foreign_memory_is_scaled_too() -> None:
    picture = draw(90, 70, 1)
    shared = Image.fromarrow(pa.array(picture), "RGB", picture.size)  # Pillow dies of giving this to Arrow once more
    np.testing.assert_array_equal(resize(shared, 40, 50, 2), resize(picture, 40, 50, 2))


@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 1, 0), (0, 2, 1)])
def test_pixels_in_any_order_of_memory_are_scaled(axes: tuple[int, ...]) -> None:
    picture = draw(90, 70, 1)
    expected = np.asarray(picture.resize((40, 50), Image.Resampling.BILINEAR))
    turned = np.ascontiguousarray(with_fourth_byte(picture).transpose(axes)).transpose(np.argsort(axes))
    doubled = with_fourth_byte(picture).repeat(2, axis=1)[:, ::2]
    for pixels in (turned, doubled, np.asarray(picture)):
        np.testing.assert_array_equal(resize(pixels, 40, 50, Image.Resampling.BILINEAR), expected)


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (-3, 5)])
def test_an_invalid_size_is_refused(width: int, height: int) -> None:
    with pytest.raises(ValueError, match="must be > 0"):
        resize(with_fourth_byte(draw(9, 7, 1)), width, height, Image.Resampling.BILINEAR)


@pytest.mark.parametrize("resample", [*Image.Resampling])
def test_other_filters_are_pillows(resample: Image.Resampling) -> None:
    picture = draw(90, 70, 1)
    expected = np.asarray(picture.resize((40, 50), resample))
    np.testing.assert_array_equal(resize(picture, 40, 50, resample), expected)
    np.testing.assert_array_equal(resize(with_fourth_byte(picture), 40, 50, resample), expected)


def test_without_a_compiler_it_is_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resizing, "_library", lambda: None)
    picture = draw(300, 200, 1)
    expected = np.asarray(picture.resize((224, 224), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize(picture, 224, 224, Image.Resampling.BILINEAR), expected)
