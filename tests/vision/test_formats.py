"""Each format, where a decoder would go on although pixels are missing, and where it complains although none are."""

import io
import random
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFilter, PngImagePlugin

from campaigns.pictures import interlaced, run
from omni.vision.formats import libtiff
from omni.vision.pictures import PictureError, TruncatedPictureError, picture_size, read_picture

Pixels = NDArray[np.uint8]


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int = 83, height: int = 61, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).filter(ImageFilter.GaussianBlur(1))


def pixels(data: bytes) -> Pixels:
    return np.asarray(read_picture(data))


def by_pillow(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def note(data: bytes) -> str | None:
    return read_picture(data).info.get("note")


def refused(data: bytes, words: str, error: type[PictureError] = PictureError) -> None:
    with pytest.raises(error, match=words) as caught:
        read_picture(data)
    assert re.fullmatch(r"[^\n]+; [^;\n]+\.", str(caught.value))


# --- JPEG -------------------------------------------------------------------------------------------------------------

JPEGS: dict[str, Callable[[Image.Image], bytes]] = {
    "4:4:4": lambda image: encode(image, "JPEG", subsampling="4:4:4"),
    "4:2:2": lambda image: encode(image, "JPEG", subsampling="4:2:2"),
    "4:2:0": lambda image: encode(image, "JPEG", subsampling="4:2:0"),
    "4:4:0": lambda image: simplejpeg.encode_jpeg(np.asarray(image), colorsubsampling="440"),
    "4:1:1": lambda image: simplejpeg.encode_jpeg(np.asarray(image), colorsubsampling="411"),
    "grey": lambda image: encode(image.convert("L"), "JPEG"),
    "progressive": lambda image: encode(image, "JPEG", progressive=True),
    "progressive grey": lambda image: encode(image.convert("L"), "JPEG", progressive=True),
    "restarts": lambda image: encode(image, "JPEG", restart_marker_blocks=3),
    "red, green and blue as they are": lambda image: encode(image, "JPEG", keep_rgb=True),
    "inks": lambda image: encode(image.convert("CMYK"), "JPEG"),
    "of low quality": lambda image: encode(image, "JPEG", quality=3),
}


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (64, 48), (67, 129)])
def test_jpeg_files_have_the_pixels_that_pillow_reads(kind: str, size: tuple[int, int]) -> None:
    data = JPEGS[kind](noise(*size))
    np.testing.assert_array_equal(pixels(data), by_pillow(data))
    assert read_picture(data).info == {}


@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_files_decoded_smaller_have_the_pixels_of_pillows_draft(kind: str) -> None:
    data = JPEGS[kind](noise(500, 333))
    opened = Image.open(io.BytesIO(data))
    opened.draft(None, (120, 120))
    picture = read_picture(data, 120)
    assert picture.size == (250, 167)
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(opened.convert("RGB")))


