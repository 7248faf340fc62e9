"""JPEG, decoded by TurboJPEG, which turns each warning of libjpeg into an error."""

import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from simplejpeg import decode_jpeg

from omni.vision.formats.limits import MAX_PARTS, TooManyParts

MAX_SCANS = 32
"""Most scans of a progressive JPEG file. Each takes as long as a whole picture. Programs write about ten."""


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
