"""Damaged pictures: each is read whole, or refused in a sentence.

Pictures of forty kinds are drawn, cut, holed, spliced and given wrong headers. Two processes read each one, in memory that
is filled with other bytes in either, so that a pixel which nobody wrote shows. What counts as fallen through: a process
that dies or takes more than ten seconds, any exception but `PictureError`, a word on the terminal, pixels that differ
between the two processes, and a picture that was cut and is read all the same, with other pixels.
"""

import hashlib
import json
import os
import random
import resource
import select
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from campaigns.tally import Tally

PATIENCE = 10.0
"""Seconds for one picture."""
MEMORY = 6 << 30
"""Bytes of address space for a process that reads."""


# --- Pictures ---------------------------------------------------------------------------------------------------------


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


# --- Damage -----------------------------------------------------------------------------------------------------------

ENDS = {"jpeg": b"\xff\xd9", "png": b"\0\0\0\0IEND\xaeB`\x82", "gif": b";"}


def cut(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """The beginning."""
    return data[: rng.randrange(len(data))]


def cut_and_ended(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """The beginning, and what stands at the end."""
    kind = "jpeg" if data[:2] == b"\xff\xd8" else "png" if data[:2] == b"\x89P" else "gif"
    return cut(data, rng, other) + ENDS[kind]


def middle_gone(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Beginning and end."""
    start, stop = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:start] + data[stop:]


def hole(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Zeros somewhere."""
    start = rng.randrange(len(data))
    return data[:start] + bytes(min(rng.choice((16, 64, 512, 4096)), len(data) - start)) + data[start + 4096 :]


def flips(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """A few other bytes."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 10))):
        damaged[rng.randrange(min(len(data), rng.choice((60, 400, 1 << 30))))] = rng.choice(
            (0, 255, rng.randrange(256))
        )
    return bytes(damaged)


def splice(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """The beginning of one picture and the end of another."""
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def numbers(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """A number of the header, or of the table of tags, that is none."""
    width = rng.choice((1, 2, 4))
    end = len(data) if data[:2] in (b"II", b"MM") else min(len(data), 600)
    at = rng.randrange(max(1, end - width))
    value = rng.choice((0, 1, 2, (1 << 8 * width) - 1, 1 << (8 * width - 1), rng.randrange(1 << 8 * width)))
    return data[:at] + value.to_bytes(width, rng.choice(("little", "big"))) + data[at + width :]


def more_behind(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """A whole picture, and something behind it."""
    return data + rng.choice((b"\0" * 100, other, rng.randbytes(50)))


DAMAGES: tuple[Callable[[bytes, random.Random, bytes], bytes], ...] = (
    cut, cut, cut_and_ended, cut_and_ended, middle_gone, middle_gone, hole, hole, flips, flips, flips, splice, numbers,
    numbers, numbers, more_behind,
)  # fmt: skip
LOSES = (cut, cut_and_ended)
"""What takes pixels and puts nothing in their place: such a picture is refused, or has the pixels of the whole one."""


@dataclass(frozen=True)
class Mutant:
    """A damaged picture."""

    name: str
    data: bytes
    whole: bytes
    loses: bool


def mutants(seed: int) -> Iterator[Mutant]:
    """Without end."""
    rng, files = random.Random(seed), drawings()
    for number in range(1 << 62):
        kind = rng.choice(sorted(files))
        damage = rng.choice(DAMAGES)
        if damage is cut_and_ended and kind.split()[0] not in ENDS:
            damage = cut
        alike = [each for each in sorted(files) if each.split()[0] == kind.split()[0]]
        data = damage(files[kind], rng, files[rng.choice(alike)])
        yield Mutant(f"{number}: {kind}, {damage.__name__}", data, files[kind], damage in LOSES)


# --- Reading ----------------------------------------------------------------------------------------------------------


class Reader:
    """A process that reads pictures, in memory that is filled with a byte of its own."""

    def __init__(self, fill: int) -> None:
        self.fill = fill
        self.said = tempfile.TemporaryFile("a+b")  # noqa: SIM115
        self.start()

    def start(self) -> None:
        """A new process in the place of one that is gone."""
        filled = {
            "MALLOC_PERTURB_": str(self.fill),
            "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
            "MALLOC_TOP_PAD_": str(1 << 26),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", "from campaigns.pictures import read_all; read_all()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, env={**os.environ, **filled},
        )  # fmt: skip
        self.answer(120)

    def send(self, data: bytes) -> None:
        """One picture."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(struct.pack(">Q", len(data)) + data)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says so

    def answer(self, patience: float) -> dict[str, Any]:
        """What became of it: `pixels`, a hash, or `refused`, a sentence; or `fell`, what went wrong."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], patience)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            self.stop()
            problem = f"dies with status {self.process.returncode}" if ready else f"takes more than {patience:g} s"
            self.start()
            return {"fell": problem}
        found: dict[str, Any] = json.loads(line)
        self.said.seek(0)
        if words := self.said.read():
            self.said.truncate(0)
            found = {"fell": f"the terminal says {words[:200]!r}"}
        return found

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def read_all() -> None:
    """In a process of its own: pictures from the standard input, an answer for each on the output."""
    from omni.fast.jpeg import read_pixels
    from omni.vision.pictures import PictureError, read_picture

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe, answers = sys.stdin.buffer, sys.stdout

    def answer(**found: Any) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    answer(ready=True)
    while size := pipe.read(8):
        data = pipe.read(*struct.unpack(">Q", size))
        try:
            pixels = np.asarray(read_picture(data))
            same = np.array_equal(np.asarray(read_pixels(data).pixels)[..., :3], pixels)
            shape = "x".join(map(str, pixels.shape))
            answer(
                **(
                    {"pixels": f"{shape} {hashlib.sha256(pixels.tobytes()).hexdigest()}"}
                    if same
                    else {"fell": "read two ways"}
                )
            )
        except PictureError as error:
            answer(refused=str(error))
        except BaseException:
            answer(fell=traceback.format_exc(limit=-3))


def run(seed: int, count: int, seconds: float) -> Tally:
    """Read so many damaged pictures, or as many as there is time for."""
    end = time.monotonic() + seconds
    tried = refused = unchanged = 0
    fallen: list[str] = []
    whole: dict[bytes, dict[str, Any]] = {}
    with ExitStack() as stack:
        readers = [Reader(fill) for fill in (0x55, 0xAA)]
        for reader in readers:
            stack.callback(reader.stop)

        def read(data: bytes) -> list[dict[str, Any]]:
            for reader in readers:
                reader.send(data)
            return [reader.answer(PATIENCE) for reader in readers]

        for mutant in mutants(seed):
            if tried == count or time.monotonic() > end:
                break
            if mutant.whole not in whole:
                whole[mutant.whole] = read(mutant.whole)[0]
                if "pixels" not in whole[mutant.whole]:
                    fallen.append(f"seed {seed}, {mutant.name}: the whole one is not read: {whole[mutant.whole]}")
            one, other = read(mutant.data)
            tried += 1
            refused += "refused" in one
            unchanged += one == whole[mutant.whole]
            if problem := one.get("fell") or other.get("fell"):
                fallen.append(f"seed {seed}, {mutant.name}: {problem}")
            elif one != other:
                fallen.append(f"seed {seed}, {mutant.name}: differs by what lay in memory: {one} {other}")
            elif mutant.loses and "pixels" in one and one != whole[mutant.whole]:
                fallen.append(f"seed {seed}, {mutant.name}: lost pixels, and is read")
    return Tally(tried, refused, unchanged, tuple(fallen))
