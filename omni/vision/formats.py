"""The formats of pictures, decoded strictly: every pixel that the file should hold, or an error.

Most decoders continue after damage. Missing pixels become grey, black, or old contents of memory, and at best a warning is
printed. The plug-ins of Pillow in this module use each decoder in a way that makes it report damage: their `load` is strict.

| format | how lost pixels are noticed                                                                             |
|--------|---------------------------------------------------------------------------------------------------------|
| JPEG   | TurboJPEG turns each warning of libjpeg into an error; a progressive file needs a scan for every bit     |
| PNG    | all chunks that decide pixels have checksums; rows are counted if the last one is empty                  |
| GIF    | the decoder gets the first frame alone; otherwise it would continue with bytes of the next               |
| BMP    | the sizes in the header are compared with the file's                                                     |
| TIFF   | strips must cover the picture; libtiff checks compressed strips first, see `omni.vision.libtiff`         |
| WebP   | libwebp refuses damaged files by itself                                                                  |

A file whose pixels are whole is read, even if a decoder warns about something else in it. The warning is in `info["note"]`.
"""

import logging
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from simplejpeg import decode_jpeg

from omni.vision import libtiff

MAX_PIXELS = 50_000_000
"""Largest width times height, by the header alone: a file of a few kilobytes can claim a size that fills the memory."""

MAX_PARTS = 300_000
"""Most chunks, blocks, segments or strips of a file. Programs write fewer; more would only keep a reader busy."""

MAX_RUNS = 10_000_000
"""Most pixels of a BMP file with run lengths, which Pillow reads one by one."""

MAX_SCANS = 32
"""Most scans of a progressive JPEG file. Each takes as long as a whole picture. Programs write about ten."""

_WARNINGS = threading.Lock()

logging.getLogger("PIL").addHandler(logging.NullHandler())  # or Pillow would print what the error says already


def open_file(data: bytes, plugin: type[ImageFile.ImageFile]) -> ImageFile.ImageFile:
    """An image whose header has been read, and whose pixels have not been decoded.

    Raises:
        Exception: the data are damaged; decoders raise nearly anything.
    """
    if plugin not in (Gif, Tiff):
        return plugin(BytesIO(data))
    # Two plug-ins only warn about damage: about a GIF whose first frame reaches far beyond its canvas, and about a TIFF
    # whose table of tags ends early (it may then lack its orientation). Filters of warnings belong to the whole process,
    # hence the lock.
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("error", r"Truncated|Corrupt|Possibly corrupt|Tag ", UserWarning)
        return plugin(BytesIO(data))


def plugin_of(data: bytes) -> type[ImageFile.ImageFile] | None:
    """The plug-in that reads a file, by its first bytes; None if there is none.

    `Image.open` would try forty formats, some of which start other programs. It would also warn about large pictures before
    omni can check the size.
    """
    return next((plugin for magic, plugin in _FORMATS if magic.match(data)), None)


