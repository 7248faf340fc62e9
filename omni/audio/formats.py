"""Checks the structure of sound files before they are decoded.

Most decoders continue after damage: they skip a damaged page, and fill or leave out missing samples. The checks of this
module read the structure of the whole file, and raise if it contradicts itself.

| format      | what is noticed                                                                                  |
|-------------|--------------------------------------------------------------------------------------------------|
| WAV         | a cut; lengths and sizes that disagree. The samples have no checksum                             |
| FLAC        | a cut; any changed sample, because the header has a hash of all samples                          |
| Ogg         | a cut; any changed byte, because every page has a checksum and the last page is marked           |
| MP3         | a cut inside a frame; missing frames, if the first frame states their number; complaints of the  |
|             | decoder. The samples have no checksum                                                            |
"""

import re
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple


class CutError(ValueError):
    """The data end too early. The message says what is missing."""


class DamagedError(ValueError):
    """The data contradict themselves, or have an unsupported format. The message says what was found."""


class Facts(NamedTuple):
    """What the header of a file states.

    Attributes:
        format: the name of the format, for messages.
        samples: samples per channel; None if the header does not state the exact number.
        rate: samples per second; None if only the decoder knows it.
        bits: bits per sample, if there is a hash of the samples.
        md5: hash of all samples before compression; empty if there is none.
        start, end: the bytes of the file that the decoder gets.
    """

    format: str
    samples: int | None = None
    rate: int | None = None
    bits: int = 0
    md5: bytes = b""
    start: int = 0
    end: int | None = None


def facts_of(data: bytes) -> Facts | None:
    """Check a file, and return what its header states; None if this module does not know the format.

    Raises:
        CutError: the data end too early.
        DamagedError: the data contradict themselves.
    """
    check = next((check for magic, check in _FORMATS if magic.match(data)), None)
    return None if check is None else check(data)


def after_id3(data: bytes) -> int:
    """The byte at which the sound begins, after an ID3v2 tag. Such a tag may come before any format."""
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    size = 0
    for byte in data[6:10]:
        size = size << 7 | byte & 0x7F
    return 10 + size + 10 * (data[5] >> 4 & 1)


# --- WAV --------------------------------------------------------------------------------------------------------------

_PLAIN = (1, 3, 6, 7, 0xFFFE)
"""Codes of formats without compression: PCM, floats, A-law, mu-law, and a longer header for these."""