@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_files_that_lost_pixels_are_refused(kind: str) -> None:
    data = JPEGS[kind](noise(160, 120))
    size, start = len(data), data.index(b"\xff\xda") + 20
    length = size - start
    damaged = {
        "half, and an end marker": data[: start + length // 2] + b"\xff\xd9",
        "zeros in the middle": data[: start + length // 3] + bytes(length // 3) + data[start + 2 * length // 3 :],
        "a third gone": data[: start + length // 3] + data[start + 2 * length // 3 :],
    }
    for how, file in damaged.items():
        with pytest.raises(PictureError):
            read_picture(file)
            pytest.fail(how)


def test_jpeg_files_without_their_last_scans_are_refused() -> None:
    """libjpeg shows what there is, and is content."""
    data = encode(noise(), "JPEG", progressive=True)
    scans = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    tables = [data.rindex(b"\xff\xc4", 0, scan) for scan in scans[1:]]
    assert len(tables) > 5
    for table in tables:
        fewer = data[:table] + b"\xff\xd9"
        assert simplejpeg.decode_jpeg(fewer, "RGB").shape == (61, 83, 3)
        refused(fewer, "scans are missing", TruncatedPictureError)


def test_jpeg_files_of_endless_scans_are_refused() -> None:
    data = encode(noise(), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    refused(data[:-2] + 30 * last + b"\xff\xd9", "more than 32 scans")


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


HARMLESS: dict[str, Callable[[bytes], bytes]] = {
    "bytes before the first table": lambda data: data[:20] + b"left over" + data[20:],
    "zeros between segments": lambda data: data.replace(b"\xff\xc4", bytes(30) + b"\xff\xc4", 1),
    "zeros before the end": lambda data: data[:-2] + bytes(30) + data[-2:],
    "no end": lambda data: data[:-2],
    "half of an end": lambda data: data[:-1],
    "a newer version of JFIF": lambda data: data.replace(b"JFIF\0\1", b"JFIF\0\3", 1),
    "a scan that says which coefficients": lambda data: data.replace(b"\x00\x3f\x00", b"\x01\x3f\x00", 1),
    "a profile that is cut": lambda data: data[:20] + segment(0xE2, b"ICC_PROFILE\0\1") + b"rest" + data[20:],
}


NOWHERE = {  # Adobe's segment is in the place of JFIF's; the coefficients of a progressive scan mean something
    ("bytes before the first table", "inks"),
    ("a newer version of JFIF", "inks"),
    ("a profile that is cut", "inks"),
    ("a scan that says which coefficients", "progressive"),
}
KINDS = ("4:2:0", "grey", "inks", "restarts", "progressive")


@pytest.mark.parametrize(("what", "kind"), sorted({(what, kind) for what in HARMLESS for kind in KINDS} - NOWHERE))
def test_what_does_not_concern_pixels_is_noted(what: str, kind: str) -> None:
    whole = JPEGS[kind](noise())
    data = HARMLESS[what](whole)
    assert data != whole
    with pytest.raises(ValueError, match=r"."):
        simplejpeg.decode_jpeg(data, "CMYK" if kind == "inks" else "RGB")
    np.testing.assert_array_equal(pixels(data), pixels(whole))
    assert note(data)
    assert note(whole) is None


def test_notes_are_about_the_file_and_not_about_other_code() -> None:
    data = encode(noise(), "JPEG")[:-2]
    assert note(data) == "Premature end of JPEG file"
    with Image.open(io.BytesIO(data)) as opened:
        assert read_picture(opened).info["note"] == "Premature end of JPEG file"


@pytest.mark.parametrize("marker", [b"\xff\xc4", b"\xff\xdb"])
@pytest.mark.parametrize("kind", ["4:2:0", "progressive"])
def test_an_invalid_table_is_refused_by_jpeg_files(marker: bytes, kind: str) -> None:
    """libjpeg would take the one that it has had before, or one that it knows."""
    data = JPEGS[kind](noise())
    for found in re.finditer(re.escape(marker), data):
        refused(data[: found.start()] + b"\0" + data[found.start() + 1 :], "cannot be decoded")


def test_colours_that_are_sampled_as_turbojpeg_does_not_know_are_refused() -> None:
    factors = (0x22, 0x21, 0x11)
    frame = struct.pack(">BHHB", 8, 24, 40, 3) + b"".join(bytes((each + 1, factors[each], 0)) for each in range(3))
    zero = bytes((1, *[0] * 15, 0))  # the one code of a table: a single bit for 0
    data = segment(0xDB, b"\0" + bytes([16] * 64)) + segment(0xC0, frame)
    data += segment(0xC4, b"\0" + zero) + segment(0xC4, b"\x10" + zero) + segment(0xDA, b"\3\1\0\2\0\3\0\0\x3f\0")
    data = b"\xff\xd8" + data + bytes(12) + b"\xff\xd9"
    assert by_pillow(data).shape == (24, 40, 3)
    refused(data, "subsampling level.*convert it to PNG")


# --- PNG --------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunk(data: bytes, added: bytes) -> bytes:
    """Behind the header."""
    return data[:33] + added + data[33:]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_long_comment_costs_no_picture(compressed: bool) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=compressed)
    image = noise()
    assert (pixels(encode(image, "PNG", pnginfo=info)) == np.asarray(image)).all()
    assert (pixels(encode(image, "PNG", icc_profile=bytes(3_000_000))) == np.asarray(image)).all()


@pytest.mark.parametrize("kind", [b"tEXt", b"iCCP", b"eXIf", b"gAMA", b"acTL"])
def test_a_damaged_chunk_that_decides_no_pixel_is_noted(kind: bytes) -> None:
    whole = encode(noise(), "PNG")
    damaged = bytearray(chunk(kind, b"something or other"))
    damaged[-1] ^= 1
    data = with_chunk(whole, bytes(damaged))
    assert (pixels(data) == pixels(whole)).all()
    assert note(data) == f"bad checksum in chunk {kind.decode()}"


@pytest.mark.parametrize("kind", [b"tRNS", b"tRNs", b"PLTE", b"IDAT", b"zzZz"])
def test_a_damaged_chunk_that_may_decide_pixels_is_an_error(kind: bytes) -> None:
    damaged = bytearray(chunk(kind, bytes(6)))
    damaged[-1] ^= 1
    refused(with_chunk(encode(noise(), "PNG"), bytes(damaged)), "bad checksum in chunk")


def test_chunks_that_must_be_understood_and_are_not() -> None:
    data = encode(noise(), "PNG")
    refused(data[:8] + chunk(b"CgBI", bytes(4)) + data[8:], "CgBI")
    refused(with_chunk(data, chunk(b"NEWS", b"")), "unknown critical chunk b'NEWS'")
    refused(with_chunk(data, data[8:33]), "unknown critical chunk b'IHDR'")
    refused(data[:8] + data[33:], "no header")


def test_orientation_and_transparency_are_among_what_is_kept() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = noise()
    turned = np.rot90(np.asarray(image), -1)
    data = encode(image, "PNG", exif=exif)
    assert (pixels(data) == turned).all()
    place = data.index(b"eXIf") - 4
    length = 12 + struct.unpack_from(">I", data, place)[0]
    behind = data[:place] + data[place + length : -12] + data[place : place + length] + data[-12:]
    assert (pixels(behind) == turned).all()
    assert picture_size(behind) == (61, 83)
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x:xmpmeta tiff:Orientation="6"/>'
    assert (pixels(with_chunk(encode(image, "PNG"), chunk(b"iTXt", xmp))) == turned).all()


def few_rows(rows: int, promised: int, last: int = 0) -> bytes:
    """A PNG file, whole to its checksums, of which the compressed data end in good order after some rows."""
    header = struct.pack(">IIBBBBB", 5, promised, 8, 0, 0, 0, 0)
    values = [*(each % 255 + 1 for each in range(rows - 1)), last]
    data = zlib.compress(b"".join(b"\0" + bytes([each] * 5) for each in values))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_png_files_with_fewer_rows_than_they_promise_are_refused() -> None:
    assert by_pillow(few_rows(30, 40)).shape == (40, 5, 3), "Pillow fills up with black"
    for last in (0, 9):
        refused(few_rows(30, 40, last), "rows are missing", TruncatedPictureError)
        refused(few_rows(39, 40, last), "rows are missing", TruncatedPictureError)
        assert pixels(few_rows(40, 40, last))[-1, 0, 0] == last


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (5, 4), (8, 8), (83, 61)])
def test_interlaced_png_files_are_read_whole_or_not_at_all(size: tuple[int, int]) -> None:
    image = np.asarray(noise(*size))
    data = interlaced(image)
    np.testing.assert_array_equal(pixels(data), image)
    (length,) = struct.unpack_from(">I", data, 33)
    rows = zlib.decompress(data[41 : 41 + length])
    for shorter in {len(rows) - 1, len(rows) // 2, 0}:
        file = data[:33] + chunk(b"IDAT", zlib.compress(rows[:shorter])) + chunk(b"IEND", b"")
        refused(file, "truncated|rows are missing", TruncatedPictureError)


# --- GIF --------------------------------------------------------------------------------------------------------------


def gif_frame(codes: list[int]) -> bytes:
    """16 x 16 pixels, as codes of nine bits."""
    bits = "".join(f"{code:09b}"[::-1] for code in codes)
    data = bytes(int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits), 8))
    blocks = b"".join(bytes([len(data[at : at + 255])]) + data[at : at + 255] for at in range(0, len(data), 255))
    return b"," + struct.pack("<HHHHB", 0, 0, 16, 16, 0) + b"\x08" + blocks + b"\0"