class TooLarge(ValueError):
    """A picture has more than `MAX_PIXELS`."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__(f"{width} x {height} = {width * height:,}")


class TooManyParts(ValueError):
    """A file has more than `MAX_PARTS` or `MAX_SCANS`."""

    def __init__(self, what: str = "") -> None:
        super().__init__(f"more than {what or f'{MAX_PARTS:,} parts'}")


# --- JPEG -------------------------------------------------------------------------------------------------------------


class Jpeg(ImageFile.ImageFile):
    """A JPEG file, decoded by TurboJPEG. If that fails, it is decoded again without the segments that hold no pixels.

    libjpeg gives the same warnings for lost pixels and for other data (comments, profiles, padding, a newer version of
    JFIF, a missing end marker). If there is no warning without those data, all pixels are there.
    """

    format = "JPEG"
    format_description = "JPEG, strictly"

    def _open(self) -> None:
        assert self.fp is not None
        self._data = self.fp.read()
        self._frame = frame = _frame(self._data)
        self._mode = "CMYK" if len(frame.components) == 4 else "RGB"
        self._size = frame.width, frame.height
        self.info.update(_jpeg_info(self._data))

    def draft(self, mode: str | None, size: tuple[int, int] | None) -> None:
        """Decode to 1/2, 1/4 or 1/8 of the size: the smallest whose width and height are at least `size`."""
        if self._im is None and size is not None:
            most = min(have // max(want, 1) for have, want in zip(self._size, size, strict=True))
            part = next((part for part in (8, 4, 2) if part <= most), 1)
            self._size = -(-self._size[0] // part), -(-self._size[1] // part)

    def pixels(self) -> NDArray[np.uint8]:
        """uint8[H, W, 4]: red, green, blue and an unused byte; or the four inks as they are stored.

        Raises:
            ValueError: libjpeg's first warning or error.
        """
        try:
            return self._decode(self._data)
        except ValueError as objection:
            try:
                pixels = self._decode(_without_extras(self._data))
            except ValueError:
                raise objection from None
            self.info["note"] = str(objection)
            return pixels

    def load(self) -> Any:
        """Decode; see `pixels`."""
        if self._im is None:
            # Adobe's programs store inverted inks: 0 is full ink
            stored = "RGBX" if self.mode == "RGB" else "CMYK;I" if "adobe" in self.info else "CMYK"
            self.im = Image.frombytes(self.mode, self._size, self.pixels(), "raw", stored).im
        return Image.Image.load(self)

    def _decode(self, data: bytes) -> NDArray[np.uint8]:
        if self._frame.scans:
            _check_scans(data, self._frame)
        width, height = self._size
        smaller = {} if self._size == self._frame[:2] else {"min_width": width, "min_height": height}
        pixels: NDArray[np.uint8] = decode_jpeg(data, "RGBX" if self.mode == "RGB" else "CMYK", **smaller)
        if pixels.shape != (height, width, 4):
            raise ValueError(f"its header promises {width} x {height} pixels")
        return pixels


class _Frame(NamedTuple):
    """The header of a frame."""

    width: int
    height: int
    components: bytes
    """The number of each colour."""
    scans: bool
    """Whether there are several scans, each with some bits of the pixels."""


_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # other bytes after 255 belong to pixels: 0, and restarts
_SOI, _EOI, _SOS, _ADOBE, _JFIF = 0xD8, 0xD9, 0xDA, 0xEE, 0xE0
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL, _PROGRESSIVE = frozenset((0xC0, 0xC1)), frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_DECISIVE = _FRAMES | {0xC4, 0xCC, 0xDB, 0xDC, 0xDD, _SOS, _ADOBE}
"""The segments that decide pixels: frames, tables, scans, and Adobe's about colours."""
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment, up to the end marker. The pixels of a scan follow its segment."""
    end, count = 2, 0
    while match := _MARKER.search(data, end):
        marker, start = match[0][1], match.start()
        count += 1
        if count > MAX_PARTS:
            raise TooManyParts
        if marker in (_SOI, 0x01):
            end = match.end()
            continue
        length = 0 if marker == _EOI else max(2, int.from_bytes(data[start + 2 : start + 4]))
        end = start + 2 + length
        if end > len(data):
            raise ValueError("Premature end of JPEG file")
        yield marker, start, end
        if marker == _EOI:
            return


def _frame(data: bytes) -> _Frame:
    for marker, start, _ in _segments(data):
        if marker in _FRAMES:
            bits, height, width, count = struct.unpack_from(">BHHB", data, start + 4)
            if bits != 8 or count not in (1, 3, 4):
                raise ValueError(f"{count} colours of {bits} bits, of which libjpeg makes no picture")
            components = data[start + 10 : start + 10 + 3 * count : 3]
            one_scan = any(m == _SOS and data[s + 4] == count for m, s, _ in _segments(data))
            return _Frame(width, height, components, marker in _PROGRESSIVE or not one_scan)
    raise ValueError("Premature end of JPEG file: no frame")


def _jpeg_info(data: bytes) -> dict[Any, Any]:
    """`exif`, `xmp` and `adobe`, under Pillow's names."""
    info: dict[Any, Any] = {}
    for marker, start, end in _segments(data):
        if marker == _SOS:
            break
        if marker == 0xE1 and data.startswith(_EXIF, start + 4):
            info["exif"] = info.get("exif", _EXIF) + data[start + 4 + len(_EXIF) : end]
        elif marker == 0xE1 and data.startswith(_XMP, start + 4):
            info["xmp"] = data[start + 4 + len(_XMP) : end]
        elif marker == _ADOBE and data.startswith(b"Adobe", start + 4):
            info["adobe"] = True
    return info


