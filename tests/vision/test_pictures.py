"""Pictures of every kind in, the right pixels or one sentence out. The files are real: written by Pillow or by hand."""

import contextlib
import gc
import io
import os
import random
import re
import socket
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from omni.vision.pictures import MAX_BYTES, MAX_PIXELS, PictureError, picture_size, read_picture

Pixels = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def pixels(source: Any) -> Pixels:
    picture = read_picture(source)
    assert type(picture) is Image.Image
    assert picture.mode == "RGB"
    assert picture_size(source) == picture.size
    return np.asarray(picture)


def refusal(source: Any) -> str:
    with pytest.raises(PictureError) as caught:
        read_picture(source)
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]+[^.\n]\.", message)
    assert re.search(r"; [^;]+\.$", message), "what to do is missing"
    return message


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int = 19, height: int = 13, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(width: int, height: int, depth: int, colour: int, rows: bytes | None, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file by hand; `rows` without the filter bytes, None for no pixels at all."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    parts += [chunk(*each) for each in chunks]
    if rows is not None:
        stride = len(rows) // height
        filtered = b"".join(b"\0" + rows[start : start + stride] for start in range(0, len(rows), stride))
        parts.append(chunk(b"IDAT", zlib.compress(filtered)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def tiff(width: int, height: int, data: bytes, *tags: tuple[int, int, int], order: str = "<") -> bytes:
    """An uncompressed TIFF file by hand: pixels first, tags (number, type, value) at the end."""
    entries = {256: (4, width), 257: (4, height), 259: (3, 1), 273: (4, 8), 278: (4, height), 279: (4, len(data))}
    entries |= {tag: (kind, value) for tag, kind, value in tags}
    table = struct.pack(order + "H", len(entries))
    for tag, (kind, value) in sorted(entries.items()):
        field = struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value)
        table += struct.pack(order + "HHI", tag, kind, 1) + field
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "I", 8 + len(data)) + data + table + b"\0\0\0\0"


def bmp_rle8(width: int, height: int, runs: bytes) -> bytes:
    palette = b"".join(bytes((blue, 0, 255 - blue, 0)) for blue in range(256))
    start = 14 + 40 + len(palette)
    header = struct.pack("<2sIHHI", b"BM", start + len(runs), 0, 0, start)
    header += struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return header + palette + runs


# --- Every format -----------------------------------------------------------------------------------------------------

LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "BMP": {},
    "TIFF": {},
}


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (19, 13)])
def test_lossless_formats_keep_every_pixel(kind: str, size: tuple[int, int]) -> None:
    image = noise(*size)
    assert (pixels(encode(image, kind, **LOSSLESS[kind])) == np.asarray(image)).all()


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("big", [False, True])
def test_tiff_compressions_and_big_tiff(compression: str | None, big: bool, tmp_path: Path) -> None:
    image = noise(70, 50)
    path = tmp_path / "picture.tif"
    image.save(path, compression=compression, big_tiff=big, tiffinfo={278: 8})
    assert (pixels(path) == np.asarray(image)).all()
    assert (pixels(path.read_bytes()) == np.asarray(image)).all()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}])
def test_jpeg(options: dict[str, Any]) -> None:
    image = Image.new("RGB", (33, 21), (200, 30, 90))
    assert np.abs(pixels(encode(image, "JPEG", quality=95, **options)).astype(int) - (200, 30, 90)).max() <= 3


