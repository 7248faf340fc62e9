"""Beeps: always the same, and what is answered about them is what a measurement finds in the samples."""

import numpy as np
import pytest

from omni.scenes.sounds import RATE, SOUND_WORDINGS, Beeps, beep_questions, sample_beeps
from omni.scenes.vocabulary import NUMBERS

SOME = [sample_beeps(number, "test") for number in range(60)]


def loud(beeps: Beeps) -> list[np.ndarray]:
    """The pieces of a sound between its silences."""
    samples = beeps.play()
    level = np.abs(samples) > 1e-4
    heard = np.convolve(level, np.ones(round(0.03 * RATE)), "same") > 0  # a wave crosses zero, a pause lasts longer
    edges = np.flatnonzero(np.diff(np.pad(heard.astype(int), 1)))
    return [samples[start:stop] for start, stop in edges.reshape(-1, 2)]


def hertz(samples: np.ndarray) -> float:
    """Where the strongest wave of some samples is."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 1 << 15))
    return float(spectrum.argmax() * RATE / (1 << 15))


def test_the_same_number_is_the_same_sound_in_every_process() -> None:
    again = sample_beeps(11)
    assert again == sample_beeps(11)
    assert again.play().tobytes() == sample_beeps(11).play().tobytes()
    assert again != sample_beeps(11, "test")


@pytest.mark.parametrize("beeps", SOME[:30], ids=lambda beeps: f"{beeps.count} {beeps.timbre}")
def test_as_many_beeps_are_heard_as_are_answered(beeps: Beeps) -> None:
    answers = {question.kind: question.answer for question in beep_questions(beeps)}
    assert len(loud(beeps)) == NUMBERS.index(answers["beeps"])


def test_pure_tones_are_as_high_and_slope_as_is_answered() -> None:
    for beeps in (each for each in SOME if each.timbre == "pure"):
        answers = {question.kind: question.answer for question in beep_questions(beeps)}
        beep = loud(beeps)[0]
        third = len(beep) // 3
        first, last = hertz(beep[:third]), hertz(beep[-third:])
        found = "rising" if last > 1.15 * first else "falling" if first > 1.15 * last else "steady"
        assert (found, "high" if (first + last) / 2 > 550 else "low") == (answers["slope"], answers["pitch"])


def test_every_answer_is_about_as_frequent_as_any_other() -> None:
    many = [sample_beeps(number) for number in range(2000)]
    for name, answers in (("timbre", 5), ("slope", 3), ("pitch", 2), ("count", 5)):
        shares = np.unique([str(getattr(each, name)) for each in many], return_counts=True)[1] / len(many)
        assert len(shares) == answers
        assert shares.max() < 1.2 / answers


def test_held_out_wordings_are_new_sentences_of_the_words_of_training() -> None:
    for wordings in SOUND_WORDINGS.values():
        assert not set(wordings.seen) & set(wordings.held_out)
    known = {word for each in SOUND_WORDINGS.values() for text in each.seen for word in text.replace(",", "").split()}
    for wordings in SOUND_WORDINGS.values():
        assert {word for text in wordings.held_out for word in text.replace(",", "").split()} <= known | {"can"}