def gif(*frames: bytes) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", 16, 16, 0, 0, 0) + b"".join(frames) + b";"


def test_a_gif_frame_that_ends_early_is_not_filled_from_the_next() -> None:
    whole = [each for at in range(0, 256, 64) for each in (256, *range(at, at + 64))]
    assert pixels(gif(gif_frame([*whole, 257])))[..., 0].tolist() == np.arange(256).reshape(16, 16).tolist()
    early = gif_frame([*whole[:130], 257])
    refused(gif(early), "too early", TruncatedPictureError)
    refused(gif(early, *[gif_frame([*whole, 257])] * 3), "too early", TruncatedPictureError)


def test_what_keeps_a_reader_busy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("gif", "jpeg", "limits", "png", "tiff"):
        monkeypatch.setattr(f"omni.vision.formats.{kind}.MAX_PARTS", 100)
    files = {
        "gif": gif(b"!\xfe" + b"\1x" * 200 + b"\0", gif_frame([256, *range(255), 257])),
        "gif of nothing": gif(bytes(200), gif_frame([256, *range(255), 257])),
        "tiff": tiff(bytes(2000), (273, 8), counts={273: 300}),
        "png": with_chunk(encode(noise(), "PNG"), 200 * chunk(b"tEXt", b"")),
        "jpeg": b"\xff\xd8" + 200 * segment(0xFE, b"") + encode(noise(), "JPEG")[2:],
    }
    for data in files.values():
        refused(data, "more than 100 parts")


# --- BMP --------------------------------------------------------------------------------------------------------------


