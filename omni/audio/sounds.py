"""A file, bytes or an array becomes a `Sound`, mono samples with their rate, or an error of one sentence.

Every sound enters through `read_sound` or `as_sound`.

    sound = read_sound("speech.wav")           # Sound(2.10 s at 44,100 Hz)
    sound.resampled(16_000).samples            # float32[33600]

What each kind of sound becomes:

| stored as                    | becomes                                                                        |
|------------------------------|--------------------------------------------------------------------------------|
| several channels             | their mean                                                                     |
| integers of 8 to 32 bits     | -1 to 1, by the range of their type                                            |
| floating point               | the same values, which must be finite and at most `LOUDEST`                    |
| any rate                     | the same rate; `Sound.resampled` converts it (soxr)                            |

A file that has lost samples is refused, never filled up (`omni.audio.formats`). Harmless oddities are in `Sound.notes`.
"""

import os
import re
from collections.abc import Mapping
from contextlib import nullcontext
from hashlib import md5
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni.audio.formats import CutError, DamagedError, Facts, after_id3, facts_of
from omni.audio.mpg123 import Words, heard
from omni.audio.sound import (
    MAX_SAMPLES,
    LargeSoundError,
    MissingSoundError,
    Sound,
    SoundError,
    TruncatedSoundError,
    check_length,
    checked_sound,
    library,
    too_large,
)
from omni.files import ReadError, read_whole

MAX_BYTES = 8 * MAX_SAMPLES
"""Largest size of a file: two channels of `MAX_SAMPLES` floats."""


EXPECTED = "a WAV, FLAC, Ogg or MP3 sound"


_BLOCK = 2**18
"""Samples that are decoded at a time."""

Source = str | os.PathLike[str] | bytes | bytearray | memoryview

_CONVERT = "convert it to WAV or FLAC"
_STRANGERS: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer", "run `git lfs pull` to get the sound itself"),
    (re.compile(rb"\s*(<!doctype html|<html)", re.IGNORECASE), "a web page", "download the sound itself"),
    (re.compile(rb".{4}ftyp(M4A|M4B|mp42|isom)", re.DOTALL), "a sound or video of MPEG-4", _CONVERT),
    (re.compile(rb".{4}ftyp|\x1a\x45\xdf\xa3|RIFF.{4}AVI |FLV|\0\0\x01\xba", re.DOTALL), "a video", _CONVERT),
    (re.compile(rb"\xff[\xf0\xf1\xf8\xf9]"), "a sound of AAC", _CONVERT),
    (re.compile(rb"\xff[\xe4-\xe7\xf4-\xf7\xfc-\xff]"), "a sound of MPEG layer I or II", _CONVERT),
    (re.compile(rb"FORM.{4}AIF|RF64|riff|caff|\.snd|#!AMR|wvpk|0&\xb2u", re.DOTALL), "another kind of sound", _CONVERT),
    (re.compile(rb"MThd"), "notes (MIDI) and no sound", "have a synthesizer play it into a WAV file"),
    (re.compile(rb"#EXTM3U|\[playlist\]"), "a list of sounds", "pass one of them"),
    (re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF.{4}WEBP", re.DOTALL), "a picture", "pass it as a picture"),
    (re.compile(rb"%PDF"), "a PDF document", "check that it is the right file"),
    (re.compile(rb"PK\x03\x04"), "a ZIP archive", "unpack it first"),
)
"""Files that people pass by mistake: how they begin, what they are, what to do."""


def read_sound(source: "Source | Sound") -> Sound:
    """Read one sound.

    Args:
        source: a path, the bytes of a sound file, or a `Sound`, which is returned unchanged.

    Raises:
        SoundError: the file is missing, unreadable, no sound, cut off, damaged, empty or too large.
    """
    if isinstance(source, Sound):
        return source
    name = _name(source)
    data = bytes(source) if isinstance(source, bytes | bytearray | memoryview) else _read(os.fsdecode(source))
    if not data:
        raise SoundError(f"{name} is empty, expected {EXPECTED}; get the file again.")
    if len(data) > MAX_BYTES:
        raise too_large(name, f"{MAX_BYTES:,} bytes", f"{len(data):,}")
    data = _without_tag(data)
    try:
        if (facts := facts_of(data)) is None:
            raise _strange(data, name)
        return _decode(data, facts, name)
    except (CutError, DamagedError) as error:
        format_name = _format_of(data)
        start_of_sentence = f"{name} cannot be decoded, expected a whole {format_name} file, found"
        if isinstance(error, CutError):
            raise TruncatedSoundError(
                f"{start_of_sentence} data that end too early ({error}); get the file again."
            ) from error
        raise SoundError(f"{start_of_sentence} {error}; get the file again or {_CONVERT}.") from error


