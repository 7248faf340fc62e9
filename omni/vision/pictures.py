"""A file, bytes or a PIL image becomes RGB pixels, or an error of one sentence.

Every picture enters through `read_picture`. It returns a picture of mode RGB that is upright and fully decoded, with no open
file, and without metadata that a later tool could apply a second time.

    picture = read_picture("photo.jpg")

`picture_size` reads the size from the header alone.

What each kind of picture becomes:

| stored as                       | becomes                                                                          |
|---------------------------------|----------------------------------------------------------------------------------|
| grey, 1-bit, palette            | RGB of the same colours                                                          |
| alpha of any kind               | drawn over white, as on a page                                                   |
| CMYK                            | RGB; amounts of ink in a JPEG are inverted if it has Adobe's marker              |
| 16-bit grey                     | 0..65535 scaled to 0..255 (Pillow would clip everything above 255 to white)      |
| 32-bit integers, floats         | scaled to 0..255 from the narrowest of 0..1 (floats), 0..255 and 0..65535 that   |
|                                 | holds them all, or else from their own minimum and maximum                       |
| EXIF orientation                | applied                                                                          |
| animation, several pages        | the first                                                                        |
| colour profile, gamma           | ignored                                                                          |

A file that has lost pixels is refused, never filled up (`omni.vision.formats`). A cut is noticed in all formats. A changed
byte is always noticed in PNG, which has checksums; elsewhere only if the data then make no sense.
"""

import os
import re
import struct
from functools import reduce
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from omni.files import ReadError, read_whole
from omni.modality import ItemError
from omni.vision import formats
from omni.vision.formats.jpeg import Jpeg
from omni.vision.formats.limits import MAX_PIXELS, TooLarge
from omni.vision.formats.tags import tag_sizes

MAX_BYTES = 10 * MAX_PIXELS
"""Largest size of a file. Without compression, with four colours of 16 bits, a picture has 8 bytes for each pixel."""

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image

EXPECTED = "a JPEG, PNG, WebP, GIF, BMP or TIFF picture"

_CONVERT = "convert it to PNG or JPEG"
_STRANGERS: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer", "run `git lfs pull` to get the picture itself"),
    (re.compile(rb"\s*(<!doctype html|<html)", re.IGNORECASE), "a web page", "download the picture itself"),
    (re.compile(rb"\s*(<\?xml|<svg)", re.IGNORECASE), "an SVG drawing or other XML", _CONVERT),
    (re.compile(rb".{4}ftyp(heic|heix|heif|mif1|msf1)", re.DOTALL), "a HEIC picture", _CONVERT),
    (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "an AVIF picture", _CONVERT),
    (re.compile(rb".{4}ftyp", re.DOTALL), "a video", "export a frame of it as PNG or JPEG"),
    (re.compile(rb"%PDF"), "a PDF document", "export the page as PNG or JPEG"),
    (re.compile(rb"8BPS"), "a Photoshop document", _CONVERT),
    (re.compile(rb"PK\x03\x04"), "a ZIP archive", "unpack it first"),
)
"""Files that people pass by mistake: how they begin, what they are, what to do."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""For each EXIF orientation, the step that undoes it."""


class PictureError(ItemError):
    """A picture cannot be read. The message is one sentence: which one, what was expected and found, what to do."""


class MissingPictureError(PictureError):
    """The file does not exist."""

    kind = "missing"


class TruncatedPictureError(PictureError):
    """The data end too early."""

    kind = "truncated"


class LargePictureError(PictureError):
    """The picture is larger than `MAX_PIXELS`, or its file than `MAX_BYTES`."""

    kind = "too large"


def read_picture(source: Source, at_least: int | None = None) -> Image.Image:
    """Read one picture as an upright RGB image of uint8[H, W, 3].

    Args:
        source: a path, the bytes of a picture file, or a PIL image. A PIL image gives the same pixels as the file that it
            was opened from, and is not changed. If PIL has decoded it already, its pixels count as whole.
        at_least: decode a JPEG file at 1/2, 1/4 or 1/8 of its size, the smallest whose sides both have at least so many
            pixels. This is faster than decoding the whole picture and scaling it down, and the pixels differ slightly.
            Other formats are decoded whole.

    Returns:
        The picture. Its `info` may hold "full_size", the (width, height) of a picture that was decoded smaller, and
        "note", a decoder's warning about a file whose pixels are all there.

    Raises:
        PictureError: the file is missing, unreadable, no picture, cut off, damaged or larger than `MAX_PIXELS`.
    """
    return decode(open_picture(source, at_least))


def picture_size(source: Source) -> tuple[int, int]:
    """Width and height of the picture that `read_picture` would return, from the header alone.

    Raises:
        PictureError: as `read_picture`, but damaged pixels are not noticed.
    """
    return open_picture(source).full_size


