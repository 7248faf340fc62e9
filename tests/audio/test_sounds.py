"""Every file becomes the samples that were written into it, or one sentence; a file that lost some is never filled up."""

import os
import pickle
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omni.audio import sounds
from omni.audio.mpg123 import heard
from omni.audio.sound import LargeSoundError, MissingSoundError, Sound, SoundError
from omni.audio.sounds import as_sound, is_sound, read_sound

from .conftest import KINDS, chirp, file_of, soundfile

LOSSLESS = {"wav": 2**-15, "wav of floats": 0, "wav of 24 bits": 2**-23, "flac": 2**-15, "flac of 24 bits": 2**-23,
            "flac of 8 bits": 2**-6}  # fmt: skip


def sentence(error: pytest.ExceptionInfo[SoundError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


# --- What is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_samples_are_those_of_libsndfile(kind: str, tmp_path: Path) -> None:
    data = KINDS[kind]()
    path = tmp_path / "sound.bin"  # what a file is, its content tells
    path.write_bytes(data)
    expected, rate = soundfile.read(path, dtype="float32", always_2d=True)
    for source in (path, str(path), data, bytearray(data), memoryview(data)):
        found = read_sound(source)
        assert found.rate == rate
        assert found.samples.dtype == np.float32
        # mpg123 rounds otherwise wherever a buffer lies in memory
        np.testing.assert_allclose(
            found.samples, expected.mean(axis=1), rtol=0, atol=1e-6 if kind.startswith("mp3") else 0
        )
    if kind in LOSSLESS:
        written = (
            np.stack([chirp(rate=rate), chirp(rate=rate, seed=1)], 1).mean(1)
            if expected.shape[1] == 2
            else chirp(rate=rate)
        )
        np.testing.assert_allclose(found.samples, written, rtol=0, atol=LOSSLESS[kind] + 1e-7)


def test_blocks_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    data = {kind: KINDS[kind]() for kind in ("wav of floats", "flac of 24 bits", "ogg vorbis")}
    whole = {kind: read_sound(each).samples for kind, each in data.items()}
    monkeypatch.setattr(sounds, "_BLOCK", 777)
    for kind, each in data.items():
        np.testing.assert_array_equal(read_sound(each).samples, whole[kind])


def test_channels_become_their_mean() -> None:
    left, right = chirp(), chirp(seed=1)
    for channels in (2, 6):
        data = file_of(np.stack([left, right] * (channels // 2), 1), subtype="FLOAT")
        found = read_sound(data)
        np.testing.assert_allclose(found.samples, (left + right) / 2, atol=1e-6)
        assert found.notes == (f"the mean of {channels} channels",)
    opposite = read_sound(file_of(np.stack([left, -left], 1), subtype="FLOAT"))
    assert opposite.notes == ("the mean of 2 channels", "silent")


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 48_000, 96_000])
def test_any_rate_becomes_another(rate: int) -> None:
    """A slow tone is the same tone at another rate, apart from its ends."""
    time = np.arange(rate) / rate
    sound = Sound(np.sin(2 * np.pi * 200 * time).astype(np.float32), rate).resampled(16_000)
    assert (sound.rate, len(sound.samples)) == (16_000, 16_000)
    expected = np.sin(2 * np.pi * 200 * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(sound.samples[800:-800], expected[800:-800], atol=2e-3)
    assert sound.resampled(16_000) is sound


def test_what_is_above_half_of_the_new_rate_is_gone() -> None:
    high = Sound(np.sin(2 * np.pi * 15_000 * np.arange(48_000) / 48_000).astype(np.float32), 48_000)
    assert np.abs(high.resampled(16_000).samples[800:-800]).max() < 1e-3


def test_what_is_odd_and_harmless_is_noted() -> None:
    assert repr(read_sound(file_of(chirp(2.1)))) == "Sound(2.10 s at 16,000 Hz)"
    silent = read_sound(file_of(np.zeros(8_000)))
    assert repr(silent) == "Sound(0.50 s at 16,000 Hz; silent)"
    assert read_sound(file_of(np.clip(9 * chirp(), -1, 1))).notes == ("clipped",)
    assert read_sound(file_of(chirp() / np.abs(chirp()).max())).notes == ()  # one sample at the top
    assert silent.resampled(8_000).notes == ("silent",)
    assert as_sound(np.zeros(9), 8_000).notes == ("silent",)


def test_a_sound_is_frozen_and_travels() -> None:
    sound = read_sound(file_of(np.zeros(99)))
    with pytest.raises(AttributeError):
        sound.rate = 8_000  # type: ignore[misc]
    again = pickle.loads(pickle.dumps(sound))
    assert (again.rate, again.notes, again.samples.tolist()) == (sound.rate, sound.notes, sound.samples.tolist())
    assert read_sound(sound) is sound


def test_ten_million_samples_and_one() -> None:
    assert len(read_sound(file_of(np.zeros(10_000_000, np.int16), format="FLAC")).samples) == 10_000_000
    assert len(read_sound(file_of(np.full(1, 0.5))).samples) == 1


# --- What is refused --------------------------------------------------------------------------------------------------


def test_files_without_a_sound_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        MissingSoundError, match="'no.wav' does not exist in .*, expected a WAV, FLAC, Ogg or MP3 sound"
    ):
        read_sound("no.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "empty.wav").touch()
    for source, message in [
        (tmp_path, "is a folder"),
        ("pipe.wav", "is a pipe or a device"),
        ("/dev/zero", "is a pipe or a device"),
        ("https://example.org/a.wav", "is an address, expected a file; download the sound first"),
        ("a\0b", "cannot be opened"),
        ("empty.wav", "is empty"),
        (b"", "is empty"),
        ("/proc/version", "is empty"),
    ]:
        with pytest.raises(SoundError, match=message) as error:
            read_sound(source)
        assert error.value.kind == "unreadable", source
        sentence(error)
    with pytest.raises(TypeError, match="takes a path, bytes or a Sound, not int"):
        read_sound(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<!DOCTYPE html><html>", "found a web page; download the sound itself"),
        (b"version https://git-lfs.github.com/spec/v1\n", "found a Git LFS pointer; run `git lfs pull`"),
        (b"\0\0\0\x20ftypM4A \0\0\0\0", "found a sound or video of MPEG-4; convert it to WAV or FLAC"),
        (b"\0\0\0\x20ftypqt  \0\0\0\0", "found a video; convert it"),
        (b"\x1a\x45\xdf\xa3" + bytes(20), "found a video"),
        (b"RIFF\0\0\0\0AVI LIST", "found a video"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "found a picture; pass it as a picture"),
        (b"\x89PNG\r\n\x1a\n", "found a picture"),
        (b"\xff\xf1\x50\x80" + bytes(20), "found a sound of AAC"),
        (b"\xff\xfd\x50\x80" + bytes(20), "found a sound of MPEG layer I or II"),
        (b"FORM\0\0\0\0AIFFCOMM", "found another kind of sound; convert it to WAV or FLAC"),
        (b"MThd\0\0\0\6", "found notes \\(MIDI\\)"),
        (b"#EXTM3U\na.mp3", "found a list of sounds; pass one of them"),
        (b"PK\x03\x04", "found a ZIP archive; unpack it first"),
        (b"hello", "found data that begin with b'hello'; check that it is the right file"),
        (b"RIFF", "found data that begin with b'RIFF'"),
    ],
    ids=lambda value: value[:16] if isinstance(value, bytes) else "",
)
def test_what_people_pass_by_mistake(data: bytes, message: str) -> None:
    with pytest.raises(SoundError, match=message) as error:
        read_sound(data)
    assert error.value.kind == "unreadable"
    assert "is not a sound that can be read, expected a WAV, FLAC, Ogg or MP3 sound" in sentence(error)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_anywhere_is_noticed(kind: str) -> None:
    """An MP3 has one frame more than it counts, and is cut here inside of it too."""
    data = KINDS[kind]()
    draw = random.Random(0)
    for length in [*(draw.randrange(4, len(data)) for _ in range(40)), len(data) - 1, len(data) - 2]:
        with pytest.raises(SoundError) as error:
            read_sound(data[:length])
        assert error.value.kind == "truncated" or length < 64, (length, sentence(error))


def test_what_the_decoder_of_mp3_complains_of_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    """It writes to the error output that it cannot decode a frame, leaves it silent, and goes on."""
    data = KINDS["mp3 of 16 kHz"]()
    frame = data.index(data[:2], 1000)
    with pytest.raises(
        SoundError, match=r"expected a whole MP3 file, found damaged data \(.*big_values too large!\); get"
    ):
        read_sound(changed(data, frame + 6, b"\xff" * 7))
    sizes = data.index(b"Xing") + 12  # of the stream
    sound = read_sound(changed(data, sizes, b"\0\1\0\0"))
    assert [note for note in sound.notes if note.startswith("Warning: Xing stream size off")] == [*sound.notes]
    np.testing.assert_array_equal(sound.samples, read_sound(data).samples)
    assert capfd.readouterr() == ("", "")


def test_what_others_say_while_a_sound_is_decoded_is_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with heard() as words:
        os.write(2, b"hello\n[src/libmpg123/layer3.c:1] error: oh\nWarning: well\n")
    assert (words, words.complaints) == (["[src/libmpg123/layer3.c:1] error: oh", "Warning: well"], words[:1])
    assert capfd.readouterr().err == "hello\n"


def changed(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def page(data: bytes, number: int) -> int:
    """Where a page of an Ogg file begins."""
    at = -1
    for _ in range(number + 1):
        at = data.index(b"OggS", at + 1)
    return at


LIES: dict[str, tuple[str, Callable[[bytes], bytes], str, str]] = {
    "WAV, more samples than there are": (
        "wav", lambda data: changed(data, 40, struct.pack("<I", 99_998)),
        "truncated", "the header of 'data' promises 99,998 bytes, the file has 16,000 more"),
    "WAV, fewer samples than there are": (
        "wav", lambda data: changed(data, 40, struct.pack("<I", 9_998)), "unreadable", "that belong to none"),
    "WAV, never finished": (
        "wav", lambda data: changed(data, 40, b"\xff" * 4), "truncated", "a recording that was never finished"),
    "WAV, of another rate than its bytes in a second": (
        "wav", lambda data: changed(data, 24, struct.pack("<I", 8_000)), "unreadable", "a header that contradicts itself"),
    "WAV, two channels in the bytes of one": (
        "wav", lambda data: changed(data, 22, b"\2"), "unreadable", "a header that contradicts itself"),
    "WAV, half a sample": (
        "wav", lambda data: changed(data[:-1], 40, struct.pack("<I", 15_999)), "truncated", "end inside of one"),
    "WAV, compressed": (
        "wav", lambda data: changed(data, 20, b"\x11"), "unreadable", r"samples that are compressed \(of kind 17\)"),
    "FLAC, more samples than there are": (
        "flac", lambda data: changed(data, 22, struct.pack(">I", 9_999)), "truncated", "a piece is missing"),
    "FLAC, fewer samples than there are": (
        "flac", lambda data: changed(data, 22, struct.pack(">I", 7_000)), "unreadable", "differ from the hash"),
    "FLAC, other samples": (
        "flac", lambda data: changed(data, 26, b"\0\1\2\3"), "unreadable", "differ from the hash"),
    "FLAC, of another rate": (
        "flac", lambda data: changed(data, 18, b"\1"), "unreadable", "Hz in the header and 16,000 Hz in the first frame"),
    "Ogg, without its last page": (
        "ogg vorbis", lambda data: data[: data.rindex(b"OggS")], "truncated", "the last page is missing"),
    "Ogg, without a page of samples": (
        "ogg vorbis", lambda data: data[: page(data, 1)] + data[page(data, 2) :], "truncated", "page 2 stands where page 1"),
    "Ogg, with a changed byte": (
        "ogg opus", lambda data: changed(data, 3_000, bytes([data[3_000] ^ 1])), "unreadable", "with a wrong checksum"),
    "Ogg, two sounds one behind the other": (
        "ogg vorbis", lambda data: data + KINDS["ogg opus"](), "unreadable", "several streams"),
    "Ogg, a film": (
        "ogg vorbis", lambda data: film(data), "unreadable", "a video, or a sound that is neither"),
    "MP3, fewer frames than counted": (
        "mp3", lambda data: counted(data, +3), "truncated", "the first frame counts 24 others, the file has 21"),
    "MP3, more frames than counted": (
        "mp3", lambda data: counted(data, -3), "unreadable", "the first frame counts 18 others, the file has 21"),
    "MP3, with a hole": (
        "mp3", lambda data: data[:3_000] + data[3_100:], "unreadable", "no frame at byte"),
    "MP3, another sound behind it": (
        "mp3", lambda data: data + KINDS["mp3 of 16 kHz"](), "unreadable", "no frame at byte"),
}  # fmt: skip
"""What a header says that is not so: the file, the change, the kind of the error, and what is found."""


def counted(data: bytes, more: int) -> bytes:
    at = max(data.find(b"Info"), data.find(b"Xing")) + 8
    return changed(data, at, struct.pack(">I", struct.unpack_from(">I", data, at)[0] + more))


def film(data: bytes) -> bytes:
    """The first page says that it is of a Theora film, and its checksum is right."""
    from omni.audio.formats import _ogg_checksum

    end = page(data, 1)
    first = changed(data[:end], 28, b"\x80theora")
    return changed(first, 22, _ogg_checksum(first)) + data[end:]


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(lie: str) -> None:
    kind, change, expected, message = LIES[lie]
    with pytest.raises(SoundError, match=message) as error:
        read_sound(change(KINDS[kind]()))
    assert error.value.kind == expected
    sentence(error)


@pytest.mark.parametrize("kind", KINDS)
def test_mutants(kind: str) -> None:
    """300 changed files: refused in a sentence, or read; where the format has checksums, to the same samples."""
    data = KINDS[kind]()
    whole, read, refused = read_sound(data), 0, 0
    for seed in range(300):
        try:
            found = read_sound(mutant(data, random.Random(seed)))
        except SoundError as error:
            refused += str(error).endswith(".") and "\n" not in str(error)
            continue
        read += 1
        assert np.isfinite(found.samples).all()
        assert found.rate == whole.rate, seed
        if kind.startswith(("flac", "ogg")):
            np.testing.assert_array_equal(found.samples, whole.samples, err_msg=str(seed))
        elif kind.startswith("wav"):
            assert len(found.samples) == len(whole.samples), seed
    assert read + refused == 300
    assert refused > 150


def mutant(data: bytes, draw: random.Random) -> bytes:
    """Cut, changed in a bit, a byte, a word or a stretch, made shorter or longer."""
    at, size = draw.randrange(len(data) - 8), draw.randrange(1, 200)
    changes: list[Callable[[], bytes]] = [
        lambda: data[:at],
        lambda: changed(data, at, bytes([data[at] ^ 1 << draw.randrange(8)])),
        lambda: changed(data, at % 100, draw.randbytes(1)),
        lambda: changed(data, at, draw.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])),
        lambda: changed(data, at, bytes(min(size, len(data) - at))),
        lambda: data[:at] + data[at + size :],
        lambda: data[:at] + draw.randbytes(size) + data[at:],
        lambda: data + draw.randbytes(size),
    ]
    return draw.choice(changes)()


def test_what_may_stand_around_a_sound() -> None:
    """Tags before and behind, chunks of notes, padding: none of it is sound."""
    tag = b"ID3\4\0\0\0\0\1\0" + bytes(128)
    for kind in ("wav", "flac", "mp3"):
        data = KINDS[kind]()
        whole = read_sound(data).samples
        np.testing.assert_array_equal(read_sound(tag + data).samples, whole)
        behind = {"wav": b"note\5\0\0\0hello\0", "mp3": b"TAG" + bytes(125), "flac": b"TAG" + bytes(125)}[kind]
        np.testing.assert_array_equal(read_sound(data + behind).samples, whole)
    np.testing.assert_array_equal(read_sound(KINDS["wav"]() + bytes(1_000)).samples, read_sound(KINDS["wav"]()).samples)


def test_invalid_samples_are_refused() -> None:
    with pytest.raises(SoundError, match="has no samples, expected at least one"):
        read_sound(file_of(np.zeros(0)))
    for value in (np.nan, np.inf, -np.inf):
        samples = chirp()
        samples[99] = value
        with pytest.raises(SoundError, match="infinite or not a number"):
            read_sound(file_of(np.stack([samples, chirp()], 1), subtype="FLOAT"))
    with pytest.raises(SoundError, match="reaches 20,000 times full scale.* divide them .* such as 32,768"):
        as_sound(np.full(9, 20_000.0), 16_000)


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = KINDS["flac"]()
    path = tmp_path / "a.flac"
    path.write_bytes(data)
    monkeypatch.setattr(sounds, "MAX_BYTES", len(data) - 1)
    for source in (data, path):
        with pytest.raises(LargeSoundError, match=f"expected at most {len(data) - 1:,} bytes, found {len(data):,}"):
            read_sound(source)
    monkeypatch.undo()
    monkeypatch.setattr("omni.audio.sound.MAX_SAMPLES", 7_999)
    for kind in ("wav", "flac", "ogg vorbis", "mp3 of 16 kHz"):
        with pytest.raises(LargeSoundError, match="expected at most 7,999 samples") as error:
            read_sound(KINDS[kind]())
        assert error.value.kind == "too large"
    with pytest.raises(LargeSoundError, match="The sound of 1 s at 16,000 Hz is too large"):
        Sound(np.ones(1_000, np.float32), 1_000).resampled(16_000)


@pytest.mark.parametrize("rate", [0, -16_000, 999, 768_001, 16_000.0])
def test_rates_that_no_sound_has(rate: Any) -> None:
    with pytest.raises(SoundError, match="samples per second, expected 1,000 to 768,000"):
        Sound(np.ones(9, np.float32), rate)


@pytest.mark.parametrize("samples", [[0.1], np.ones(9), np.ones((2, 9), np.float32)], ids=["list", "float64", "two"])
def test_a_sound_has_samples_of_one_kind(samples: Any) -> None:
    with pytest.raises(SoundError, match=r"float32\[S\] of NumPy, found .*; make them with `as_sound`"):
        Sound(samples, 16_000)


def test_without_the_libraries_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = KINDS["wav"]()
    for name in ("soundfile", "soxr"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(SoundError, match=rf"need the package {name}: pip install 'omni-thinker\[audio\]'"):
            read_sound(data).resampled(8_000)
        monkeypatch.undo()


# --- Arrays -----------------------------------------------------------------------------------------------------------

SAMPLES = chirp(0.01)
FORMS: dict[str, Any] = {
    "Sound": Sound(SAMPLES, 16_000),
    "array": SAMPLES,
    "float64": SAMPLES.astype(np.float64),
    "tensor": torch.from_numpy(SAMPLES).requires_grad_(),
    "list": SAMPLES.tolist(),
    "tuple of numbers": tuple(SAMPLES.tolist()),
    "pair": (SAMPLES, 16_000),
    "pair of a list": (SAMPLES.tolist(), np.int64(16_000)),
    "mapping": {"array": SAMPLES, "sampling_rate": 16_000, "path": None},
    "file": file_of(SAMPLES, subtype="FLOAT"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_sound(form: str) -> None:
    given = FORMS[form]
    assert is_sound(given)
    sound = as_sound(given, 16_000)
    assert (type(sound), type(sound.rate), sound.rate) == (Sound, int, 16_000)
    np.testing.assert_array_equal(sound.samples, SAMPLES)


@pytest.mark.parametrize(
    "several",
    [
        [],
        [SAMPLES],
        [SAMPLES, SAMPLES],
        [(SAMPLES, 8_000)],
        [SAMPLES.tolist()],
        np.ones((2, 9)),
        ["a.wav"],
        (SAMPLES, SAMPLES),
    ],
    ids=lambda value: type(value).__name__,
)
def test_several_sounds_are_not_one(several: Any) -> None:
    assert not is_sound(several)


def test_integers_are_scaled_by_their_range() -> None:
    for bits, dtype in ((16, np.int16), (32, np.int32), (8, np.int8)):
        values = np.array([-(2 ** (bits - 1)), 0, 2 ** (bits - 2)], dtype)
        np.testing.assert_array_equal(as_sound(values, 16_000).samples, [-1, 0, 0.5])


@pytest.mark.parametrize(
    ("given", "rate", "message"),
    [
        (SAMPLES, None, "come without their rate; pass it as `sampling_rate`"),
        (np.ones((2, 99)), 16_000, r"mono, float\[S\], found an array of shape \(2, 99\); average its channels first"),
        (np.float32(1), 16_000, r"of shape \(\)"),
        ([1, 2, 3], 16_000, "integers of 8 to 32 bits, found int64"),
        (np.ones(9, bool), 16_000, "found bool"),
        (["a", "b"], 16_000, "found <U1"),
        (np.ones(9, complex), 16_000, "found complex128"),
        ({"values": SAMPLES}, 16_000, r"'array' and 'sampling_rate', found \['values'\]"),
        ((SAMPLES, 16_000.5), None, "whole number of samples per second, found 16000.5"),
        (np.zeros(0), 16_000, "has no samples"),
    ],
    ids=str,
)
def test_what_is_no_sound(given: Any, rate: Any, message: str) -> None:
    with pytest.raises(SoundError, match=message) as error:
        as_sound(given, rate)
    sentence(error)


def test_half_precision_tensors() -> None:
    half = torch.from_numpy(SAMPLES).bfloat16()
    np.testing.assert_array_equal(as_sound(half, 16_000).samples, half.float().numpy())


def test_reading_is_cheap_to_import() -> None:
    code = "import omni.audio.sounds, omni.audio.drawing, sys; "
    code += "print(*{'torch', 'transformers', 'soundfile'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