def count_samples(data: bytes) -> int:
    """The number of samples of all channels, as the file states; 0 if it states none. Reading it will then explain why.

    A file of unknown length counts as `MAX_SAMPLES` per channel.
    """
    soundfile = library("soundfile")
    data = _without_tag(data)
    try:
        facts = facts_of(data) or Facts("")
        with heard():
            info = soundfile.info(BytesIO(data[facts.start : facts.end]))
        return int(min(info.frames, MAX_SAMPLES) * info.channels)
    except (soundfile.LibsndfileError, ValueError):
        return 0


def is_sound(given: Any) -> bool:
    """Whether this is one sound, in any form of `as_sound`, and not several."""
    if isinstance(given, tuple) and len(given) == 2 and _is_number(given[1]) and not _is_number(given[0]):
        return True
    if isinstance(given, (list, tuple)):
        return bool(given) and all(map(_is_number, given))
    return getattr(given, "ndim", 1) < 2


def as_sound(given: Any, rate: int | None = None) -> Sound:
    """Make a `Sound` of any form of a sound.

    Args:
        given: a `Sound`; a path or the bytes of a file; samples float[S] or int[S] (an array, a tensor or a list); the pair
            `(samples, rate)`; or `{"array": samples, "sampling_rate": rate}`.
        rate: the rate of samples that come without one.

    Raises:
        SoundError: the argument has none of these forms, or the samples have no rate.
    """
    if isinstance(given, Sound | str | os.PathLike | bytes | bytearray | memoryview):
        return read_sound(given)
    samples = given
    if isinstance(given, Mapping):
        if "array" not in given:
            raise SoundError(f"A sound as a mapping has 'array' and 'sampling_rate', found {sorted(map(str, given))}.")
        samples, rate = given["array"], given.get("sampling_rate", rate)
    elif isinstance(given, tuple) and is_sound(given) and not _is_number(given[0]):
        samples, rate = given
    if rate is None:
        raise SoundError("The samples of a sound come without their rate; pass it as `sampling_rate`.")
    if hasattr(samples, "detach"):  # a tensor
        samples = samples.detach().cpu()
        samples = samples.float() if samples.is_floating_point() else samples
    values = np.asarray(samples)
    if values.ndim != 1:
        raise SoundError(
            f"The samples of a sound are mono, float[S], found an array of shape {values.shape}; average its channels first."
        )
    if values.dtype.kind == "i" and values.dtype.itemsize <= 4:
        values = values / -float(np.iinfo(values.dtype).min)
    elif values.dtype.kind != "f":
        raise SoundError(
            f"The samples of a sound are floats from -1 to 1, or integers of 8 to 32 bits, found {values.dtype}; scale them."
        )
    return checked_sound(np.ascontiguousarray(values, np.float32), _whole(rate), "The sound")


def sound_at(rate: int, given: Any, given_rate: int | None = None) -> Sound:
    """A sound at the rate of an encoder.

    Args:
        rate: the encoder's rate.
        given: a sound in any form of `as_sound`.
        given_rate: the rate of samples that come without one; by default the encoder's.

    Raises:
        SoundError: this is no sound, or its own rate is not `given_rate`.
    """
    sound = as_sound(given, rate if given_rate is None else given_rate)
    if given_rate is not None and sound.rate != given_rate:
        raise SoundError(
            f"The sound comes with {sound.rate:,} samples per second, but `sampling_rate` says {given_rate:,}; "
            "leave `sampling_rate` out, because the sound's own rate is known."
        )
    return sound.resampled(rate)


def fetched(given: Any) -> Any:
    """The sound at a web address or in a data URI. Anything else is returned unchanged.

    Raises:
        SoundError: there is no sound that can be read.
    """
    from omni.downloads import content_of  # most sounds are files

    if not isinstance(given, str):
        return given
    try:
        content = content_of(given, MAX_BYTES)
    except ReadError as error:
        raise _said_of_sound(error) from error
    return given if content is None else read_sound(content)


