"""What happens to a sound on its way to a microphone: another tempo and pitch, a room, noise, a telephone, silence around.

    heard = rough(samples, np.random.default_rng(0))

All of it is made up from random numbers; there are no recordings of rooms or noises.
"""

from functools import cache
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from .sounds import RATE

Samples = NDArray[np.float32]

NOISE_SECONDS = 60
BLOCK = 4096
"""A Fourier transform takes a multiple of this many samples, which is fast."""
TILTS = (0.0, 0.5, 1.0)
"""Exponents of the frequency by which the amplitude of noise falls: white, pink, brown."""


def rough(samples: Samples, rng: np.random.Generator, others: Samples | None = None, pace: float = 0.16) -> Samples:
    """float32[S] at `RATE` -> float32[S'], as it might arrive.

    Args:
        samples: a sound without silence around it.
        rng: decides what happens to it.
        others: another speaker, far away, at the same time; by default none.
        pace: how much faster and higher it may become, or slower and lower: the logarithm of the factor.
    """
    if pace and rng.random() < 0.8:
        samples = faster(samples, float(np.exp(rng.uniform(-pace, pace))))
    before, after = (rng.exponential((0.1, 0.15)).clip(0.02, 0.6) * RATE).astype(int)
    samples = np.pad(samples, (before, after))
    samples = _through(samples, rng)
    loudness = float(np.sqrt(np.mean(samples**2))) + 1e-6
    if rng.random() < 0.75:
        decibels = rng.uniform(6, 40)
        samples = samples + noise(len(samples), rng) * np.float32(loudness * 10 ** (-decibels / 20))
    if others is not None:
        samples = samples + _looped(others, len(samples), rng, loudness * 10 ** (-rng.uniform(10, 30) / 20))
    samples = samples * np.float32(10 ** (rng.uniform(-30, 0) / 20) / (np.abs(samples).max() + 1e-6))
    if rng.random() < 0.05:
        samples = np.clip(samples, -1, 1) if rng.random() < 0.5 else (3 * samples).clip(-1, 1)
    if rng.random() < 0.08:
        samples = _companded(samples)
    return samples.astype(np.float32)


def faster(samples: Samples, factor: float) -> Samples:
    """Faster by this factor, and as much higher."""
    made: Samples = import_module("soxr").resample(samples, RATE * factor, RATE, quality="LQ")
    return made


def _through(samples: Samples, rng: np.random.Generator) -> Samples:
    """Through a room, a microphone that colours, and at times a telephone or a coarse recording: all in one filter."""
    echo = rng.uniform(0.08, 0.6) if rng.random() < 0.5 else 0.0
    size = -(-(len(samples) + round(echo * RATE)) // BLOCK) * BLOCK
    hertz = np.fft.rfftfreq(size, 1 / RATE).astype(np.float32)
    knots = np.log(np.array([50, 150, 400, 1000, 2500, 5000, 8000]))
    decibels = np.interp(np.log(hertz.clip(20)), knots, rng.normal(0, 4, len(knots)))
    low, high = 0.0, RATE / 2.0
    if (line := rng.random()) < 0.15:
        low, high = rng.uniform(200, 400), rng.uniform(3000, 3700)
    elif line < 0.35:
        low, high = rng.uniform(0, 150), rng.uniform(3500, 8000)
    if low:
        decibels -= 30 * np.clip(np.log2(low / hertz.clip(20)), 0, 3)
    decibels -= 60 * np.clip(np.log2(hertz.clip(20) / high), 0, 1)
    spectrum = np.fft.rfft(samples, size) * (10 ** (decibels / 20)).astype(np.float32)
    if echo:
        spectrum *= np.fft.rfft(_room(echo, rng), size)
    made: Samples = np.fft.irfft(spectrum, size)[: len(samples)].astype(np.float32)
    return made


def _room(echo: float, rng: np.random.Generator) -> Samples:
    """The response of a room: the sound itself, and noise that falls by 60 dB in `echo` seconds."""
    t = np.arange(round(echo * RATE), dtype=np.float32) / np.float32(RATE)
    start = int(rng.integers(0, NOISE_SECONDS * RATE - len(t)))
    tail = _noises()[int(rng.random() < 0.5), start : start + len(t)] * np.exp(-6.9 * t / echo)
    tail *= rng.uniform(0.1, 0.9) / (np.sqrt(np.sum(tail**2)) + 1e-6)
    tail[: round(rng.uniform(0.001, 0.01) * RATE)] = 0
    tail[0] = 1
    return np.asarray(tail, np.float32)


@cache
def _noises() -> NDArray[np.float32]:
    """float32[3, S]: noise of each tilt, of loudness 1."""
    white = np.random.default_rng(0).normal(size=NOISE_SECONDS * RATE)
    spectrum, hertz = np.fft.rfft(white), np.fft.rfftfreq(len(white), 1 / RATE).clip(30)
    rows = [np.fft.irfft(spectrum * hertz**-tilt) for tilt in TILTS]
    return np.stack([row / row.std() for row in rows]).astype(np.float32)


def noise(length: int, rng: np.random.Generator) -> Samples:
    """float32[S] of loudness about 1: noise between two of the tilts, at times with a hum, or louder and softer."""
    places = rng.integers(0, NOISE_SECONDS * RATE - length, 2)
    which = rng.integers(0, len(TILTS), 2)
    share = np.float32(rng.random())
    one, other = (_noises()[row, place : place + length] for row, place in zip(which, places, strict=True))
    made = share * one + (1 - share) * other
    t = np.arange(length, dtype=np.float32) / np.float32(RATE)
    if rng.random() < 0.2:
        made = made + np.float32(rng.uniform(0.3, 2)) * np.sin(2 * np.pi * rng.choice((50, 60, 100, 120, 400)) * t)
    if rng.random() < 0.3:
        made = made * (1 + np.sin(2 * np.pi * (rng.uniform(0.3, 6) * t + rng.random())))
    return np.asarray(made, np.float32)


def _looped(samples: Samples, length: int, rng: np.random.Generator, loudness: float) -> Samples:
    """The samples, repeated from a random place to this length, at this loudness."""
    turned = np.roll(samples, int(rng.integers(len(samples))))
    looped = np.resize(turned, length)
    return np.asarray(looped * (loudness / (np.sqrt(np.mean(samples**2)) + 1e-6)), np.float32)


def _companded(samples: Samples) -> Samples:
    """The samples in eight bits each, as telephones send them (mu-law)."""
    squeezed = np.sign(samples) * np.log1p(255 * np.abs(samples.clip(-1, 1))) / np.log(256)
    coarse = np.round(squeezed * 127) / 127
    return np.asarray(np.sign(coarse) * (256 ** np.abs(coarse) - 1) / 255, np.float32)