def _check_scans(data: bytes, frame: _Frame) -> None:
    """Check that the scans hold every bit of every coefficient of every colour. libjpeg accepts a file without some."""
    missing, scans = {component: [1] * 64 for component in frame.components}, 0
    for marker, start, end in _segments(data):
        if marker == _SOS and end - start >= 8 + 2 * data[start + 4]:
            scans += 1
            count = data[start + 4]
            first, last, bits = struct.unpack_from("BBB", data, start + 5 + 2 * count)
            for component in data[start + 5 : start + 5 + 2 * count : 2]:
                if component in missing:
                    missing[component][first : last + 1] = [bits & 15] * len(missing[component][first : last + 1])
    if scans > MAX_SCANS:
        raise TooManyParts(f"{MAX_SCANS} scans")
    if any(map(any, missing.values())):
        raise ValueError("Premature end of JPEG file: scans are missing")


def _without_extras(data: bytes) -> bytes:
    """A JPEG file with those segments alone that decide its pixels.

    Raises:
        ValueError: there are bytes between segments, so one that decides pixels may be lost.
    """
    parts, last, before, sequential = [b"\xff\xd8"], 2, 0, False
    for marker, start, end in [*_segments(data), (_EOI, len(data), len(data))]:
        between, segment = data[last:start].rstrip(b"\0"), data[start:end]
        if before == _SOS:
            parts.append(between + b"\0" if between.endswith(b"\xff") else between)
        elif before in _DECISIVE and between:
            raise ValueError("Corrupt JPEG data: extraneous bytes between tables")
        if marker == _EOI:
            break
        last, before, sequential = end, marker, sequential or marker in _SEQUENTIAL
        if marker == _SOS and sequential:  # only these values make sense, but some cameras write others
            segment = segment[:-3] + b"\0\x3f\0"
        if marker in _DECISIVE:
            parts.append(segment)
        elif marker == _JFIF and segment.startswith(b"JFIF\0", 4):
            parts.append(b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0")
    return b"".join([*parts, b"\xff\xd9"])


# --- PNG --------------------------------------------------------------------------------------------------------------


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


# --- GIF --------------------------------------------------------------------------------------------------------------


class Gif(GifImagePlugin.GifImageFile):
    """The first frame of a GIF file.

    The decoder gets no other frame. If the codes of the first end early, it would continue with bytes of the next.
    """

    def _open(self) -> None:
        assert self.fp is not None
        self.fp = BytesIO(_first_frame(self.fp.read()))
        super()._open()


def _first_frame(data: bytes) -> bytes:
    """A GIF file with the header, the first frame, and the block that names its transparent colour."""
    at = 13 + _colours(data[10])
    parts, blocks = [data[:at]], 0
    while True:
        start, kind = at, data[at]
        blocks += 1
        if blocks > MAX_PARTS:
            raise TooManyParts
        if kind == 0x2C:
            at += 10 + _colours(data[at + 9]) + 1
        elif kind == 0x21:
            at += 2
        elif kind != 0:  # a second end of blocks is allowed
            raise OSError("image file is truncated: no frame")
        while length := data[at]:
            at += 1 + length
            blocks += 1
            if blocks > MAX_PARTS:
                raise TooManyParts
        at += 1
        if kind == 0x2C or data[start + 1] == 0xF9:
            parts.append(data[start:at])
        if kind == 0x2C:
            return b"".join([*parts, b";"])


def _colours(flags: int) -> int:
    """Size of the table of colours that follows, in bytes."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


# --- BMP, TIFF, WebP --------------------------------------------------------------------------------------------------


class Bmp(BmpImagePlugin.BmpImageFile):
    """A BMP file that is as long as its header says. If run lengths end early, Pillow fills the rest with colour 0."""

    def _open(self) -> None:
        assert self.fp is not None
        super()._open()
        if self.info.get("compression") in (1, 2):
            if self.width * self.height > MAX_RUNS:
                raise ValueError(f"run lengths of more than {MAX_RUNS:,} pixels")
            self.fp.seek(0)
            file = self.fp.read()
            whole, start, size = (int.from_bytes(file[at : at + 4], "little") for at in (2, 10, 34))
            if len(file) < (start + size if size else whole):
                raise OSError("image file is truncated")


class Tiff(TiffImagePlugin.TiffImageFile):
    """The first picture of a TIFF file."""

    def _open(self) -> None:
        assert self.fp is not None
        sizes = tag_sizes(self.fp.read())
        if sum(sizes.values()) > self.fp.tell():
            raise OSError("its tags are larger than the file")
        if (
            max(sizes.get(tag, 0) for tag in (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.TILEOFFSETS))
            > 8 * MAX_PARTS
        ):
            raise TooManyParts
        self.fp.seek(0)
        super()._open()

    def load(self) -> Any:
        """Decode.

        Raises:
            OSError: libtiff reports damage, or the strips do not cover the picture, so that the rest would be black.
        """
        if self.tile and self.use_load_libtiff:
            assert isinstance(self.fp, BytesIO)
            libtiff.check(self.fp.getvalue(), self.tag_v2[TiffImagePlugin.IMAGEWIDTH] if self.mode == "1" else 0)
        elif self.tile:
            width, height = self.tag_v2[TiffImagePlugin.IMAGEWIDTH], self.tag_v2[TiffImagePlugin.IMAGELENGTH]
            layers = len(self.getbands()) if self.tag_v2.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2 else 1
            extents = [tile.extents or (0, 0, 0, 0) for tile in self.tile]
            if sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in extents) < width * height * layers:
                raise OSError("image file is truncated: strips are missing")
        return super().load()

    def load_end(self) -> None:
        """Turn the picture upright. Pillow would read more tables of tags here, whose sizes nobody has checked."""
        ImageOps.exif_transpose(self, in_place=True)


_UNITS = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Size of a value in bytes, for each type of more than one byte."""


def tag_sizes(data: bytes) -> dict[int, int]:
    """The size of each tag in the first table of a TIFF file, in bytes. EXIF data begin with such a table, too.

    Tags may share bytes. A reader of the whole table may hold the whole file in memory for each tag, up to 65,535 times.
    """
    order, big = "<" if data[:1] == b"I" else ">", b"+" in data[2:4]
    sizes: dict[int, int] = {}
    with suppress(struct.error):  # the table ends early; the plug-in reports it
        (at,) = struct.unpack_from(order + ("8xQ" if big else "4xI"), data)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
        entry = struct.Struct(order + ("HHQ8x" if big else "HHI4x"))
        for number in range(count):
            tag, kind, values = entry.unpack_from(data, at + (8 if big else 2) + number * entry.size)
            sizes[tag] = sizes.get(tag, 0) + values * _UNITS.get(kind, 1)
    return sizes


class WebP(WebPImagePlugin.WebPImageFile):
    """A WebP file. The size of its canvas is read first, because Pillow takes memory for two before it tells the size."""

    def _open(self) -> None:
        assert self.fp is not None
        header = self.fp.read(30)
        width, height = (1 + int.from_bytes(header[at : at + 3], "little") for at in (24, 27))
        if header[12:16] == b"VP8X" and width * height > MAX_PIXELS:
            raise TooLarge(width, height)
        self.fp.seek(0)
        super()._open()


_FORMATS: tuple[tuple[re.Pattern[bytes], type[ImageFile.ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), Jpeg),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), Png),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), WebP),
    (re.compile(rb"GIF8[79]a"), Gif),
    (re.compile(rb"BM"), Bmp),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), Tiff),
)
