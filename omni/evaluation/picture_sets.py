"""Sets of labelled pictures for an encoder. A world returns its pictures in this form; the scanned digits are made here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .settings import EncoderSettings

DIGIT = "digit"
SEED = 0


@dataclass(frozen=True)
class PictureSet:
    """A set of labelled pictures, each drawn when it is needed. Some are for fitting, the others are asked about.

    Attributes:
        name: name of the set, for messages.
        draw: draws the picture at a place.
        labels: for each task, the label of every picture.
        fit: places of the pictures to fit on.
        ask: places of the pictures to ask about.
        pixels: float[N, P], the original pixels, where the pictures come from an array.
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
    """Pairs of pictures that show the same objects, drawn differently.

    Attributes:
        shows: what each pair shows. No two pairs show the same.
        sources: where each pair comes from, for messages.
        draw: draws the first picture of the pair at a place.
        draw_again: draws the second one.
    """

    shows: Sequence[str]
    sources: Sequence[str]
    draw: Callable[[int], Image.Image]
    draw_again: Callable[[int], Image.Image]


def wanted(settings: EncoderSettings, kind: str) -> bool:
    """Whether the settings ask for this kind of question."""
    return settings.kinds is None or kind in settings.kinds


def digit_pictures(side: int) -> PictureSet:
    """The 1,797 scanned digits of scikit-learn, enlarged. A stratified fifth of them is asked about."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    scans = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), 17 shades of grey
    labels = [str(label) for label in digits.target]
    fit, ask = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=SEED)

    def draw(place: int) -> Image.Image:
        return Image.fromarray(scans[place]).resize((side, side), Image.Resampling.BICUBIC).convert("RGB")

    pixels = digits.images.reshape(len(scans), -1)
    return PictureSet(DIGIT, draw, {DIGIT: labels}, sorted(fit.tolist()), sorted(ask.tolist()), pixels)
