"""The picture of a sound shows when it is loud and where its tones are."""

import numpy as np
import pytest

from omni.audio.drawing import BANDS, WAVE, WIDTH, draw
from omni.audio.sound import Sound


def bright(sound: Sound) -> np.ndarray:
    """float[BANDS, WIDTH], the spectrogram with low frequencies first."""
    return np.asarray(draw(sound), dtype=float)[WAVE:].sum(-1)[::-1]


@pytest.mark.parametrize("frequency", [500, 2_000, 7_000])
def test_a_tone_is_a_line_at_its_height(frequency: int) -> None:
    tone = 0.5 * np.sin(2 * np.pi * frequency * np.arange(16_000) / 16_000)
    rows = bright(Sound(tone.astype(np.float32), 16_000)).mean(1)
    assert rows.argmax() == pytest.approx(frequency / 8_000 * BANDS, abs=1)


def test_the_waveform_shows_how_loud_it_is() -> None:
    samples = np.concatenate([np.zeros(8_000), 0.5 * np.sin(np.arange(8_000))]).astype(np.float32)
    picture = np.asarray(draw(Sound(samples, 16_000)))[:WAVE]
    inked = (picture != picture[0, 0]).any(-1).sum(0)
    assert set(inked[: WIDTH // 2 - 1]) <= {1, 2}
    assert inked[WIDTH // 2 + 1 :].min() == pytest.approx(WAVE / 2, abs=3)


@pytest.mark.parametrize("length", [1, 2, 100, 319, 321, 1_000_000])
def test_any_length_has_the_same_size(length: int) -> None:
    for value in (0.0, 0.9):
        picture = draw(Sound(np.full(length, value, np.float32), 16_000))
        assert (picture.mode, picture.size) == ("RGB", (WIDTH, WAVE + BANDS))