class Opened(NamedTuple):
    """A picture whose header has been read, and whose pixels have not been decoded."""

    image: Image.Image
    name: str
    full_size: tuple[int, int]
    """Width and height of the upright picture, before it is decoded smaller."""
    is_own: bool
    """Whether the image belongs to omni, so that it may be changed."""


def open_picture(source: Source, at_least: int | None = None) -> Opened:
    """Read the header of a picture as `read_picture` does. `decode` or another function then decodes its pixels.

    Raises:
        PictureError: see `read_picture`.
    """
    name = _name(source)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        # some libraries set this for the whole process; the missing part of a picture would then be grey
        raise PictureError(
            f"{name} is not read while PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, expected it to be False "
            "because cut-off pictures would pass for whole ones; set it back to False after whatever set it to True."
        )
    if isinstance(source, Image.Image):
        data = _file_of(source)
    elif isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    else:
        data = _read(os.fsdecode(source))
    image = source if isinstance(source, Image.Image) and data is None else _header(data or b"", name)
    _check_size(image, name)
    full_size = image.size
    if not isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow gives a TIFF's size after turning it upright
        full_size = turned(full_size, orientation(image))
    if at_least is not None and isinstance(image, Jpeg):
        image.draft(None, (at_least, at_least))
    return Opened(image, name, full_size, is_own=image is not source)


def _name(source: Source) -> str:
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        return f"The PIL image of {os.fsdecode(filename)!r}" if filename else "The given PIL image"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"The given picture ({len(source):,} bytes)"
    if isinstance(source, str | os.PathLike):
        return repr(os.fsdecode(source))
    raise TypeError(f"read_picture takes a path, bytes or a PIL image, not {type(source).__name__}")


# --- Files ------------------------------------------------------------------------------------------------------------


def _read(path: str) -> bytes:
    try:
        return read_whole(path, "picture", EXPECTED, MAX_BYTES)
    except ReadError as error:
        raise said_of_picture(error) from error


def said_of_picture(error: ReadError) -> PictureError:
    """The same about a picture."""
    kinds = {"missing": MissingPictureError, "too large": LargePictureError}
    return kinds.get(error.kind, PictureError)(str(error))


def _file_of(image: Image.Image) -> bytes | None:
    """The file of an image that PIL has opened and not decoded. omni decodes it strictly."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or image.decoderconfig or image.tell() != 0:
        return None
    file = image.fp
    if file is None or file.closed or not file.seekable():
        return None
    position = file.tell()
    file.seek(0)
    data = file.read(MAX_BYTES)
    file.seek(position)
    return data if formats.plugin_of(data) is not None else None


def _header(data: bytes, name: str) -> ImageFile.ImageFile:
    if not data:
        raise PictureError(f"{name} is empty, expected {EXPECTED}; get the file again.")
    if len(data) > MAX_BYTES:
        raise _too_large(name, f"{MAX_BYTES:,} bytes", f"{len(data):,}")
    plugin = formats.plugin_of(data)
    if plugin is None:
        what, remedy = next(
            ((what, remedy) for magic, what, remedy in _STRANGERS if magic.match(data)),
            (f"data that begin with {data[:8]!r}", "check that it is the right file"),
        )
        raise PictureError(f"{name} is not a picture that can be read, expected {EXPECTED}, found {what}; {remedy}.")
    try:
        return formats.open_file(data, plugin)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise _refusal(error, name, str(plugin.format)) from error


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{MAX_PIXELS:,} pixels", f"{width} x {height} = {width * height:,}")
    if width * height == 0:
        raise PictureError(
            f"{name} has no pixels, expected at least 1 x 1, found {width} x {height}; check the program that made it."
        )


def _too_large(name: str, most: str, found: str) -> PictureError:
    return LargePictureError(f"{name} is too large, expected at most {most}, found {found}; scale it down first.")


def _refusal(error: Exception, name: str, kind: str) -> PictureError:
    if isinstance(error, TooLarge | Image.DecompressionBombError | Image.DecompressionBombWarning):
        found = str(error) if isinstance(error, TooLarge) else "many more"
        return _too_large(name, f"{MAX_PIXELS:,} pixels", found)
    reason = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
    start = f"{name} cannot be decoded, expected a whole {kind}, found"
    ended = isinstance(error.__cause__, IndexError | EOFError | struct.error)  # Pillow's signs that data end early
    if ended or re.search(r"truncated|premature end|too short|not enough", reason, re.IGNORECASE):
        return TruncatedPictureError(f"{start} data that end too early ({reason}); get the file again.")
    return PictureError(f"{start} damaged or unusual data ({reason}); get the file again or convert it to PNG.")


# --- Pixels -----------------------------------------------------------------------------------------------------------


def decode(opened: Opened) -> Image.Image:
    """Decode an opened picture; the second half of `read_picture`.

    Raises:
        PictureError: the pixels are damaged or cut off.
    """
    image, name, full_size, is_own = opened
    try:
        key = _transparent_value(image)
        image.load()
        # no copy of pixels that need no change: it would take a quarter of the time of decoding
        as_it_is = is_own and image.mode == "RGB" and key is None
        picture = image._new(image.im) if as_it_is else _to_rgb(image, key)
    except MemoryError:
        raise
    except Exception as error:
        raise _refusal(error, name, image.format or "picture") from error
    if (step := orientation(image)) in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[step])
    # without the metadata, no later tool turns the picture a second time
    picture.info = {"note": image.info["note"]} if is_own and "note" in image.info else {}
    if picture.size != full_size:
        picture.info["full_size"] = full_size
    return picture


def _to_rgb(image: Image.Image, key: int | tuple[int, ...] | None) -> Image.Image:
    """RGB pixels over white. `key` is the value of the transparent pixels, if there is one."""
    if key is not None:
        picture = _opaque(image)
        picture.paste((255, 255, 255), mask=_equal(image, key))
        return picture
    if image.mode == "La":
        image = image.convert("LA")  # the one kind of alpha that converting to RGBA would drop
    if not image.has_transparency_data:
        return _opaque(image)
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    picture = Image.new("RGB", image.size, "white")
    picture.paste(image, mask=image)
    return picture


def _opaque(image: Image.Image) -> Image.Image:
    """RGB of the same colours, without transparency."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled(image).convert("RGB")
    if image.mode == "CMYK" and isinstance(image, JpegImagePlugin.JpegImageFile) and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow inverts every JPEG in CMYK, as if it were Adobe's
    return image.convert("RGB")


