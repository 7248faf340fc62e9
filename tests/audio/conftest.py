"""Sounds and files of sounds for the tests. They are made here; nothing is fetched."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

soundfile = pytest.importorskip("soundfile")


def chirp(seconds: float = 0.5, rate: int = 16_000, seed: int = 0) -> NDArray[np.float32]:
    """A tone that rises and fades, in a little noise."""
    time = np.arange(round(seconds * rate)) / rate
    tone = 0.4 * np.sin(2 * np.pi * (300 + 200 * seed + 400 * time) * time) * np.exp(-time)
    return (tone + 0.01 * np.random.default_rng(seed).normal(size=len(time))).astype(np.float32)


def file_of(samples: NDArray[Any], rate: int = 16_000, format: str = "WAV", subtype: str | None = None) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


KINDS: dict[str, Callable[[], bytes]] = {
    "wav": lambda: file_of(chirp()),
    "wav of floats": lambda: file_of(np.stack([chirp(), chirp(seed=1)], 1), subtype="FLOAT"),
    "wav of 24 bits": lambda: file_of(chirp(rate=48_000), 48_000, subtype="PCM_24"),
    "flac": lambda: file_of(chirp(), format="FLAC"),
    "flac of 24 bits": lambda: file_of(np.stack([chirp(), chirp(seed=1)], 1), format="FLAC", subtype="PCM_24"),
    "flac of 8 bits": lambda: file_of(chirp(), format="FLAC", subtype="PCM_S8"),
    "ogg vorbis": lambda: file_of(chirp(), format="OGG"),
    "ogg opus": lambda: file_of(chirp(rate=48_000), 48_000, format="OGG", subtype="OPUS"),
    "mp3": lambda: file_of(np.stack([chirp(rate=44_100)] * 2, 1), 44_100, format="MP3"),
    "mp3 of 16 kHz": lambda: file_of(chirp(), format="MP3"),
}
"""Files of every format, by what they are."""