def test_jpeg_equals_pillow_on_noise() -> None:
    data = encode(noise(), "JPEG")
    assert (pixels(data) == np.asarray(Image.open(io.BytesIO(data)))).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_many_frames_the_first(kind: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (pixels(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_smaller_pictures_say_how_large_they_are_in_full(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(noise(400, 300), "JPEG", exif=exif)
    size = (400, 300) if orientation < 5 else (300, 400)
    assert read_picture(data, 60).info == {"full_size": size}
    assert read_picture(data, 60).size == (size[0] // 4, size[1] // 4)
    assert picture_size(data) == size
    assert read_picture(data, 301).info == {}


def test_phone_pictures_with_a_second_picture_inside() -> None:
    data = encode(Image.new("RGB", (16, 16), "red"), "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    assert np.abs(pixels(data).astype(int) - (255, 0, 0)).max() <= 3


def test_run_length_bmp() -> None:
    data = bmp_rle8(4, 2, b"\x04\x07\x00\x00" + b"\x02\x09\x02\xff\x00\x00" + b"\x00\x01")
    expected = [[(255 - v, 0, v) for v in row] for row in ((9, 9, 255, 255), (7, 7, 7, 7))]  # stored bottom up
    assert pixels(data).tolist() == [[list(pixel) for pixel in row] for row in expected]


# --- Every mode -------------------------------------------------------------------------------------------------------

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_grey(kind: str) -> None:
    assert (pixels(encode(Image.fromarray(RAMP), kind)) == RAMP[..., None]).all()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_one_bit(kind: str) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (9, 13)).astype(bool)
    assert (pixels(encode(Image.fromarray(bits), kind)) == 255 * bits[..., None]).all()


def test_one_bit_with_white_as_zero() -> None:
    data = tiff(8, 1, b"\xf0", (258, 3, 1), (262, 3, 0), (277, 3, 1))
    assert pixels(data)[0, :, 0].tolist() == [0] * 4 + [255] * 4


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_palette(kind: str) -> None:
    image = noise().quantize(30)
    assert (pixels(encode(image, kind)) == np.asarray(image.convert("RGB"))).all()


def over_white(rgba: NDArray[Any]) -> Pixels:
    colour, alpha = rgba[..., :3].astype(int), rgba[..., 3:].astype(int)
    blended: Pixels = np.rint((colour * alpha + 255 * (255 - alpha)) / 255).astype(np.uint8)
    return blended


ALPHA = np.stack(
    np.broadcast_arrays(
        np.arange(0, 256, 5)[:, None],
        255 - np.arange(0, 256, 5)[:, None],
        40,
        np.array([0, 1, 2, 63, 127, 128, 254, 255]),
    ),
    axis=-1,
).astype(np.uint8)  # every level of colour under eight levels of alpha


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_alpha_is_laid_over_white(kind: str) -> None:
    assert (pixels(encode(Image.fromarray(ALPHA), kind)) == over_white(ALPHA)).all()


def test_alpha_in_webp() -> None:
    # `exact` keeps colours under full transparency, which must not show either way.
    for exact in (False, True):
        data = encode(Image.fromarray(ALPHA), "WEBP", lossless=True, exact=exact)
        assert (pixels(data) == over_white(ALPHA)).all()


def test_grey_with_alpha() -> None:
    grey = np.stack(np.broadcast_arrays(np.arange(256)[:, None], np.array([0, 100, 255])), axis=-1).astype(np.uint8)
    rgba = grey[..., [0, 0, 0, 1]]
    assert (pixels(encode(Image.fromarray(grey), "PNG")) == over_white(rgba)).all()
    assert (pixels(encode(Image.fromarray(grey), "TIFF")) == over_white(rgba)).all()


def test_premultiplied_alpha() -> None:
    image = Image.fromarray(ALPHA[:, 3:]).convert("RGBa")
    assert np.abs(pixels(image).astype(int) - over_white(ALPHA[:, 3:])).max() <= 2
    grey = Image.new("LA", (1, 1), (200, 128)).convert("La")
    assert np.abs(pixels(grey).astype(int) - (200 * 128 + 255 * 127) / 255).max() <= 2


def three_colours() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 200, 0, 0, 0, 100])
    for column in range(3):
        image.putpixel((column, 0), column)
    return image


def test_palette_with_levels_of_alpha() -> None:
    data = encode(three_colours(), "PNG", transparency=bytes((255, 128, 0)))
    rgba = np.array([[[255, 0, 0, 255], [0, 200, 0, 128], [0, 0, 100, 0]]])
    assert (pixels(data) == over_white(rgba)).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_one_transparent_colour(kind: str) -> None:
    data = encode(three_colours(), kind, transparency=1)
    assert pixels(data).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 100]]]