def _equal(image: Image.Image, key: int | tuple[int, ...]) -> Image.Image:
    """A mask of the pixels that have one value."""
    if image.mode.startswith("I"):
        return Image.fromarray(np.asarray(image) == key)
    image = image.convert("L") if image.mode == "1" else image
    keys = key if isinstance(key, tuple) else (key,)
    bands = zip(image.split(), keys, strict=True)
    return reduce(ImageChops.multiply, (band.point([255 * (v == k) for v in range(256)]) for band, k in bands))


def _transparent_value(image: Image.Image) -> int | tuple[int, ...] | None:
    """The transparent grey or colour of a picture without an alpha channel, in units of its pixels.

    This must be called before the pixels are loaded, since Pillow then forgets how they were stored. It widens grey of 1, 2
    and 4 bits to 8 and shortens colours of 16 bits to 8, but leaves the transparent value as it was in the file.
    """
    key = image.info.get("transparency")
    if image.mode not in ("1", "L", "I;16", "I", "RGB") or not isinstance(key, int | tuple):
        return None
    tiles = image.tile if isinstance(image, PngImagePlugin.PngImageFile) else []
    stored = tiles[0].args if tiles else None
    if stored == "RGB;16B" and isinstance(key, tuple):
        return tuple(value >> 8 for value in key)
    if isinstance(key, int):
        return key * {"1": 255, "L;2": 85, "L;4": 17}.get(str(stored), 1)
    return key


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of more than eight bits becomes grey of eight."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray(_EIGHT_BITS[values])
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("some of its values are infinite or not a number")
    usual = [0xFF, 0xFFFF] if image.mode == "I" else [1, 0xFF, 0xFFFF]
    low, high = next(((0.0, float(top)) for top in usual if low >= 0 and high <= top), (low, high))
    scale = 255 / (high - low) if high > low else 0.0  # black, for a single value outside of the usual ranges
    pixels = np.empty(values.shape, np.uint8)
    for rows in range(0, len(values), 256):  # in parts: all at once could take 400 MB more
        part = slice(rows, rows + 256)
        pixels[part] = np.rint((values[part].astype(np.float64) - low) * scale)
    return Image.fromarray(pixels)


_EIGHT_BITS = np.rint(np.arange(0x10000) / 257).astype(np.uint8)
"""For each 16-bit value, the nearest value of 8 bits."""


def orientation(image: Image.Image) -> int:
    """The orientation in EXIF or XMP: 1 is upright, the others are the keys of `_UPRIGHT`."""
    try:
        about = bytes(image.info.get("exif", b"")).removeprefix(b"Exif\0\0")
        if sum(tag_sizes(about).values()) > len(about):
            return 1
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # pixels may be whole although their metadata are broken
        return 1
    return value if isinstance(value, int) else 1


def turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Width and height of a picture after it is turned upright."""
    return size[::-1] if orientation in (5, 6, 7, 8) else size
