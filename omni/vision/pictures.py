"""From a file, bytes or a PIL image to RGB pixels, or to one sentence that says why not.

Every picture enters through `read_picture`. What comes out is always the same kind of thing: mode RGB, upright, every
pixel decoded, no file left open, no metadata that a later tool could apply a second time.

    picture = read_picture("photo.jpg")

`read_pixels` is for many files: the same pixels, without making a picture of PIL out of them where that takes longer.

What the many kinds of picture become:

| stored as                       | becomes                                                                          |
|---------------------------------|----------------------------------------------------------------------------------|
| grey, 1-bit, palette            | RGB of the same colours                                                          |
| alpha of any kind               | laid over white, as a page would show it                                         |
| CMYK                            | RGB; ink amounts in a JPEG count as inverted if Adobe's marker says so           |
| 16-bit grey                     | 0..65535 scaled to 0..255 (Pillow would clip everything above 255 to white)      |
| 32-bit integers, floats         | the narrowest of 0..1 (floats), 0..255, 0..65535 that holds them all, else their |
|                                 | own minimum to maximum, scaled to 0..255                                         |
| EXIF orientation                | applied                                                                          |
| animation, several pages        | the first                                                                        |

A file that lost pixels is refused, never filled up. Formats differ in what they can tell: a cut is noticed in all of
them, a changed byte always in PNG (checksums), elsewhere only where the data stop making sense.
"""

import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageChops,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from omni.registry import ItemError

MAX_PIXELS = 50_000_000
"""Width times height, judged by the header alone: a few kilobytes can claim to be a picture that fills the memory."""

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image

Pixels = Image.Image | NDArray[np.uint8]
"""An RGB picture of PIL; or uint8[H, W, 4], red, green, blue and a byte of no account."""

EXPECTED = "a JPEG, PNG, WebP, GIF, BMP or TIFF picture"