@pytest.mark.parametrize(
    ("depth", "colour", "rows", "key", "expected"),
    [
        (1, 0, b"\x40", (0,), [(255,) * 3, (255,) * 3, (255,) * 3]),
        (1, 0, b"\x00", (1,), [(0,) * 3, (0,) * 3, (0,) * 3]),
        (2, 0, bytes((0b00_01_10_00,)), (1,), [(0,) * 3, (255,) * 3, (170,) * 3]),
        (4, 0, bytes((0x07, 0xE0)), (7,), [(0,) * 3, (255,) * 3, (238,) * 3]),
        (8, 0, bytes((0, 7, 14)), (7,), [(0,) * 3, (255,) * 3, (14,) * 3]),
        (16, 0, struct.pack(">3H", 0, 514, 515), (514,), [(0,) * 3, (255,) * 3, (2,) * 3]),
        (8, 2, bytes((1, 2, 3, 1, 2, 4, 9, 9, 9)), (1, 2, 4), [(1, 2, 3), (255,) * 3, (9, 9, 9)]),
        (
            16,
            2,
            struct.pack(">9H", 0, 0, 0, 256, 512, 768, 5000, 0, 0),
            (256, 512, 768),
            [(0,) * 3, (255,) * 3, (19, 0, 0)],
        ),
    ],
)
def test_png_without_alpha_but_with_a_transparent_value(
    depth: int, colour: int, rows: bytes, key: tuple[int, ...], expected: list[tuple[int, ...]]
) -> None:
    data = png(3, 1, depth, colour, rows, (b"tRNS", struct.pack(f">{len(key)}H", *key)))
    assert [tuple(pixel) for pixel in pixels(data)[0].tolist()] == expected


def without_segment(jpeg: bytes, marker: int) -> bytes:
    start = jpeg.index(bytes((0xFF, marker)))
    return jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big") :]


@pytest.mark.parametrize("ink", [(200, 30, 100, 10), (0, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)])
def test_cmyk(ink: tuple[int, int, int, int]) -> None:
    def rgb(cyan: int, magenta: int, yellow: int, black: int) -> list[float]:
        return [(255 - each) * (255 - black) / 255 for each in (cyan, magenta, yellow)]

    image = Image.new("CMYK", (16, 16), ink)
    adobe = encode(image, "JPEG", quality=100)
    assert b"Adobe" in adobe
    assert np.abs(pixels(adobe) - np.array(rgb(*ink))).max() <= 3
    # Without Adobe's marker the numbers in the file, which Pillow has inverted when it wrote them, mean themselves.
    plain = without_segment(adobe, 0xEE)
    cyan, magenta, yellow, black = (255 - each for each in ink)
    assert np.abs(pixels(plain) - np.array(rgb(cyan, magenta, yellow, black))).max() <= 3
    assert np.abs(pixels(encode(image, "TIFF")) - np.array(rgb(*ink))).max() <= 1


LEVELS = np.array([[0, 1, 128, 129, 255, 256, 257, 1000, 32767, 32768, 65279, 65534, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind: str, order: str) -> None:
    if (kind, order) == ("PNG", ">u2"):
        data = png(LEVELS.shape[1], 1, 16, 0, LEVELS.astype(">u2").tobytes())
    else:
        data = encode(Image.fromarray(LEVELS.astype(order)), kind)
    assert (pixels(data)[..., 0] == np.rint(LEVELS / 257)).all()
    assert pixels(data)[0, -1].tolist() == [255, 255, 255]


def test_every_16_bit_value() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    got = pixels(encode(Image.fromarray(values), "PNG"))[..., 1].astype(float)
    assert np.abs(got * 257 - values).max() <= 128  # the nearest


def test_big_endian_16_bit_tiff_by_hand() -> None:
    data = tiff(3, 1, struct.pack(">3H", 0, 32768, 65535), (258, 3, 16), (262, 3, 1), (277, 3, 1), order=">")
    assert pixels(data)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 0.5, 200]], np.float32), [0, 0, 200]),
        (np.array([[0, 300, 65535]], np.float32), [0, 1, 255]),
        (np.array([[-1, 0, 1]], np.float32), [0, 128, 255]),
        (np.array([[1e6, 1e6, 1e6]], np.float32), [0, 0, 0]),
        (np.array([[0, 1, 2]], np.int32), [0, 1, 2]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[0, 50_000, 100_000]], np.int32), [0, 128, 255]),
        (np.array([[-2_000_000_000, 0, 2_000_000_000]], np.int32), [0, 128, 255]),
    ],
)
def test_integers_and_floats_are_scaled_by_their_range(values: NDArray[Any], expected: list[int]) -> None:
    assert pixels(encode(Image.fromarray(values), "TIFF"))[0, :, 2].tolist() == expected


