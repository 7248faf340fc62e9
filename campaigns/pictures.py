"""Damaged pictures: each is read whole, or refused in a sentence; see `damage`.

Two more failures: `omni.fast` and Pillow read different pixels, or a picture has more pixels than a server counts.
"""

import struct
import zlib
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from campaigns.damage import Look, read_damaged
from campaigns.tally import Tally


def drawings() -> dict[str, bytes]:
    """A file of each kind."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:61, 0:83]
    waves = np.stack([127 + 120 * np.sin(rows / 9 + each) * np.cos(columns / 7 - each) for each in range(3)], axis=-1)
    photo = Image.fromarray((waves + rng.normal(0, 6, waves.shape)).clip(0, 255).astype(np.uint8))
    grey, flat = photo.convert("L"), photo.quantize(40)
    clear = photo.convert("RGBA")
    clear.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    floats = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    page = Image.fromarray(np.where((rows // 5 + columns // 11) % 3, 255, 0).astype(np.uint8)).convert("1")
    exif = Image.Exif()
    exif[0x0112] = 6
    animated = {"save_all": True, "append_images": [photo.rotate(90), photo.rotate(45)]}

    def file(image: Image.Image, kind: str, **options: Any) -> bytes:
        stream = BytesIO()
        image.save(stream, kind, **options)
        return stream.getvalue()

    strips = {278: 8}
    kinds = {
        "jpeg": file(photo, "JPEG", quality=90),
        "jpeg 4:4:4": file(photo, "JPEG", subsampling=0, quality=95),
        "jpeg 4:1:1": simplejpeg.encode_jpeg(np.asarray(photo), colorsubsampling="411"),
        "jpeg grey": file(grey, "JPEG"),
        "jpeg progressive": file(photo, "JPEG", progressive=True),
        "jpeg progressive grey": file(grey, "JPEG", progressive=True),
        "jpeg with restarts": file(photo, "JPEG", restart_marker_blocks=4),
        "jpeg of inks": file(photo.convert("CMYK"), "JPEG"),
        "jpeg red, green, blue": file(photo, "JPEG", keep_rgb=True),
        "jpeg turned": file(photo, "JPEG", exif=exif),
        "jpeg of a phone": file(photo, "MPO", **animated),
        "png": file(photo, "PNG"),
        "png grey": file(grey, "PNG"),
        "png of bits": file(page, "PNG"),
        "png palette": file(flat, "PNG"),
        "png palette with alpha": file(flat, "PNG", transparency=bytes(range(0, 240, 6))),
        "png with alpha": file(clear, "PNG"),
        "png grey with alpha": file(clear.convert("LA"), "PNG"),
        "png of 16 bits": file(deep, "PNG"),
        "png with a clear colour": file(photo, "PNG", transparency=(100, 120, 130)),
        "png interlaced": interlaced(np.asarray(photo)),
        "png animated": file(photo, "PNG", **animated),
        "png turned": file(photo, "PNG", exif=exif),
        "gif": file(photo, "GIF"),
        "gif in order": file(photo, "GIF", interlace=0),
        "gif grey": file(grey, "GIF"),
        "gif with a clear colour": file(flat, "GIF", transparency=3),
        "gif animated": file(photo, "GIF", **animated),
        "bmp": file(photo, "BMP"),
        "bmp palette": file(flat, "BMP"),
        "bmp of bits": file(page, "BMP"),
        "bmp with alpha": file(clear, "BMP"),
        "bmp run lengths": run_lengths(np.asarray(grey) // 64),
        "webp": file(photo, "WEBP"),
        "webp lossless": file(photo, "WEBP", lossless=True),
        "webp with alpha": file(clear, "WEBP"),
        "webp animated": file(photo, "WEBP", **animated),
        "tiff": file(photo, "TIFF"),
        "tiff strips": file(photo, "TIFF", tiffinfo=strips),
        "tiff big": file(photo, "TIFF", big_tiff=True),
        "tiff floats": file(floats, "TIFF"),
        "tiff of 16 bits": file(deep, "TIFF"),
        "tiff of inks": file(photo.convert("CMYK"), "TIFF"),
        "tiff turned": file(photo, "TIFF", tiffinfo={274: 6}),
        "tiff tiles": tiles(np.asarray(photo)),
        "tiff tiles deflated": tiles(np.asarray(photo), zlib.compress),
        "tiff planes": planes(np.asarray(photo)),
        "tiff planes deflated": planes(np.asarray(photo), zlib.compress),
        "tiff luminance and colour": file(photo.convert("YCbCr"), "TIFF", compression="tiff_lzw"),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma"):
        kinds[f"tiff {compression}"] = file(photo, "TIFF", compression=compression, tiffinfo=strips)
    for compression in ("group3", "group4", "tiff_ccitt"):
        kinds[f"tiff {compression}"] = file(page, "TIFF", compression=compression)
        kinds[f"tiff {compression} in strips"] = file(page, "TIFF", compression=compression, tiffinfo=strips)
    return kinds


def interlaced(pixels: np.ndarray) -> bytes:
    """A PNG file in seven passes, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    passes = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
    rows = [row for left, across, top, down in passes for row in pixels[top::down, left::across] if row.size]
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiles(pixels: np.ndarray, pack: Callable[[bytes], bytes] = bytes) -> bytes:
    """A TIFF file of tiles, which Pillow does not write."""
    height, width = pixels.shape[:2]
    whole = np.pad(pixels, ((0, -height % 32), (0, -width % 32), (0, 0)))
    corners = [(top, left) for top in range(0, height, 32) for left in range(0, width, 32)]
    parts = [pack(whole[top : top + 32, left : left + 32].tobytes()) for top, left in corners]
    return tiff(pixels, parts, 324, 325, {259: 1 if pack is bytes else 8, 322: 32, 323: 32})


