"""A little world of sounds: one to five beeps, and questions about them with certain answers.

beeps = sample_beeps(7)
sound = beeps.play()                                   # samples float32[S] at RATE
for question in beep_questions(beeps):
    print(question.kind, question.text, question.answer)
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .questions import Question
from .scene import stream
from .vocabulary import NUMBERS
from .wordings import Wordings, WordingSet, vary

Wave = NDArray[np.float64]

RATE = 16_000
MOST_BEEPS = 5
PITCHES = {"low": (140.0, 320.0), "high": (900.0, 1900.0)}
"""The pitch in Hz in the middle of a beep."""
SLOPES = ("rising", "falling", "steady")
TIMBRES = ("pure", "hollow", "buzzing", "hissing", "ringing")

SOUND_WORDINGS: dict[str, Wordings] = {
    "beeps": Wordings(
        (
            "how many beeps are there",
            "how many beeps do you hear",
            "count the beeps",
            "how many tones are there",
            "tell me how many beeps you hear",
            "give the number of beeps",
        ),
        ("what is the number of beeps", "how many beeps can you hear"),
    ),
    "slope": Wordings(
        (
            "is the sound rising, falling or steady",
            "is the tone rising or falling or steady",
            "does the tone rise or fall",
            "say if the sound is rising, falling or steady",
            "is it rising, falling or steady",
            "tell me if the tone is rising, falling or steady",
        ),
        ("is the tone falling, rising or steady", "does the sound rise or fall"),
    ),
    "pitch": Wordings(
        (
            "is the sound high or low",
            "is the tone high or low",
            "is it a high or a low sound",
            "tell me if the tone is high or low",
            "what pitch does the sound have",
        ),
        ("is the tone low or high", "what pitch does the tone have"),
    ),
    "timbre": Wordings(
        (
            "what kind of sound is it",
            "what kind of tone is there",
            "is the sound pure, hollow, buzzing, hissing or ringing",
            "what is the sound like",
            "tell me what kind of sound you hear",
            "describe the sound",
        ),
        ("what kind of sound do you hear", "tell me what the sound is like"),
    ),
}
"""The wordings of each kind of question about beeps."""


@dataclass(frozen=True, slots=True)
class Beeps:
    """Beeps of one kind, one after the other.

    Attributes:
        hertz: the pitch in the middle of a beep.
        octaves: from the beginning of a beep to its end; negative where it falls.
        length, gap: of a beep, and of the silence after it, in seconds.
    """

    seed: int
    split: str
    count: int
    pitch: str
    slope: str
    timbre: str
    hertz: float
    octaves: float
    length: float
    gap: float

    def play(self) -> NDArray[np.float32]:
        """The samples float32[S] at `RATE`, with silence before and after them."""
        rng = np.random.default_rng(abs(self.seed))
        silence = [np.zeros(round(rng.uniform(0.05, 0.3) * RATE)) for _ in range(2)]
        pause = np.zeros(round(self.gap * RATE))
        beep = self._beep(rng)
        pieces = [silence[0], beep, *[piece for _ in range(self.count - 1) for piece in (pause, beep)], silence[1]]
        samples: NDArray[np.float32] = np.concatenate(pieces).astype(np.float32)
        return samples

    def _beep(self, rng: np.random.Generator) -> Wave:
        t = np.arange(round(self.length * RATE)) / RATE
        hertz = self.hertz * 2 ** (self.octaves * (t / self.length - 0.5))
        cycles = np.cumsum(hertz) / RATE
        wave = _wave(self.timbre, cycles, t, hertz, rng)
        fade = np.clip(np.minimum(t, self.length - t) / 0.01, 0, 1)
        return np.asarray(rng.uniform(0.1, 0.6) * wave / np.abs(wave).max() * fade)


def _wave(timbre: str, cycles: Wave, t: Wave, hertz: Wave, rng: np.random.Generator) -> Wave:
    def partials(strengths: dict[float, float]) -> Wave:
        heard = [s * np.sin(2 * np.pi * n * cycles) * (n * hertz < RATE / 2) for n, s in strengths.items()]
        return np.asarray(np.sum(heard, axis=0))

    if timbre == "pure":
        return partials({1: 1.0})
    if timbre == "hollow":
        return partials({n: 1 / n for n in (1, 3, 5, 7, 9)})
    if timbre == "buzzing":
        return partials({n: 1 / math.sqrt(n) for n in range(1, 16)})
    if timbre == "ringing":
        return partials({1: 1.0, 2.76: 0.6, 5.4: 0.35}) * np.exp(-4 * t / t[-1])
    noise = np.repeat(rng.normal(size=len(t) // 40 + 2), 40)[: len(t)]  # moves the carrier, so it is noise around it
    return np.asarray(np.convolve(noise, np.hanning(80), "same") * np.sin(2 * np.pi * cycles + noise))


def sample_beeps(seed: int, split: str = "train") -> Beeps:
    """The beeps of this number. The same seed and split give the same in every process."""
    rng = stream("beeps", split, seed)
    pitch, slope, timbre = rng.choice(list(PITCHES)), rng.choice(SLOPES), rng.choice(TIMBRES)
    low, high = (math.log(hertz) for hertz in PITCHES[pitch])
    return Beeps(
        seed,
        split,
        rng.randint(1, MOST_BEEPS),
        pitch,
        slope,
        timbre,
        math.exp(rng.uniform(low, high)),
        {"rising": 1, "falling": -1, "steady": 0}[slope] * rng.uniform(0.5, 1.1),
        rng.uniform(0.18, 0.4),
        rng.uniform(0.12, 0.35),
    )


def beep_questions(beeps: Beeps, wordings: WordingSet = "seen") -> list[Question]:
    """One question of each kind."""
    rng = stream("questions about beeps", beeps.split, beeps.seed)
    answers = {"beeps": NUMBERS[beeps.count], "slope": beeps.slope, "pitch": beeps.pitch, "timbre": beeps.timbre}
    return [Question(kind, ask_about_sounds(kind, rng, wordings), answer) for kind, answer in answers.items()]


def ask_about_sounds(kind: str, rng: random.Random, wordings: WordingSet = "seen") -> str:
    """A question of this kind, as a person would type it."""
    return vary(rng.choice(getattr(SOUND_WORDINGS[kind], wordings)), rng)