def test_floats_that_are_no_numbers() -> None:
    assert "not a number" in refusal(encode(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF"))


# --- Orientation ------------------------------------------------------------------------------------------------------

SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}
"""The words of the EXIF standard: which side of the scene the stored row 0 shows, and which the stored column 0."""


def as_stored(upright: Pixels, orientation: int) -> Pixels:
    row, column = SIDES[orientation]
    stored = upright if row in ("top", "bottom") else upright.swapaxes(0, 1)
    if row in ("bottom", "right"):
        stored = stored[::-1]
    if column in ("bottom", "right"):
        stored = stored[:, ::-1]
    return np.ascontiguousarray(stored)


def scene() -> Pixels:
    """Six colours, 3 x 2, in blocks of 16 so that JPEG keeps them apart."""
    colours = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(0, 0, 0), (128, 128, 128), (255, 255, 255)]]
    return np.array(colours, dtype=np.uint8).repeat(16, 0).repeat(16, 1)


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF lzw", "XMP"])
def test_orientation(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"exif": exif}
    if kind == "JPEG":
        options |= {"quality": 95, "subsampling": 0}
    elif kind == "WEBP":
        options |= {"lossless": True}
    elif kind == "TIFF lzw":
        options |= {"compression": "tiff_lzw"}
    elif kind == "XMP":
        options = {"xmp": f'<x:xmpmeta tiff:Orientation="{orientation}"/>'.encode(), "quality": 95, "subsampling": 0}
    image = Image.fromarray(as_stored(scene(), orientation))
    path = tmp_path / "picture"
    path.write_bytes(encode(image, {"TIFF lzw": "TIFF", "XMP": "JPEG"}.get(kind, kind), **options))
    upright = scene().astype(int)
    with Image.open(path) as opened:
        for source in (path, path.read_bytes(), opened):
            got = read_picture(source)
            assert np.asarray(got).shape == upright.shape
            assert np.abs(np.asarray(got).astype(int) - upright).max() <= 5
            # Other tools apply the orientation as well: there must be nothing left for them.
            assert (np.asarray(ImageOps.exif_transpose(got)) == np.asarray(got)).all()
            assert picture_size(source) == got.size
            assert (np.asarray(read_picture(got)) == np.asarray(got)).all()


