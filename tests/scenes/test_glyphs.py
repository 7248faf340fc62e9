"""Made-up characters: the same in every process, readable, and the same character in every hand."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from omni.scenes.glyphs import CHARACTERS, strokes, write


def ink(picture: Image.Image) -> np.ndarray:
    """float[24, 24]: how far each place of the character's own box is from the paper."""
    pixels = np.asarray(picture).astype(float)
    paper = np.median(pixels.reshape(-1, 3), axis=0)
    distance = np.linalg.norm(pixels - paper, axis=-1)
    strong = distance > distance.max() / 2
    rows, columns = np.flatnonzero(strong.any(1)), np.flatnonzero(strong.any(0))
    box = Image.fromarray(distance / distance.max()).crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return np.asarray(box.resize((24, 24), Image.Resampling.BOX))


def test_a_picture_is_the_same_in_every_process_and_another_in_every_hand() -> None:
    code = (
        "import hashlib; from omni.scenes.glyphs import write; "
        "pictures = [write(c, 5, s).tobytes() for c in (0, 7, 199) for s in ('train', 'test')]; "
        "print(hashlib.sha256(b''.join(pictures)).hexdigest())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    pictures = [write(c, 5, s).tobytes() for c in (0, 7, 199) for s in ("train", "test")]
    assert hashlib.sha256(b"".join(pictures)).hexdigest() == found
    assert len({*pictures, write(0, 6).tobytes()}) == 7


def test_pictures_are_rgb_and_show_something() -> None:
    for seed in range(60):
        picture = write(seed * 3 % CHARACTERS, seed)
        assert picture.mode == "RGB"
        assert picture.size == (224, 224)
        pixels = np.asarray(picture).astype(float).reshape(-1, 3)
        distance = np.linalg.norm(pixels - np.median(pixels, axis=0), axis=-1)
        assert distance.max() > 100
        assert 0.001 < (distance > distance.max() / 2).mean() < 0.5


def test_hands_agree_on_a_character() -> None:
    """The nearest of thirty characters, each known by the mean of ten hands, is mostly the right one."""
    chosen = range(0, CHARACTERS, CHARACTERS // 30)[:30]
    means = np.stack([np.mean([ink(write(c, seed)) for seed in range(10)], axis=0) for c in chosen])
    right = sum(
        int(np.argmin(((means - ink(write(c, seed, "test"))) ** 2).sum((1, 2))) == i)
        for i, c in enumerate(chosen)
        for seed in range(4)
    )
    assert right > 0.6 * 4 * 30  # by chance 4


def test_characters_differ_and_have_few_strokes_within_their_box() -> None:
    drawn = {tuple(np.concatenate(strokes(c)).round(6).ravel()) for c in range(CHARACTERS)}
    assert len(drawn) == CHARACTERS
    for c in range(0, CHARACTERS, 10):
        assert 1 <= len(strokes(c)) <= 3
        assert all(np.abs(points).max() <= 1 and len(points) >= 2 for points in strokes(c))


@pytest.mark.parametrize("number", [-1, CHARACTERS])
def test_other_numbers_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"from 0 to 199, found {number}"):
        write(number, 0)
