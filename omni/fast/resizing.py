"""Resizes pictures to the same bytes as Pillow's `Image.resize`, several times as fast.

Decoding and resizing take most of the time between a file and an encoder. Pillow computes one pixel at a time; `resize.cpp`
does the same arithmetic on vectors. Without compiled code, Pillow resizes.
"""

import ctypes
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from omni.fast.compilation import address, compile_library, fits
from omni.fast.jpeg import Pixels

BITS, HALF = 22, 11
"""Weights are integers, multiples of 2^-22."""


def resize(picture: Pixels, width: int, height: int, resample: int) -> NDArray[np.uint8]:
    """A picture of any size -> uint8[height, width, 3], the same bytes as Pillow's `Image.resize`."""
    if resample == Image.Resampling.BILINEAR and (library := _library()) is not None:
        pixels = _pixels(picture) if isinstance(picture, Image.Image) else picture
        if pixels is not None and min(width, height) > 0 and _is_for_us(pixels):
            return _resize(library, pixels, width, height)
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture[..., :3])
    return np.asarray(image.resize((width, height), Image.Resampling(resample)))


def _is_for_us(pixels: NDArray[np.uint8]) -> bool:
    if pixels.ndim != 3 or not 0 < len(pixels) <= 100 * pixels.shape[1]:
        return False  # if a picture is higher, Pillow resizes the columns first
    return fits(pixels, np.uint8, *pixels.shape[:2], 4)


def _resize(library: ctypes.CDLL, pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """uint8[H, W, 4] -> uint8[height, width, 3]"""
    rows, columns = pixels.shape[:2]
    firsts, across = _across(columns, width, library.resize_neighbours())
    first_rows, counts, down = _weights(rows, height, 1)
    taps, taps_down = across.shape[2] * 2, down.shape[1]
    result = np.empty((height, width, 3), np.uint8)
    library.resize(
        address(pixels, np.uint8, rows, columns, 4),
        rows,
        columns,
        address(result, np.uint8, height, width, 3),
        height,
        width,
        address(firsts, np.int32, width),
        address(across, np.int16, width, 2, taps // 2, 4, 2),
        taps,
        address(first_rows, np.int32, height),
        address(counts, np.int32, height),
        address(down, np.int32, height, taps_down),
        taps_down,
    )
    return result


def _pixels(picture: Image.Image) -> NDArray[np.uint8] | None:
    """Pillow's own memory of an RGB picture, uint8[H, W, 4]; None if it is not in one piece or not accessible."""
    if picture.mode != "RGB" or picture.readonly or not hasattr(picture, "__arrow_c_array__"):
        return None  # to export memory that is not its own, Pillow crashes (its issue 9896)
    import pyarrow as pa  # not at the top, because it takes a quarter of a second

    try:
        pixels: Any = pa.array(picture)
    except ValueError:
        return None
    values = np.frombuffer(pixels.values.buffers()[1], np.uint8)  # `to_numpy` would import pandas
    return values.reshape(picture.height, picture.width, 4)


@lru_cache(maxsize=64)
def _weights(size: int, new: int, multiple: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """For each of `new` pixels: its first neighbour, how many neighbours it has, and their weights, int32[new, taps].

    This follows Pillow step by step (`precompute_coeffs` and `normalize_coeffs_8bpc` in its Resample.c), in float64. `taps`
    is a multiple of `multiple`.
    """
    scale = size / new
    stretch = max(scale, 1.0)
    center = (np.arange(new) + 0.5) * scale
    first = np.maximum((center - stretch + 0.5).astype(np.int64), 0)
    counts = np.minimum((center + stretch + 0.5).astype(np.int64), size) - first
    neighbours = np.arange(-(-counts.max() // multiple) * multiple)
    distance = np.abs((neighbours + first[:, None] - center[:, None] + 0.5) * (1.0 / stretch))
    weights = np.where((distance < 1.0) & (neighbours < counts[:, None]), 1.0 - distance, 0.0)
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # a sum in Pillow's order
    integers = (0.5 + weights * (1 << BITS)).astype(np.int32)
    return first.astype(np.int32), counts.astype(np.int32), integers


@lru_cache(maxsize=64)
def _across(size: int, new: int, multiple: int) -> tuple[NDArray[np.int32], NDArray[np.int16]]:
    """First neighbours and weights of columns as `resize.cpp` reads them, int16[new, 2, taps / 2, 4, 2]."""
    firsts, _, weights = _weights(size, new, multiple)
    halves = np.stack([weights >> HALF, weights & ((1 << HALF) - 1)], axis=1).astype(np.int16)
    return firsts, np.repeat(halves.reshape(new, 2, -1, 1, 2), 4, axis=3)


@cache
def _library() -> ctypes.CDLL | None:
    library = compile_library(Path(__file__).with_name("resize.cpp"), "resize", "resize_neighbours")
    if library is not None:
        address, count = ctypes.c_void_p, ctypes.c_long
        library.resize.argtypes = [address, count, count, address, count, count]
        library.resize.argtypes += [address, address, count, address, address, address, count]
        library.resize.restype = None
    return library