def test_broken_exif_does_not_cost_the_picture() -> None:
    data = encode(noise(), "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (pixels(data) == np.asarray(noise())).all()
    assert (pixels(data) == np.asarray(noise())).all()  # nor where warnings are errors


@pytest.mark.parametrize("value", [0, 9, 77])
def test_orientations_that_do_not_exist(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert (pixels(encode(noise(), "PNG", exif=exif)) == np.asarray(noise())).all()


# --- What is passed in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["plain.png", "mit Leerzeichen.png", "täßt-图片-🖼.png", "no_suffix", "wrong.jpg", "line\nbreak"]
)
def test_paths(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(encode(noise(), "PNG"))
    for source in (path, str(path)):
        assert (pixels(source) == np.asarray(noise())).all()
    path.write_bytes(b"")
    assert repr(name)[1:-1] in refusal(path)


def test_bytes_of_any_kind() -> None:
    data = encode(noise(), "PNG")
    for source in (data, bytearray(data), memoryview(data)):
        assert (pixels(source) == np.asarray(noise())).all()


def test_pil_images_stay_as_they_are() -> None:
    image = Image.fromarray(ALPHA)
    image.info["note"] = "mine"
    picture = read_picture(image)
    assert (image.mode, image.info) == ("RGBA", {"note": "mine"})
    assert picture.info == {}
    rgb = noise()
    read_picture(rgb).putpixel((0, 0), (1, 2, 3))
    assert rgb.getpixel((0, 0)) == noise().getpixel((0, 0))


def test_pil_images_that_fail_late(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(encode(noise(), "PNG")[:300])
    with Image.open(path) as opened:
        assert "cut.png" in refusal(opened)
    assert "0 x 5" in refusal(Image.new("RGB", (0, 5)))


def test_pil_images_that_are_opened_and_not_decoded_are_read_like_their_file(tmp_path: Path) -> None:
    path = tmp_path / "hole.jpg"
    whole = encode(noise(90, 70), "JPEG")
    path.write_bytes(whole[:2000] + whole[3000:])
    with Image.open(path) as opened:
        assert "hole.jpg" in refusal(opened)
        assert opened.getpixel((0, 0)) is not None  # it is still what it was, and Pillow decodes it
        assert read_picture(opened).size == (90, 70)  # as something that somebody has decoded
    path.write_bytes(whole)
    with Image.open(path) as opened:
        opened.draft("RGB", (20, 20))
        assert read_picture(opened).size == opened.size == (45, 35)
    with Image.open(io.BytesIO(encode(noise(), "PPM"))) as opened:
        assert (pixels(opened) == np.asarray(noise())).all()  # of other formats PIL decides


@pytest.mark.parametrize("source", [None, 3, ["a.png"], np.zeros((2, 2, 3), np.uint8)])
def test_other_types_are_a_mistake_of_the_program(source: Any) -> None:
    with pytest.raises(TypeError, match=type(source).__name__):
        read_picture(source)


def test_files_are_closed(tmp_path: Path) -> None:
    good = tmp_path / "good.tif"
    noise().save(good, compression="tiff_lzw", save_all=True, append_images=[noise()])
    bad = tmp_path / "bad.tif"
    bad.write_bytes(good.read_bytes()[:200])
    gc.collect()
    before = os.listdir("/dev/fd")
    pictures = [read_picture(good) for _ in range(3)]
    for _ in range(3):
        refusal(bad)
    assert len(os.listdir("/dev/fd")) == len(before)
    good.unlink()
    assert all((np.asarray(picture) == np.asarray(noise())).all() for picture in pictures)


def test_many_threads() -> None:
    """The two plug-ins that need other filters of warnings must not change them for anybody else."""
    packed = {"TIFF": {"compression": "tiff_lzw"}, "PNG": {}}
    good = [encode(noise(seed=seed), kind, **packed[kind]) for seed in range(3) for kind in packed]
    cut = [encode(noise(), kind)[:200] for kind in ("TIFF", "GIF")]
    filters = list(warnings.filters)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(15):
                for number, data in enumerate(good):
                    assert (np.asarray(read_picture(data)) == np.asarray(noise(seed=number // 2))).all()
                for data in cut:
                    refusal(data)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list(warnings.filters) == filters


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere.png")
    assert "does not exist" in refusal(tmp_path / "nowhere" / "nothing.png")
    monkeypatch.chdir(tmp_path)
    message = refusal("nowhere.png")
    assert "'nowhere.png'" in message
    assert repr(str(tmp_path)) in message  # where it was looked for
    assert "does not exist" in refusal("")


def test_folder_pipe_and_device(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe or a device" in refusal(tmp_path / "pipe")  # and does not wait for somebody to write into it
    assert "is a pipe or a device" in refusal("/dev/zero")


def test_files_of_any_length_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "long.bmp"
    path.write_bytes(b"BM")
    os.truncate(path, MAX_BYTES + 1)  # takes no room
    assert "is too large, expected at most 500,000,000 bytes, found 500,000,001" in refusal(path)
    if os.path.exists("/proc/self/maps"):  # a file of size 0 that has content
        assert "is empty" in refusal("/proc/self/maps")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert "is a pipe or a device" in refusal(tmp_path / "socket")


def test_invalid_paths_are_refused() -> None:
    assert "cannot be opened" in refusal("a\0b.png")
    assert "cannot be opened" in refusal("a" * 5000)
    assert "download" in refusal("https://example.org/cat.png")


def test_surrogates_in_a_name_can_be_printed(tmp_path: Path) -> None:
    refusal(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).encode("utf-8")


def test_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encode(noise(), "PNG"))
    path.chmod(0)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)  # what is forbidden to others is not forbidden to root
        message = refusal(path)
    finally:
        if root:
            os.seteuid(0)
    assert "may not be read" in message
    assert "secret.png" in message


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    assert re.search(r"empty\.jpg' is empty", refusal(tmp_path / "empty.jpg"))
    assert "is empty" in refusal(b"")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"just some text", "data that begin with b'just som'"),
        (b"\0" * 100, "data that begin with"),
        (b"\xff\xd8", "data that begin with"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\n<!DOCTYPE HTML>\n<html>", "a web page"),
        (b'<svg xmlns="http://www.w3.org/2000/svg">', "an SVG drawing"),
        (b"%PDF-1.7", "a PDF document"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC picture"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "an AVIF picture"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "a video"),
        (b"PK\x03\x04", "a ZIP archive"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "data that begin with"),  # a format of Pillow's, but one that starts a program
    ],
)
def test_no_picture(data: bytes, found: str, tmp_path: Path) -> None:
    path = tmp_path / "thing.png"
    path.write_bytes(data)
    message = refusal(path)
    assert "thing.png" in message
    assert "JPEG, PNG, WebP, GIF, BMP or TIFF" in message
    assert found in message


def sources() -> dict[str, bytes]:
    image = noise()
    grey = image.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    strips = {278: 8}
    other = noise(seed=1)
    return {
        "jpeg": encode(image, "JPEG"),
        "jpeg progressive": encode(image, "JPEG", progressive=True),
        "jpeg grey": encode(grey, "JPEG"),
        "jpeg cmyk": encode(image.convert("CMYK"), "JPEG"),
        "png": encode(image, "PNG"),
        "png 16": encode(deep, "PNG"),
        "png of many chunks": encode(noise(60, 400), "PNG"),
        "webp": encode(image, "WEBP"),
        "webp lossless": encode(image, "WEBP", lossless=True),
        "webp alpha": encode(Image.fromarray(ALPHA), "WEBP"),
        "webp animated": encode(image, "WEBP", save_all=True, append_images=[other]),
        "gif": encode(image, "GIF"),
        "gif in order": encode(image, "GIF", interlace=0),
        "gif animated": encode(image, "GIF", save_all=True, append_images=[other]),
        "bmp": encode(image, "BMP"),
        "bmp palette": encode(image.quantize(9), "BMP"),
        "bmp bits": encode(image.convert("1"), "BMP"),
        "bmp run lengths": bmp_rle8(9, 30, b"\x05\x07\x04\x30\x00\x00" * 30 + b"\x00\x01"),
        "tiff": encode(image, "TIFF"),
        "tiff 16": encode(deep, "TIFF"),
        "tiff lzw": encode(noise(60, 40), "TIFF", compression="tiff_lzw", tiffinfo=strips),
        "tiff deflate": encode(image, "TIFF", compression="tiff_adobe_deflate"),
        "tiff packbits": encode(image, "TIFF", compression="packbits"),
        "tiff jpeg": encode(image, "TIFF", compression="jpeg"),
        "tiff fax": encode(image.convert("1"), "TIFF", compression="group4"),
        "tiff strips": encode(noise(60, 40), "TIFF", tiffinfo=strips),
        "tiff turned": encode(image, "TIFF", tiffinfo={274: 6}),
        "tiff tags last": tiff(3, 2, bytes(range(6)), (258, 3, 8), (262, 3, 1), (274, 3, 6), (277, 3, 1)),
    }


SOURCES = sources()


@pytest.mark.parametrize("name", SOURCES)
def test_no_cut_goes_unnoticed(name: str) -> None:
    """Wherever a file ends early: either not a single pixel depends on what is missing, or it is refused."""
    data = SOURCES[name]
    whole = pixels(data)
    step = max(1, len(data) // 150)
    offsets = {*range(0, len(data), step), *range(min(70, len(data))), *range(max(0, len(data) - 70), len(data))}
    refused = 0
    for offset in sorted(offsets):
        try:
            got = pixels(data[:offset])
        except PictureError:
            refused += 1
        else:
            assert got.shape == whole.shape, offset
            assert (got == whole).all(), offset
    assert refused > len(offsets) // 4


def test_a_cut_is_called_a_cut(tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG", "GIF", "BMP"):
        path = tmp_path / f"cut.{kind}"
        path.write_bytes(encode(noise(), kind)[:-100])
        message = refusal(path)
        assert path.name in message
        assert f"expected a whole {kind}, found data that end too early" in message


def test_every_changed_byte_of_a_png_is_noticed() -> None:
    data = encode(noise(), "PNG")
    for offset in range(len(data) - 12):  # the last chunk says "end" and holds nothing
        changed = bytearray(data)
        changed[offset] ^= 0x10
        refusal(bytes(changed))


def test_cut_pictures_that_another_library_lets_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert "LOAD_TRUNCATED_IMAGES" in refusal(encode(noise(), "JPEG")[:-100])
    assert "LOAD_TRUNCATED_IMAGES" in refusal(encode(noise(), "JPEG"))


MAGIC = (
    b"",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"RIFF\x40\0\0\0WEBP",
)


def test_garbage_is_refused_and_nothing_else_is_raised() -> None:
    rng = random.Random(0)
    for _ in range(1500):
        refusal(rng.choice(MAGIC) + rng.randbytes(rng.randrange(200)))


def test_damage_is_refused_or_decoded_and_nothing_else_is_raised() -> None:
    rng = random.Random(0)
    for _ in range(1500):
        name = rng.choice(list(SOURCES))
        data = bytearray(SOURCES[name])
        for _ in range(rng.choice((1, 2, 10))):
            data[rng.randrange(min(len(data), rng.choice((40, 200, 100_000))))] = rng.choice(
                (0, 255, rng.randrange(256))
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that Pillow does not like
            with contextlib.suppress(PictureError):
                read_picture(bytes(data))


# --- Size -------------------------------------------------------------------------------------------------------------


def test_exactly_the_limit() -> None:
    assert MAX_PIXELS == 50_000_000
    data = encode(Image.new("1", (10_000, 5_000), 1), "PNG")
    picture = read_picture(data)
    assert picture.size == (10_000, 5_000)
    assert picture.getpixel((9_999, 4_999)) == (255, 255, 255)


def patched(data: bytes, at: int, layout: str, *values: int) -> bytes:
    field = struct.pack(layout, *values)
    return data[:at] + field + data[at + len(field) :]


def jpeg_of(width: int, height: int) -> bytes:
    data = encode(noise(), "JPEG")
    return patched(data, data.index(b"\xff\xc0") + 5, ">HH", height, width)


def webp_of(width: int, height: int) -> bytes:
    data = encode(noise(), "WEBP")
    return patched(data, data.index(b"\x9d\x01\x2a") + 3, "<HH", width, height)


def webp_with_canvas_of(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = b"VP8X" + struct.pack("<IB3x", 10, 0) + canvas + encode(noise(), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks


def gif_of(width: int, height: int) -> bytes:
    return patched(encode(noise(), "GIF"), 6, "<HH", width, height)


def gif_with_frame_of(width: int, height: int) -> bytes:
    data = encode(noise(), "GIF")
    return patched(data, data.index(b",\0\0\0\0") + 5, "<HH", width, height)


CLAIMS: dict[str, Callable[[int, int], bytes]] = {
    "png": lambda width, height: png(width, height, 8, 2, None, (b"IDAT", b"")),
    "jpeg": jpeg_of,
    "webp": webp_of,
    "webp canvas": webp_with_canvas_of,
    "gif": gif_of,
    "gif frame": gif_with_frame_of,
    "bmp": lambda width, height: patched(encode(noise(), "BMP"), 18, "<ii", width, height),
    "tiff": lambda width, height: tiff(width, height, b"\0", (258, 3, 8), (262, 3, 1), (277, 3, 1)),
}


@pytest.mark.parametrize("kind", CLAIMS)
@pytest.mark.parametrize(
    "size",
    [
        (10_000, 5_001),  # just too large
        (10_000, 10_000),  # where Pillow would warn
        (16_000, 16_000),  # where Pillow would raise an error of its own
    ],
)
def test_too_large_is_refused_by_the_header_alone(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    """The data that should follow are missing or far too short: whoever decodes would complain about that instead."""
    path = tmp_path / "huge"
    path.write_bytes(CLAIMS[kind](*size))
    message = refusal(path)
    assert "huge' is too large, expected at most 50,000,000 pixels" in message
    if size == (10_000, 5_001):
        assert "10000 x 5001 = 50,010,000" in message
    with pytest.raises(PictureError, match="is too large"):
        picture_size(path)


def test_too_large_in_memory() -> None:
    assert "is too large" in refusal(Image.new("1", (10_000, 5_001)))
