"""Damaged sounds: each is read whole, or refused in a sentence; see `damage`.

Two more failures: a sample is not finite or out of bounds, or a sound has more samples than a server counts. The samples of
WAV and MP3 have no checksum, so a changed byte may give another sound.
"""

import struct
from io import BytesIO
from typing import Any

import numpy as np

from campaigns.damage import Look, read_damaged
from campaigns.tally import Tally


def recordings() -> dict[str, bytes]:
    """A file of each kind."""
    import soundfile

    rng = np.random.default_rng(0)
    time = np.arange(4000) / 16_000
    mono = 0.4 * np.sin(2 * np.pi * (300 + 900 * time) * time) + rng.normal(0, 0.02, time.shape)
    both = np.stack([mono, mono[::-1]], axis=-1)

    def file(samples: Any, kind: str, subtype: str, rate: int = 16_000) -> bytes:
        stream = BytesIO()
        soundfile.write(stream, samples, rate, format=kind, subtype=subtype)
        return stream.getvalue()

    wav = file(mono, "WAV", "PCM_16")
    mp3 = file(mono, "MP3", "MPEG_LAYER_III")
    tag = b"ID3\4\0\0\0\0\0\x2a" + b"TIT2\0\0\0\x20\0\0" + b"x" * 32
    return {
        "wav": wav,
        "wav of 8 bits": file(mono, "WAV", "PCM_U8", 8_000),
        "wav of 24 bits": file(both, "WAV", "PCM_24", 48_000),
        "wav of 32 bits": file(mono, "WAV", "PCM_32"),
        "wav of floats": file(both, "WAV", "FLOAT", 44_100),
        "wav of doubles": file(mono, "WAV", "DOUBLE"),
        "wav of a telephone": file(mono, "WAV", "ULAW", 8_000),
        "wav of the other telephone": file(mono, "WAV", "ALAW", 8_000),
        "wav with a longer header": file(both, "WAVEX", "PCM_16"),
        "wav with a comment": _with_chunks(wav),
        "wav padded": wav + bytes(300),
        "flac": file(mono, "FLAC", "PCM_16"),
        "flac stereo": file(both, "FLAC", "PCM_24", 44_100),
        "flac of 8 bits": file(mono, "FLAC", "PCM_S8"),
        "flac tagged": tag + file(mono, "FLAC", "PCM_16"),
        "ogg vorbis": file(mono, "OGG", "VORBIS"),
        "ogg vorbis stereo": file(both, "OGG", "VORBIS", 44_100),
        "ogg opus": file(mono, "OGG", "OPUS"),
        "ogg opus stereo": file(both, "OGG", "OPUS", 48_000),
        "mp3": mp3,
        "mp3 stereo": file(both, "MP3", "MPEG_LAYER_III", 44_100),
        "mp3 tagged": tag + mp3,
        "mp3 with a tag behind": mp3 + b"TAG" + bytes(125),
    }


def _with_chunks(wav: bytes) -> bytes:
    """A WAV file with chunks before and behind its samples; one has an odd length."""
    head, rest = wav[12:36], wav[36:]
    chunks = head + b"LIST" + struct.pack("<I", 7) + b"INFOabc\0" + rest + b"id3 " + struct.pack("<I", 4) + b"text"
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def look() -> Look:
    """How a process reads the bytes of a sound."""
    from omni.audio.sound import LOUDEST, SoundError
    from omni.audio.sounds import count_samples, read_sound

    def read(data: bytes) -> tuple[str, bytes]:
        sound = read_sound(data)
        if not (np.abs(sound.samples) <= LOUDEST).all():
            raise RuntimeError("samples that are not finite, or far too loud")
        if (measured := count_samples(data)) < len(sound.samples):
            raise RuntimeError(f"{len(sound.samples)} samples are counted as {measured}")
        return repr(sound), sound.samples.tobytes()

    return Look(read, SoundError)


def run(seed: int, count: int, seconds: float) -> Tally:
    """Read `count` damaged sounds, or as many as fit into the time."""
    return read_damaged("campaigns.sounds", recordings(), {}, seed, count, seconds)
