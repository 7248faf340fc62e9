"""Asks libtiff whether a compressed TIFF file is whole. Pillow does not ask.

libtiff prints that strips are damaged, and continues. For a fax that ends early it prints nothing, and leaves the rest of
the rows as they were in memory. So this module first reads all strips with libtiff's own functions. Every error and every
warning about pixels counts. Each strip is read into two different backgrounds, and neither may show.

The library is the one that Pillow has loaded. Its functions are called through ctypes.
"""

import ctypes
from functools import cache
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import _imaging

_HANDLER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p
)
"""int (*)(TIFF *, void *user_data, const char *module, const char *format, va_list)"""


MAX_STRIP = 500_000_000
"""The largest strip or tile that is read, in bytes."""


def check(data: bytes, bits: int = 0) -> None:
    """Read all pixels of the first picture of a TIFF file.

    Args:
        data: the file.
        bits: how many a row has, if they fill no whole number of bytes. The rest of the last byte does not count.

    Raises:
        OSError: libtiff reports damage, or it cannot be asked.
    """
    library = _library()
    if library is None:
        raise OSError("compressed, and this build of Pillow does not let libtiff be asked whether it is whole")
    errors: list[str] = []
    warnings: list[str] = []
    handlers = [_HANDLER(_Collector(each)) for each in (errors, warnings)]
    options = library.TIFFOpenOptionsAlloc()
    library.TIFFOpenOptionsSetErrorHandlerExtR(options, handlers[0], None)
    library.TIFFOpenOptionsSetWarningHandlerExtR(options, handlers[1], None)
    try:
        with TemporaryFile() as file:
            file.write(data)
            file.seek(0)
            tiff = library.TIFFFdOpenExt(file.fileno(), b"", b"r", options)
            if tiff:
                try:
                    warnings.clear()  # about tags
                    _read(library, tiff, bits, errors)
                finally:
                    library.TIFFCleanup(tiff)  # closes nothing, the descriptor is Python's
    finally:
        library.TIFFOpenOptionsFree(options)
    if errors or warnings:
        raise OSError([*errors, *warnings][0])


def _read(library: Any, tiff: int, bits: int, errors: list[str]) -> None:
    tiled = library.TIFFIsTiled(tiff)
    size = (library.TIFFTileSize64 if tiled else library.TIFFStripSize64)(tiff)
    count = (library.TIFFNumberOfTiles if tiled else library.TIFFNumberOfStrips)(tiff)
    if not 0 < size <= MAX_STRIP:
        errors.append(f"strips of {size:,} bytes")
        return
    read = library.TIFFReadEncodedTile if tiled else library.TIFFReadEncodedStrip
    first, second = np.empty(size, np.uint8), np.empty(size, np.uint8)
    for number in range(count):
        first.fill(0x55)
        second.fill(0xAA)
        lengths = {read(tiff, number, buffer.ctypes.data, size) for buffer in (first, second)}
        length = lengths.pop()
        shown: NDArray[np.uint8] = np.bitwise_xor(first[: max(length, 0)], second[: max(length, 0)])
        if bits % 8 and not tiled:
            shown = np.unpackbits(shown.reshape(-1, bits // 8 + 1), axis=1, count=bits)
        if lengths or length < 0 or shown.any():
            errors.append(f"image file is truncated in strip {number}")
        if errors:
            return


class _Collector:
    """Collects libtiff's messages."""

    def __init__(self, messages: list[str]) -> None:
        self.messages = messages

    def __call__(self, tiff: int, user: int, module: bytes, layout: bytes, values: int) -> int:
        text = ctypes.create_string_buffer(500)
        ctypes.pythonapi.PyOS_vsnprintf(text, ctypes.c_size_t(len(text)), layout, ctypes.c_void_p(values))
        self.messages.append(text.value.decode("utf-8", "replace"))
        return 1  # so that libtiff does not print it as well


@cache
def _library() -> Any:
    """Pillow's libtiff, 4.5 or newer; None if its functions cannot be called."""
    address, number, text = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_char_p
    try:
        library = ctypes.CDLL(_imaging.__file__)
        for name, result, *arguments in (
            ("TIFFOpenOptionsAlloc", address),
            ("TIFFOpenOptionsFree", None, address),
            ("TIFFOpenOptionsSetErrorHandlerExtR", None, address, _HANDLER, address),
            ("TIFFOpenOptionsSetWarningHandlerExtR", None, address, _HANDLER, address),
            ("TIFFFdOpenExt", address, ctypes.c_int, text, text, address),
            ("TIFFCleanup", None, address),
            ("TIFFIsTiled", ctypes.c_int, address),
            ("TIFFTileSize64", ctypes.c_uint64, address),
            ("TIFFStripSize64", ctypes.c_uint64, address),
            ("TIFFNumberOfTiles", number, address),
            ("TIFFNumberOfStrips", number, address),
            ("TIFFReadEncodedTile", ctypes.c_ssize_t, address, number, address, ctypes.c_ssize_t),
            ("TIFFReadEncodedStrip", ctypes.c_ssize_t, address, number, address, ctypes.c_ssize_t),
        ):  # fmt: skip
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (AttributeError, OSError):
        return None
    return library