def _wav(data: bytes) -> Facts:
    chunks: dict[bytes, tuple[int, int]] = {}
    at = 12
    while at < len(data):
        if data[at] == 0 and data.count(0, at) == len(data) - at:
            break  # padding
        name, size = _chunk(data, at)
        if name in chunks and name in (b"fmt ", b"data"):
            raise DamagedError(f"two chunks {name.decode()!r}")
        chunks[name] = (at + 8, size)
        at += 8 + size + size % 2
    if (end := 8 + struct.unpack_from("<I", data, 4)[0]) > len(data) + 1 and end < 2**32 - 1:
        raise CutError(f"the header promises {end:,} bytes, the file has {len(data):,}")
    if not {b"fmt ", b"data"} <= chunks.keys() or chunks[b"fmt "][0] > chunks[b"data"][0]:
        raise DamagedError("no chunk 'fmt ' before a chunk 'data'")
    start, size = chunks[b"fmt "]
    if size < 16:
        raise DamagedError(f"a chunk 'fmt ' of {size} bytes")
    tag, channels, rate, per_second, per_frame, bits = struct.unpack_from("<HHIIHH", data, start)
    if tag not in _PLAIN:
        raise DamagedError(f"samples that are compressed (of kind {tag})")
    if not channels or per_frame != channels * -(-bits // 8) or per_second != rate * per_frame:
        raise DamagedError(
            f"a header that contradicts itself: {channels} channels of {bits} bits, {per_frame} bytes for all of them, at "
            f"{rate:,} Hz {per_second:,} in a second"
        )
    size = chunks[b"data"][1]
    if size % per_frame:
        raise CutError(f"{size:,} bytes of samples end inside of one, which has {per_frame}")
    return Facts("WAV", size // per_frame, rate)


def _chunk(data: bytes, at: int) -> tuple[bytes, int]:
    """Name and size of the chunk that begins at this byte. The last chunk may lack its byte of padding."""
    if at + 8 > len(data):
        raise CutError(f"it ends inside the header of a chunk, at byte {len(data):,}")
    name, size = struct.unpack_from("<4sI", data, at)
    if not all(0x20 <= byte < 0x7F for byte in name):
        raise DamagedError(f"{len(data) - at:,} bytes behind the last chunk that belong to none")
    if at + 8 + size > len(data):
        has = len(data) - at - 8
        if name == b"data" and size == 2**32 - 1:
            raise CutError("the header says no length, as of a recording that was never finished")
        raise CutError(f"the header of {name.decode()!r} promises {size:,} bytes, the file has {has:,} more")
    return name, size


# --- FLAC -------------------------------------------------------------------------------------------------------------

_FLAC_RATES = (0, 88_200, 176_400, 192_000, 8_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000)


def _flac(data: bytes) -> Facts:
    at, last, info = 4, False, b""
    while not last:
        if at + 4 > len(data):
            raise CutError("it ends inside its header")
        last, kind, size = bool(data[at] & 0x80), data[at] & 0x7F, int.from_bytes(data[at + 1 : at + 4])
        if at == 4 and (kind, size) != (0, 34):
            raise DamagedError("no stream information at its start")
        info = info or data[at + 4 : at + 4 + size]
        at += 4 + size
    if at + 4 > len(data):
        raise CutError("it ends inside its header")
    if data[at] != 0xFF or data[at + 1] >> 2 != 0x3E:
        raise DamagedError("no frame behind the header")
    packed = int.from_bytes(info[10:18])
    rate, bits, samples = packed >> 44, (packed >> 36 & 0x1F) + 1, packed & 2**36 - 1
    of_frame = _FLAC_RATES[code] if (code := data[at + 2] & 0xF) < len(_FLAC_RATES) else 0
    if of_frame not in (0, rate):
        raise DamagedError(f"{rate:,} Hz in the header and {of_frame:,} Hz in the first frame")
    return Facts("FLAC", samples or None, rate, bits, info[18:34].strip(b"\0") and info[18:34])


# --- Ogg --------------------------------------------------------------------------------------------------------------

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_CODECS = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex   ")


def _ogg(data: bytes) -> Facts:
    at, pages, flags, stream = 0, 0, 0, b""
    while at < len(data):
        if data[at : at + 4] != b"OggS" and len(data) - at >= 4:
            raise DamagedError(f"no page at byte {at:,}, where the one before ends")
        table = data[at + 27 : at + 27 + data[at + 26]] if at + 27 <= len(data) else b""
        end = at + 27 + len(table) + sum(table)
        if at + 27 > len(data) or len(table) < data[at + 26] or end > len(data):
            raise CutError(f"page {pages} is not whole")
        if _ogg_checksum(data[at:end]) != data[at + 22 : at + 26]:
            raise DamagedError(f"page {pages} with a wrong checksum")
        if pages == 0:
            stream = data[at + 14 : at + 18]
            if not data[at + 27 + len(table) : end].startswith(_CODECS):
                raise DamagedError("a video, or a sound that is neither Vorbis nor Opus, FLAC or Speex")
        elif stream != data[at + 14 : at + 18]:
            raise DamagedError("several streams, of which one would be heard")
        if pages != (number := int.from_bytes(data[at + 18 : at + 22], "little")):
            raise CutError(f"page {number} stands where page {pages} is expected")
        at, pages, flags = end, pages + 1, data[at + 5]
    if not flags & 4:
        raise CutError("the last page is missing")
    return Facts("Ogg")


def _ogg_checksum(page: bytes) -> bytes:
    """Ogg's CRC-32: as zlib's, with the bits in reverse order, from zero, over a page whose checksum field is zero."""
    reversed_bits = (page[:22] + bytes(4) + page[26:]).translate(_REVERSED)
    crc = zlib.crc32(reversed_bits, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return crc.to_bytes(4, "big").translate(_REVERSED)


# --- MP3 --------------------------------------------------------------------------------------------------------------

_KBITS = {
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MP3_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
"""Sampling rates by the two bits of the version: MPEG 1, 2 and 2.5."""
_TAGS = re.compile(rb"TAG|APETAGEX|LYRICSBEGIN|\0*\Z")
"""What may follow the last frame."""


def _mp3(data: bytes) -> Facts:
    at = start = after_id3(data)
    frames, counted, first = 0, -1, b""
    while at < len(data) and not _TAGS.match(data, at):
        if at + 4 > len(data):
            raise CutError(f"frame {frames} is not whole")
        head, size = data[at : at + 4], _mp3_frame(data, at)
        first = first or head
        # version, layer and rate, which may not change from frame to frame
        if not size or (head[1] & 0xFE, head[2] & 0x0C) != (first[1] & 0xFE, first[2] & 0x0C):
            raise DamagedError(f"no frame at byte {at:,}, where the one before ends")
        if at + size > len(data):
            raise CutError(f"frame {frames} is not whole")
        if frames == 0:
            counted = _mp3_count(data[at : at + size])
        at, frames = at + size, frames + 1
    if counted >= 0 and frames - 1 != counted:
        kind = CutError if frames - 1 < counted else DamagedError
        raise kind(f"the first frame counts {counted:,} others, the file has {frames - 1:,}")
    if not frames:
        raise CutError("it has no frame")
    return Facts("MP3", rate=_MP3_RATES[first[1] >> 3 & 3][first[2] >> 2 & 3], start=start, end=at)


def _mp3_frame(data: bytes, at: int) -> int:
    """The size in bytes of the MP3 frame that begins at this byte; 0 if there is none."""
    second, third = data[at + 1], data[at + 2]
    version, rate, bits = second >> 3 & 3, third >> 2 & 3, third >> 4
    if data[at] != 0xFF or second & 0xE6 != 0xE2 or version == 1 or rate == 3 or bits in (0, 15):
        return 0
    kbits = _KBITS[3 if version == 3 else 2][bits - 1]
    return (144_000 if version == 3 else 72_000) * kbits // _MP3_RATES[version][rate] + (third >> 1 & 1)


def _mp3_count(frame: bytes) -> int:
    """The number of frames after this one, if it states the number (Xing, Info); else -1."""
    is_first_version, is_mono, is_checked = frame[1] >> 3 & 3 == 3, frame[3] >> 6 == 3, not frame[1] & 1
    side = (17 if is_mono else 32) if is_first_version else (9 if is_mono else 17)
    at = 4 + 2 * is_checked + side
    if frame[at : at + 4] not in (b"Xing", b"Info") or not int.from_bytes(frame[at + 4 : at + 8]) & 1:
        return -1
    return int.from_bytes(frame[at + 8 : at + 12])


_FORMATS: tuple[tuple[re.Pattern[bytes], Callable[[bytes], Facts]], ...] = (
    (re.compile(rb"RIFF.{4}WAVE", re.DOTALL), _wav),
    (re.compile(rb"fLaC"), _flac),
    (re.compile(rb"OggS"), _ogg),
    (re.compile(rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]"), _mp3),
)