def test_run_lengths_of_a_large_picture_are_refused() -> None:
    """Pillow reads them pixel by pixel: a few kilobytes keep it busy for many seconds."""
    runs = b"\1\1\0\0" * 4000
    header = struct.pack("<2sIHHI", b"BM", 1078 + len(runs), 0, 0, 1078)
    header += struct.pack("<IiiHHIIiiII", 40, 4000, 4000, 1, 8, 1, len(runs), 0, 0, 256, 0)
    refused(header + bytes(1024) + runs, "run lengths of more than 10,000,000 pixels")


# --- TIFF -------------------------------------------------------------------------------------------------------------


def tiff(
    data: bytes, *tags: tuple[int, int], size: tuple[int, int] = (16, 16), counts: dict[int, int] | None = None
) -> bytes:
    """Grey, in one strip, by hand; other tags replace those, of which there is one value if nothing else is said."""
    entries = {256: size[0], 257: size[1], 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: size[1], 279: len(data)} | dict(
        tags
    )
    data += b"\0" * (len(data) % 2)
    many = counts or {}
    table = b"".join(struct.pack("<HHII", tag, 4, many.get(tag, 1), value) for tag, value in sorted(entries.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries)) + table + bytes(4)


COMPRESSIONS = ("tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "jpeg", "zstd", "lzma")
FAXES = ("group3", "group4", "tiff_ccitt")


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("rows", [None, 8])
def test_compressed_tiff_files_have_the_pixels_that_pillow_reads(compression: str, rows: int | None) -> None:
    for image in (noise(), noise().convert("L")):
        data = encode(image, "TIFF", compression=compression, tiffinfo={278: rows} if rows else {})
        np.testing.assert_array_equal(pixels(data), by_pillow(data))


@pytest.mark.parametrize("compression", FAXES)
@pytest.mark.parametrize("rows", [None, 7])
def test_faxes_are_read_whatever_their_width(compression: str, rows: int | None) -> None:
    strips = {278: rows} if rows else {}
    for width in (1, 7, 8, 9, 19, 64, 83, 1728):
        page = noise(width, 30).convert("1")
        found = pixels(encode(page, "TIFF", compression=compression, tiffinfo=strips))
        assert (found == 255 * np.asarray(page)[..., None]).all(), width


@pytest.mark.parametrize("strip", [bytes(64), b"\x00\x10\x01", b"\xff", b"\xff\xff\x00\x10\x01"])
def test_a_fax_that_ends_early_shows_nobodys_memory(strip: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    data = tiff(strip, (258, 1), (259, 4), size=(800, 600))
    refused(data, "truncated in strip 0", TruncatedPictureError)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("compression", sorted({*COMPRESSIONS, *FAXES} - {"packbits", "zstd"}))
def test_what_libtiff_complains_about_is_an_error_and_nothing_is_said_on_the_terminal(
    compression: str, capfd: pytest.CaptureFixture[str]
) -> None:
    image = noise().convert("1") if compression in FAXES else noise()
    whole = encode(image, "TIFF", compression=compression)
    rng, refusals = random.Random(0), 0
    for _ in range(40):
        at = rng.randrange(8, len(whole) - 300)
        try:
            read_picture(whole[:at] + rng.randbytes(20) + whole[at + 20 :])
        except PictureError:
            refusals += 1
    assert refusals > 20
    assert capfd.readouterr().err == ""


def test_strips_that_do_not_cover_the_picture() -> None:
    data = bytes(range(256))
    assert pixels(tiff(data))[-1, -1, 0] == 255
    short = tiff(data, (278, 10))  # one strip of ten rows
    assert not by_pillow(short)[10:].any(), "Pillow fills up with black"
    refused(short, "strips are missing", TruncatedPictureError)


def test_tags_that_share_bytes_do_not_fill_the_memory() -> None:
    """A table of 65,535 tags may have each hold all of the file."""
    numbers = range(40_000, 40_200)
    data = tiff(bytes(1000), *((number, 8) for number in numbers), counts=dict.fromkeys(numbers, 250))
    refused(data, "tags are larger than the file")
    turned = tiff(b"", (274, 6), *((number, 8) for number in numbers), counts=dict.fromkeys(numbers, 250))
    image = noise()
    for about in (encode(image, "WEBP", lossless=True, exif=turned), encode(image, "PNG", exif=turned)):
        assert read_picture(about).size == image.size  # what would turn it is not read


def test_where_libtiff_cannot_be_asked_compressed_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libtiff, "_library", lambda: None)
    refused(encode(noise(), "TIFF", compression="tiff_lzw"), "this build of Pillow.*convert it to PNG")
    assert (pixels(encode(noise(), "TIFF")) == np.asarray(noise())).all()


# --- All of them ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_thousands_of_damaged_pictures_are_read_whole_or_refused() -> None:
    tally = run(seed=0, count=500, seconds=300)
    assert tally.tried == 500
    assert tally.refused > 250
    assert tally.failures == ()
