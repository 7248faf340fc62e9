"""PNG, of which checksums are compared and rows are counted."""

import struct
import zlib
from io import BytesIO
from typing import Any

from PIL import Image, PngImagePlugin

from omni.vision.formats.limits import MAX_PARTS, TooManyParts


class Png(PngImagePlugin.PngImageFile):
    """A PNG file. The decoder gets only the chunks that decide pixels and orientation.

    Other chunks (comments, profiles, further frames) may be long or damaged. Pillow does not compare the checksums of chunks
    with pixels, and it accepts compressed data that end properly, however few rows they hold. So this class does both.
    """

    def _open(self) -> None:
        assert self.fp is not None
        data = self.fp.read()
        chunks, damaged = _chunks(data)
        about = [
            data[start - 8 : end + 4]
            for kind, start, end in chunks
            if kind in _ABOUT and data.startswith(_ABOUT[kind], start) and end - start <= 0xFFFF
        ]
        pixels = [data[start - 8 : end + 4] for kind, start, end in chunks if kind in _PIXELS]
        self.fp = BytesIO(b"".join([data[:33], *about, *pixels]))
        super()._open()
        if damaged:
            self.info["note"] = f"bad checksum in chunk {', '.join(sorted(damaged))}"

    def load(self) -> Any:
        """Decode, and count the rows if the last one holds only zeros.

        Raises:
            OSError: there are fewer rows than the header says.
        """
        fresh, file = bool(self.tile), self.fp
        loaded = super().load()
        if fresh and isinstance(file, BytesIO):
            width, height = self.size
            last = self.crop((0, height - 1, width, height))
            if (self.info.get("interlace") or not any(last.tobytes())) and not _all_rows(file.getvalue()):
                raise OSError("image file is truncated: rows are missing")
        return loaded

    def getexif(self) -> Image.Exif:
        """The EXIF data in the chunks. They are known before decoding."""
        return Image.Image.getexif(self)


_PIXELS = frozenset((b"PLTE", b"tRNS", b"IDAT", b"IEND"))
_ABOUT = {
    b"eXIf": b"",
    b"iTXt": b"XML:com.adobe.xmp\0",
    b"zTXt": b"Raw profile type exif\0",
    b"tEXt": b"Raw profile type exif\0",
}
"""Chunks that hold the orientation, and how they begin. It takes few bytes, so long chunks are skipped."""
_OTHERS = frozenset(
    b"acTL bKGD cHRM cICP dSIG eXIf fcTL fdAT gAMA hIST iCCP iTXt oFFs pHYs sBIT sPLT sRGB tEXt tIME zTXt".split()
)
_ADAM7 = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
"""For each pass of an interlaced picture: first column and step, first row and step."""


def _chunks(data: bytes) -> tuple[list[tuple[bytes, int, int]], set[str]]:
    """For each chunk its kind, and start and end of its data. Then the kinds of damaged chunks that are not needed."""
    chunks: list[tuple[bytes, int, int]] = []
    damaged: set[str] = set()
    view, start, kind = memoryview(data), 16, b""
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", data, start - 8)
        end = start + length
        if end + 4 > len(data):
            raise OSError(f"image file is truncated in chunk {kind!r}")
        if zlib.crc32(view[start - 4 : end]) != int.from_bytes(data[end : end + 4]):
            if kind not in _OTHERS:
                raise OSError(f"bad checksum in chunk {kind!r}")
            damaged.add(kind.decode())
        else:
            chunks.append((kind, start, end))
        if kind not in _PIXELS and kind[0] & 0x20 == 0 and (kind, start) != (b"IHDR", 16):
            raise OSError(f"unknown critical chunk {kind!r}")
        if kind == b"IEND":
            break
        start = end + 12
    else:
        raise TooManyParts
    if chunks[0] != (b"IHDR", 16, 29):
        raise OSError("no header at its start")
    return chunks, damaged


def _all_rows(data: bytes) -> bool:
    """Whether the compressed data of a PNG file hold as many bytes as its header says."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * {2: 3, 4: 2, 6: 4}.get(colour, 1)
    passes = _ADAM7 if interlaced else ((0, 1, 0, 1),)
    missing = 0
    for left, across, top, down in passes:
        columns, rows = (width - left + across - 1) // across, (height - top + down - 1) // down
        missing += rows * (1 + (columns * bits + 7) // 8) if columns > 0 else 0
    inflate = zlib.decompressobj()
    for kind, start, end in _chunks(data)[0]:
        for at in range(start, end, 0x10000) if kind == b"IDAT" else ():
            missing -= len(inflate.decompress(data[at : min(end, at + 0x10000)]))
            if missing <= 0:
                return True
    return False