def planes(pixels: np.ndarray, pack: Callable[[bytes], bytes] = bytes) -> bytes:
    """A TIFF file of three planes."""
    parts = [pack(pixels[..., colour].tobytes()) for colour in range(3)]
    return tiff(pixels, parts, 273, 279, {259: 1 if pack is bytes else 8, 278: len(pixels), 284: 2})


def tiff(pixels: np.ndarray, parts: list[bytes], starts: int, lengths: int, more: dict[int, int]) -> bytes:
    """Of the parts; the tags in which their starts and lengths stand, and more tags."""
    at = [8 + sum(map(len, parts[:number])) for number in range(len(parts) + 1)]
    lists = struct.pack(f"<{2 * len(parts)}I3H", *at[:-1], *map(len, parts), 8, 8, 8)
    values = {256: pixels.shape[1], 257: pixels.shape[0], 262: 2, 277: 3} | more
    entries = [(tag, 4, 1, value) for tag, value in values.items()]
    entries += [(starts, 4, len(parts), at[-1]), (lengths, 4, len(parts), at[-1] + 4 * len(parts))]
    entries += [(258, 3, 3, at[-1] + 8 * len(parts))]
    body = b"".join(parts) + lists
    table = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(entries)) + table + bytes(4)


def run_lengths(pixels: np.ndarray) -> bytes:
    """A BMP file of run lengths, which Pillow does not write."""
    runs = bytearray()
    for row in pixels[::-1]:
        start = 0
        for stop in [*(np.flatnonzero(np.diff(row)) + 1), len(row)]:
            runs += bytes((stop - start, row[start]))
            start = stop
        runs += b"\0\0"
    palette = b"".join(bytes((60 * each, 0, 255 - 60 * each, 0)) for each in range(4)) + bytes(4 * 252)
    start = 54 + len(palette)
    header = struct.pack("<2sIHHI", b"BM", start + len(runs) + 2, 0, 0, start)
    sizes = struct.pack("<IiiHHIIiiII", 40, pixels.shape[1], pixels.shape[0], 1, 8, 1, len(runs) + 2, 0, 0, 256, 0)
    return header + sizes + palette + bytes(runs) + b"\0\1"


def look() -> Look:
    """What a process makes of the bytes of a picture."""
    from omni.vision.pictures import PictureError, read_picture
    from omni.vision.plugin import count_pixels

    fast = import_module("omni.fast.jpeg") if find_spec("omni.fast") else None

    def read(data: bytes) -> tuple[str, bytes]:
        picture = read_picture(data)
        pixels = np.asarray(picture)
        if fast and not np.array_equal(np.asarray(fast.read_pixels(data).pixels)[..., :3], pixels):
            raise RuntimeError("it is read two ways")
        if (measured := count_pixels(data)) < picture.width * picture.height:
            raise RuntimeError(f"{picture.size} pixels are counted as {measured}")
        return "x".join(map(str, pixels.shape)), pixels.tobytes()

    return Look(read, PictureError)


ENDS = {"jpeg": b"\xff\xd9", "png": b"\0\0\0\0IEND\xaeB`\x82", "gif": b";"}


def run(seed: int, count: int, seconds: float) -> Tally:
    """Read `count` damaged pictures, or as many as fit into the time."""
    return read_damaged("campaigns.pictures", drawings(), ENDS, seed, count, seconds)
