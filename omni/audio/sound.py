"""One sound: mono samples with their rate, checked when it is made."""

import math
from importlib import import_module
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from omni.modality import ItemError

MAX_SAMPLES = 50_000_000
"""Largest number of samples per channel: 52 minutes at 16 kHz, 200 MB. A file of a few kilobytes can claim far more."""

RATES = range(1_000, 768_001)
"""Sampling rates that are accepted, in samples per second."""

LOUDEST = 16.0
"""The largest sample; 1 is full scale. Programs write a little more than 1; far larger samples are unscaled integers."""

_STEP = 2.0**-15
"""The smallest step of 16 bits."""


class SoundError(ItemError):
    """A sound cannot be read. The message is one sentence: which one, what was expected and found, what to do."""


class MissingSoundError(SoundError):
    """The file does not exist."""

    kind = "missing"


class TruncatedSoundError(SoundError):
    """The data end too early."""

    kind = "truncated"


class LargeSoundError(SoundError):
    """The sound has more than `MAX_SAMPLES` samples, or its file more than `MAX_BYTES`."""

    kind = "too large"


class Sound:
    """One sound. It is no dataclass, because chats in transformers 5.24 turn dataclasses into mappings.

    Attributes:
        samples: float32[S], mono and finite, with S at least 1; 1 is full scale.
        rate: samples per second.
        notes: harmless oddities, such as "silent", "clipped" or "the mean of 2 channels".

    Raises:
        SoundError: the samples or the rate are not as above.
    """

    __slots__ = ("notes", "rate", "samples")
    samples: NDArray[np.float32]
    rate: int
    notes: tuple[str, ...]

    def __init__(self, samples: NDArray[np.float32], rate: int, notes: tuple[str, ...] = ()) -> None:
        if not isinstance(samples, np.ndarray) or samples.dtype != np.float32 or samples.ndim != 1:
            found = (
                f"{samples.dtype}{list(samples.shape)}" if isinstance(samples, np.ndarray) else type(samples).__name__
            )
            raise SoundError(
                f"The samples of a sound are float32[S] of NumPy, found {found}; make them with `as_sound`."
            )
        _check(samples, rate, "The sound")
        for name, value in (("samples", samples), ("rate", rate), ("notes", notes)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"A sound stays as it is, found another {name}; make a new one.")

    def __reduce__(self) -> tuple[Any, ...]:
        return Sound, (self.samples, self.rate, self.notes)

    @property
    def seconds(self) -> float:
        """The length in seconds."""
        return len(self.samples) / self.rate

    def resampled(self, rate: int) -> "Sound":
        """The sound at another rate, float32[ceil(S * rate / self.rate)], resampled by soxr at high quality.

        Raises:
            SoundError: the rate is outside of `RATES`, or the result would have more than `MAX_SAMPLES`.
        """
        if rate == self.rate:
            return self
        _check_rate(rate, "The sound")
        length = math.ceil(len(self.samples) * rate / self.rate)
        check_length(length, f"The sound of {self.seconds:,.0f} s at {rate:,} Hz")
        resample = library("soxr").resample
        samples = np.asarray(resample(self.samples, self.rate, rate, quality="HQ"), np.float32)
        samples = np.pad(samples, (0, max(0, length - len(samples))))[:length]
        return Sound(samples, rate, self.notes)

    def __repr__(self) -> str:
        notes = "".join(f"; {note}" for note in self.notes)
        return f"Sound({self.seconds:.2f} s at {self.rate:,} Hz{notes})"


def library(name: str) -> Any:
    """Import soundfile or soxr, which the extra [audio] installs."""
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # soundfile raises OSError if libsndfile is missing
        raise SoundError(f"Sounds need the package {name}: pip install 'omni-thinker[audio]'.") from error


def _loudest(samples: NDArray[np.float32]) -> float:
    return max(float(samples.max()), -float(samples.min()))


def _check(samples: NDArray[np.float32], rate: int, name: str) -> float:
    """The loudest sample of those that a sound may have."""
    _check_rate(rate, name)
    if not len(samples):
        raise SoundError(f"{name} has no samples, expected at least one; check the program that made it.")
    check_length(len(samples), name)
    loudest = _loudest(samples)
    if not math.isfinite(loudest):
        raise SoundError(
            f"{name} holds samples that are infinite or not a number, expected -1 to 1; check the program that made it."
        )
    if loudest > LOUDEST:
        raise SoundError(
            f"{name} reaches {loudest:,.0f} times full scale, expected samples from -1 to 1; divide them by the largest "
            "value of the integers that they were, such as 32,768."
        )
    return loudest


def _check_rate(rate: int, name: str) -> None:
    """Raise SoundError if the rate is outside of `RATES`."""
    if not isinstance(rate, int) or rate not in RATES:
        raise SoundError(f"{name} has {rate!r} samples per second, expected {RATES[0]:,} to {RATES[-1]:,}.")


def check_length(samples: int, name: str) -> None:
    """Raise SoundError if there are more than `MAX_SAMPLES`."""
    if samples > MAX_SAMPLES:
        raise too_large(name, f"{MAX_SAMPLES:,} samples", f"{samples:,}")


def too_large(name: str, most: str, found: str) -> SoundError:
    """The error about a sound that is too large."""
    return LargeSoundError(f"{name} is too large, expected at most {most}, found {found}; cut it into pieces first.")


def checked_sound(samples: NDArray[np.float32], rate: int, name: str, notes: tuple[str, ...] = ()) -> Sound:
    """Check samples, and make a `Sound` of them with notes about anything odd. Messages say where they come from."""
    loudest = _check(samples, rate, name)
    if loudest < _STEP:
        notes += ("silent",)
    elif loudest >= 1 - _STEP:
        top = np.abs(samples) >= 1 - _STEP
        if (top[2:] & top[1:-1] & top[:-2]).any():  # a single sample may just reach the top
            notes += ("clipped",)
    return Sound(samples, rate, notes)