# Plug-ins are called by name rather than through `Image.open`: that one tries forty formats, some of which start other
# programs, and issues Pillow's own warning about large pictures before anybody can look at the size.
_FORMATS: tuple[tuple[re.Pattern[bytes], type[ImageFile.ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    (re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImagePlugin.TiffImageFile),
)

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
"""What people pass by mistake: how it begins, what it is, what to do."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to the step that undoes it."""

_WARNINGS = threading.Lock()


class PictureError(ItemError):
    """A picture that cannot be read. The message is one sentence: which, what was expected and found, what to do."""


class MissingPictureError(PictureError):
    """There is no such file."""

    kind = "missing"


class TruncatedPictureError(PictureError):
    """The data end too early."""

    kind = "truncated"


class LargePictureError(PictureError):
    """More than `MAX_PIXELS`."""

    kind = "too large"


def read_picture(source: Source, at_least: int | None = None) -> Image.Image:
    """Read one picture as an upright RGB image of uint8[H, W, 3].

    Args:
        source: A path, the bytes of a picture file, or a PIL image. An image of PIL is treated like the file that it
            came from, so that reading a path and reading `Image.open(path)` give the same pixels; it stays as it is.
        at_least: Decode a JPEG file at 1/2, 1/4 or 1/8 of its size, the smallest of which both sides still have so many
            pixels. That is faster than decoding all of it and scaling down, and not the same to the last bit. The picture
            then says in `info["full_size"]` what (width, height) it would have had. Other formats are read whole.

    Raises:
        PictureError: The file is missing, unreadable, no picture, cut off, damaged or larger than `MAX_PIXELS`.
    """
    with _opened(source, at_least) as opened:
        return _decode(opened)


def read_pixels(source: Source, at_least: int | None = None) -> tuple[Pixels, tuple[int, int]]:
    """What `read_picture` reads, and the (width, height) that it has in full; most JPEG files sooner.

    Pillow takes the rows of a picture through further memory one by one. TurboJPEG is the same decoder, so gives the same
    pixels, without that. Whatever it objects to is left to Pillow, and everything where Pillow has another decoder.

    Raises:
        PictureError: as `read_picture`.
    """
    with _opened(source, at_least) as opened:
        pixels = _decode_jpeg(opened)
        if pixels is None:
            picture = _decode(opened)
            return picture, picture.info.get("full_size", picture.size)
        orientation = _orientation(opened.image)
        return _upright(pixels, orientation), _turned(opened.full_size or opened.image.size, orientation)


class _Opened(NamedTuple):
    """A picture of which the header was read, and nothing decoded."""

    image: Image.Image
    name: str
    file: BinaryIO | None = None
    """Where the image comes from, unless it is an image of somebody else."""
    full_size: tuple[int, int] | None = None
    """Width and height of what will be decoded to a smaller one."""


@contextmanager
def _opened(source: Source, at_least: int | None) -> Iterator[_Opened]:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        # Some libraries set this for the whole process. The missing part of a picture would then be grey.
        raise PictureError(
            f"{_name(source)} is not read while PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, expected it to be False "
            "because cut-off pictures would pass for whole ones; set it back to False after whatever set it to True."
        )
    name = _name(source)
    if isinstance(source, Image.Image):
        yield _Opened(source, name)
        return
    try:
        with _open(source, name) as file:
            yield _read_header(file, name, at_least)
    except OSError as error:
        raise PictureError(f"{name} cannot be read: the system says '{error.strerror}'; check the disk.") from error


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


def _open(source: str | os.PathLike[str] | bytes | bytearray | memoryview, name: str) -> BinaryIO:
    """Open an ordinary file; anything else is told apart first, as opening a pipe would wait for ever."""
    if isinstance(source, bytes | bytearray | memoryview):
        return BytesIO(source)
    path = os.fsdecode(source)
    try:
        kind = os.stat(path).st_mode
        if stat.S_ISREG(kind):
            return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        if re.match(r"[a-z]+://", path):
            raise PictureError(f"{name} is an address, expected a file; download the picture first.") from error
        where = "" if os.path.isabs(path) else f" in {os.getcwd()!r}"
        raise MissingPictureError(f"{name} does not exist{where}, expected {EXPECTED}; check the path.") from error
    except PermissionError as error:
        problem = "may not be read by this user, expected a readable file; change its permissions"
        raise PictureError(f"{name} {problem}.") from error
    except (OSError, ValueError) as error:  # too long, a null byte in it, a circle of links
        raise PictureError(f"{name} cannot be opened ({error}), expected {EXPECTED}; check the path.") from error
    if stat.S_ISDIR(kind):
        raise PictureError(f"{name} is a folder, expected {EXPECTED}; pass one of the files in it.")
    raise PictureError(f"{name} is a pipe or a device, expected an ordinary file; save the picture first.")


def _read_header(file: BinaryIO, name: str, at_least: int | None) -> _Opened:
    start = file.read(64)
    if not start:
        raise PictureError(f"{name} is empty, expected {EXPECTED}; get the file again.")
    plugin = next((plugin for magic, plugin in _FORMATS if magic.match(start)), None)
    if plugin is None:
        what, remedy = next(
            ((what, remedy) for magic, what, remedy in _STRANGERS if magic.match(start)),
            (f"data that begin with {start[:8]!r}", "check that it is the right file"),
        )
        raise PictureError(f"{name} is not a picture that can be read, expected {EXPECTED}, found {what}; {remedy}.")
    try:
        image = _header(plugin, file)
    except MemoryError:
        raise
    except Exception as error:
        raise _refusal(error, name, str(plugin.format)) from error
    _check_size(image, name)
    try:
        _check_whole(image, file)
    except Exception as error:
        raise _refusal(error, name, str(plugin.format)) from error
    full_size = image.size
    if at_least is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
        image.draft(None, (at_least, at_least))
    return _Opened(image, name, file, None if image.size == full_size else full_size)


def _header(plugin: type[ImageFile.ImageFile], file: BinaryIO) -> ImageFile.ImageFile:
    """Read the size, and nothing of the pixels."""
    file.seek(0)
    if plugin not in (GifImagePlugin.GifImageFile, TiffImagePlugin.TiffImageFile):
        return plugin(file)
    # Two plug-ins warn where an error is due: about the first frame of a GIF that reaches far beyond its canvas, and
    # about a TIFF's table of tags that ends early, going on with what is left (without its orientation, say). Filters
    # of warnings belong to the process, hence the lock.
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("error", r"Truncated|Corrupt|Possibly corrupt|Tag ", UserWarning)
        return plugin(file)


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{width} x {height} = {width * height:,}")
    if width * height == 0:
        raise PictureError(
            f"{name} has no pixels, expected at least 1 x 1, found {width} x {height}; check the program that made it."
        )


def _check_whole(image: ImageFile.ImageFile, file: BinaryIO) -> None:
    """Notice what Pillow's decoders pass over."""
    if isinstance(image, PngImagePlugin.PngImageFile):
        # Decoding skips the checksums of the pixel data; verifying reads them, and uses the image up.
        file.seek(0)
        PngImagePlugin.PngImageFile(file).verify()
    elif isinstance(image, BmpImagePlugin.BmpImageFile) and image.info.get("compression") in (1, 2):
        # Run lengths that end early are filled up with colour 0, so compare with the sizes that the header names.
        file.seek(0)
        header = file.read(54)
        whole, start, data = (int.from_bytes(header[at : at + 4], "little") for at in (2, 10, 34))
        if file.seek(0, os.SEEK_END) < (start + data if data else whole):
            raise OSError("image file is truncated")
    file.seek(0)


def _too_large(name: str, found: str) -> PictureError:
    return LargePictureError(
        f"{name} is too large, expected at most {MAX_PIXELS:,} pixels, found {found}; scale it down first."
    )


def _refusal(error: Exception, name: str, kind: str) -> PictureError:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return _too_large(name, "many more")
    reason = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
    start = f"{name} cannot be decoded, expected a whole {kind}, found"
    if "truncated" in reason.lower():
        return TruncatedPictureError(f"{start} data that end too early ({reason}); get the file again.")
    return PictureError(f"{start} damaged or unusual data ({reason}); get the file again or convert it to PNG.")


# --- Pixels -----------------------------------------------------------------------------------------------------------


def _decode(opened: _Opened) -> Image.Image:
    image, name, file, full_size = opened
    _check_size(image, name)
    try:
        key = _transparent_value(image)
        image.load()
        # the same pixels where that is enough and the image is our own: a copy takes a quarter of the time of decoding
        as_it_is = file is not None and image.mode == "RGB" and key is None
        picture = image._new(image.im) if as_it_is else _to_rgb(image, key)
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged data raise nearly everything
        raise _refusal(error, name, image.format or "picture") from error
    orientation = _orientation(image)
    if orientation in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[orientation])
    # Whoever applies the orientation to what they are given would turn the picture a second time.
    picture.info = {}
    if full_size is not None:
        picture.info["full_size"] = _turned(full_size, orientation)
    return picture


def _decode_jpeg(opened: _Opened) -> NDArray[np.uint8] | None:
    """uint8[H, W, 4] of a whole JPEG file in colours, as it is stored; None of everything else."""
    image, file = opened.image, opened.file
    if file is None or not isinstance(image, JpegImagePlugin.JpegImageFile) or image.mode != "RGB":
        return None
    if not _decodes_as_pillow():
        return None
    file.seek(0)
    return _turbo(file.read(), image.size)


def _turbo(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """A JPEG file decoded to a (width, height) that it has in whole eighths of its own; None if anything is amiss."""
    from simplejpeg import decode_jpeg

    width, height = size
    try:  # to the smallest size that is no less
        pixels: NDArray[np.uint8] = decode_jpeg(data, "RGBX", min_width=width, min_height=height)
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 4) else None


@cache
def _decodes_as_pillow() -> bool:
    """Whether TurboJPEG makes the same pixels as Pillow here, whole and scaled; some are built with another decoder."""
    file = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (51, 67, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG", quality=75)
    for part in (1, 2, 4, 8):
        file.seek(0)
        image = JpegImagePlugin.JpegImageFile(file)
        image.draft(None, (image.width // part, image.height // part))
        pixels = _turbo(file.getvalue(), image.size)
        if pixels is None or not np.array_equal(pixels[..., :3], np.asarray(image)):
            return False
    return True


def _turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return size[::-1] if orientation in (5, 6, 7, 8) else size


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """`_UPRIGHT` for uint8[H, W, 4]."""
    if orientation not in _UPRIGHT:
        return pixels
    whole = pixels.view(np.uint32)
    if orientation in (5, 6, 7, 8):
        whole = whole.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        whole = whole[::-1]
    if orientation in (2, 3, 6, 7):
        whole = whole[:, ::-1]
    return np.ascontiguousarray(whole).view(np.uint8)


def _to_rgb(image: Image.Image, key: int | tuple[int, ...] | None) -> Image.Image:
    """`key` is the value of the pixels that are transparent, if there is one."""
    if key is not None:
        opaque = image.copy()
        del opaque.info["transparency"]
        picture = _to_rgb(opaque, None)
        hidden = np.asarray(image.convert("L") if image.mode == "1" else image) == np.array(key)
        picture.paste((255, 255, 255), mask=Image.fromarray(hidden.all(axis=-1) if hidden.ndim == 3 else hidden))
        return picture
    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled(image).convert("RGB")
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow takes every JPEG in CMYK for one of Adobe's
    if image.mode == "La":
        image = image.convert("LA")  # the one kind of alpha that converting to RGBA would drop
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    picture = Image.new("RGB", image.size, "white")
    picture.paste(image, mask=image)
    return picture


def _transparent_value(image: Image.Image) -> int | tuple[int, ...] | None:
    """The one grey or colour that a picture without an alpha channel declares transparent, in units of its pixels.

    Must be called before the pixels are loaded: how they were packed is forgotten then. Pillow widens grey of 2 and 4
    bits to 8 and cuts colours of 16 bits down to 8, but leaves the transparent value as it was in the file.
    """
    key = image.info.get("transparency")
    if image.mode not in ("1", "L", "I;16", "I", "RGB") or not isinstance(key, int | tuple):
        return None
    tiles = image.tile if isinstance(image, PngImagePlugin.PngImageFile) else []
    packing = tiles[0].args if tiles else None
    if packing == "RGB;16B" and isinstance(key, tuple):
        return tuple(value >> 8 for value in key)
    if isinstance(key, int):
        return key * {"L;2": 85, "L;4": 17}.get(str(packing), 1)
    return key


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of more than eight bits to grey of eight."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray(_EIGHT_BITS[values])
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("some of its values are infinite or not a number")
    usual = [0xFF, 0xFFFF] if image.mode == "I" else [1, 0xFF, 0xFFFF]
    low, high = next(((0.0, float(top)) for top in usual if low >= 0 and high <= top), (low, high))
    pixels = values.astype(np.float64)  # from here on in place: a picture at the limit takes 400 MB
    pixels -= low
    pixels *= 255 / (high - low) if high > low else 0.0  # one value everywhere, outside of the usual ranges: black
    return Image.fromarray(np.rint(pixels, out=pixels).astype(np.uint8))


_EIGHT_BITS = np.rint(np.arange(0x10000) / 257).astype(np.uint8)
"""For each 16-bit value the nearest of 8 bits."""


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken note about the camera is no reason to refuse pixels that are whole
        return 1
    return value if isinstance(value, int) else 1