def _name(source: Source) -> str:
    if isinstance(source, bytes | bytearray | memoryview):
        return f"The given sound ({len(source):,} bytes)"
    if isinstance(source, str | os.PathLike):
        return repr(os.fsdecode(source))
    raise TypeError(f"read_sound takes a path, bytes or a Sound, not {type(source).__name__}")


def _read(path: str) -> bytes:
    try:
        return read_whole(path, "sound", EXPECTED, MAX_BYTES)
    except ReadError as error:
        raise _said_of_sound(error) from error


def _said_of_sound(error: ReadError) -> SoundError:
    kinds = {"missing": MissingSoundError, "too large": LargeSoundError}
    return kinds.get(error.kind, SoundError)(str(error))


def _without_tag(data: bytes) -> bytes:
    """A file without an ID3v2 tag, which some programs write in front of other formats than MP3."""
    start = after_id3(data)
    return data[start:] if start and data[start : start + 4] in (b"fLaC", b"OggS", b"RIFF") else data


def _strange(data: bytes, name: str) -> SoundError:
    what, remedy = next(
        ((what, remedy) for magic, what, remedy in _STRANGERS if magic.match(data)),
        (f"data that begin with {data[:8]!r}", "check that it is the right file"),
    )
    return SoundError(f"{name} is not a sound that can be read, expected {EXPECTED}, found {what}; {remedy}.")


def _format_of(data: bytes) -> str:
    return {b"RIFF": "WAV", b"fLaC": "FLAC", b"OggS": "Ogg"}.get(data[:4], "MP3")


def _decode(data: bytes, facts: Facts, name: str) -> Sound:
    """Decode a checked file block by block into one channel. The number of samples must be the one that the file states."""
    soundfile = library("soundfile")
    found, mixed, hashed = 0, list[NDArray[np.float32]](), md5(usedforsecurity=False)
    said = heard() if facts.format == "MP3" else nullcontext(Words())
    try:
        with said as words, soundfile.SoundFile(BytesIO(data[facts.start : facts.end])) as file:
            rate, channels = file.samplerate, file.channels
            if (
                facts.samples is not None or file.frames < 2**40
            ):  # libsndfile gives a larger number for an unknown length
                check_length(file.frames, name)
            while len(block := file.read(_BLOCK, "int32" if facts.md5 else "float32", always_2d=True)):
                check_length(found := found + len(block), name)
                if facts.md5:
                    hashed.update(_packed(block, facts.bits))
                    block = block.astype(np.float32) * np.float32(2**-31)
                with np.errstate(all="ignore"):  # infinities are refused below
                    mixed.append(block.mean(axis=1, dtype=np.float32) if channels > 1 else block[:, 0].copy())
            expected = file.frames if facts.samples is None else facts.samples
    except soundfile.LibsndfileError as error:
        reason = str(error.error_string).removeprefix("Error : ").rstrip(".")
        if re.search("lost sync|psf_fseek", reason):  # libFLAC's message at the end of a file that is cut off
            raise CutError(f"a piece is missing: {reason}") from error
        raise DamagedError(f"damaged or unusual data ({reason})") from error
    if words.complaints:
        raise DamagedError(f"damaged data ({words.complaints[0]})")
    if facts.rate not in (None, rate):
        raise DamagedError(f"{facts.rate:,} Hz in the header and {rate:,} Hz in the data")
    if found != expected and expected < 2**40:
        raise CutError(f"the header promises {expected:,} samples, the file has {found:,}")
    if facts.md5 and hashed.digest() != facts.md5:
        raise DamagedError("samples that differ from the hash of them in the header")
    samples = np.concatenate(mixed) if mixed else np.zeros(0, np.float32)
    return checked_sound(
        samples, rate, name, ((f"the mean of {channels} channels",) if channels > 1 else ()) + tuple(words[:1])
    )


def _packed(block: NDArray[np.int32], bits: int) -> bytes:
    """Samples in the form that FLAC hashes: the fewest whole bytes for each sample, the lowest byte first."""
    values = (block >> (32 - bits)).astype("<i4").reshape(-1, 1)
    return values.view(np.uint8)[:, : -(-bits // 8)].tobytes()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _whole(rate: Any) -> int:
    if not _is_number(rate) or rate != int(rate):
        raise SoundError(f"The rate of a sound is a whole number of samples per second, found {rate!r}.")
    return int(rate)
