"""Labelled pictures that an encoder is asked about: what a world draws comes in the same form as the scanned digits here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .result import EncoderSettings

DIGIT = "digit"
SEED = 0


@dataclass(frozen=True)
class PictureSet:
    """A set of labelled pictures, drawn when asked for: some to fit on, then those that are asked about.

    Attributes:
        name: of the set, for messages.
        draw: makes the picture at a place.
        labels: for each task, the answer of every picture.
        fit: places to learn from.
        ask: places to ask about.
        pixels: float[N, P], of pictures that came as numbers.
    """

    name: str
    draw: Callable[[int], Image.Image]
    labels: Mapping[str, Sequence[str]]
    fit: Sequence[int]
    ask: Sequence[int]
    pixels: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.fit) + len(self.ask)


@dataclass(frozen=True)
class DrawnTwice:
    """Pictures, and to each another one that shows the same, drawn otherwise.

    Attributes:
        shows: what each shows; no two show the same.
        sources: where each comes from, for messages.
        draw: makes the picture at a place.
        draw_again: makes the other one.
    """

    shows: Sequence[str]
    sources: Sequence[str]
    draw: Callable[[int], Image.Image]
    draw_again: Callable[[int], Image.Image]


def wanted(settings: EncoderSettings, kind: str) -> bool:
    """Whether this kind of question is to be asked."""
    return settings.kinds is None or kind in settings.kinds


def digit_pictures(side: int) -> PictureSet:
    """The 1,797 scanned digits of scikit-learn, enlarged; a stratified fifth of them is asked about."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    scans = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), of 17 greys
    labels = [str(label) for label in digits.target]
    fit, ask = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=SEED)

    def draw(place: int) -> Image.Image:
        return Image.fromarray(scans[place]).resize((side, side), Image.Resampling.BICUBIC).convert("RGB")

    pixels = digits.images.reshape(len(scans), -1)
    return PictureSet(DIGIT, draw, {DIGIT: labels}, sorted(fit.tolist()), sorted(ask.tolist()), pixels)
