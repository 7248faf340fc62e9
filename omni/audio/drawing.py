"""A sound as a picture: its waveform above its spectrogram."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from omni.audio.sound import Sound

WIDTH, WAVE, BANDS = 320, 64, 128
"""Pixels: the width of the picture, the height of the waveform, and the height of the spectrogram."""
WINDOW = 4 * BANDS
RANGE = 80.0
"""Decibels from the brightest colour to the darkest."""
_COLOURS = np.array([(12, 7, 40), (85, 20, 110), (190, 55, 85), (250, 145, 40), (252, 250, 190)], np.float64)
_PAPER, _INK = (250, 250, 250), (40, 70, 130)


def draw(sound: Sound) -> Image.Image:
    """An RGB picture of 320 x 192 pixels. Time runs to the right, frequency upwards from 0 to half of the sampling rate."""
    return Image.fromarray(np.concatenate([_waveform(sound.samples), _spectrogram(sound.samples)]))


def _waveform(samples: NDArray[np.float32]) -> NDArray[np.uint8]:
    """uint8[WAVE, WIDTH, 3]: each column spans its lowest to its highest sample; the height is full scale."""
    starts = np.arange(WIDTH) * len(samples) // WIDTH
    low, high = (each.reduceat(samples, starts) for each in (np.minimum, np.maximum))
    top, bottom = (np.clip(np.rint((1 - value) / 2 * (WAVE - 1)), 0, WAVE - 1) for value in (high, low))
    row = np.arange(WAVE)[:, None]
    inked = (row >= top) & (row <= bottom)
    return np.where(inked[..., None], _INK, _PAPER).astype(np.uint8)


def _spectrogram(samples: NDArray[np.float32]) -> NDArray[np.uint8]:
    """uint8[BANDS, WIDTH, 3]: power in decibels relative to the loudest."""
    samples = np.pad(samples, (WINDOW // 2, WINDOW // 2))
    starts = np.linspace(0, len(samples) - WINDOW, WIDTH).astype(int)
    frames = samples[starts[:, None] + np.arange(WINDOW)] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames)[:, 1:]) ** 2
    power = power.reshape(WIDTH, BANDS, -1).mean(-1).T[::-1]
    loudest = max(float(power.max()), 1e-10)
    level = 1 + 10 * np.log10(np.maximum(power / loudest, 1e-30)) / RANGE
    place = np.clip(level, 0, 1) * (len(_COLOURS) - 1)
    steps = np.arange(len(_COLOURS))
    return np.stack([np.interp(place, steps, _COLOURS[:, c]) for c in range(3)], axis=-1).astype(np.uint8)
