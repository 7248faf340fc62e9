"""What is said and heard: sayings, rooms, a corpus on disk, and the conversations of a recipe that has voices."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile

from omni.scenes import corpus, voices
from omni.scenes.hearing_sets import write_sets
from omni.scenes.recipe import Scenes
from omni.scenes.rooms import rough
from omni.scenes.sayings import SAYING_WEIGHTS, heard, sample_saying
from omni.scenes.scene import sample_scene
from omni.scenes.sounds import RATE
from omni.scenes.spoken import NOTHING, TURNS, Heard
from omni.scenes.vocabulary import HELD_OUT_PAIRS


def hum(text: str, voice: str, rng: random.Random) -> tuple[np.ndarray, int]:
    """Stands for a synthesizer: a tone for each letter, between silences."""
    t = np.arange(1200) / 24_000
    tones = [np.sin(2 * np.pi * (200 + 40 * (ord(letter) - 96)) * t) for letter in text.lower()]
    silence = np.zeros(3000)
    return np.concatenate([silence, *tones, silence]).astype(np.float32) / 2, 24_000


@pytest.fixture
def hummed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A small corpus of two synthesizers that hum."""
    for name in ("espeak", "flite"):
        monkeypatch.setitem(voices._SPEAK, name, hum)
        corpus.make(tmp_path, name, 60, "train", "seen")
        corpus.make(tmp_path, name, 12, "test", "held_out")
    return tmp_path


# --- What is said ------------------------------------------------------------------------------------------------------


def test_sayings_are_the_same_every_time_and_of_all_kinds() -> None:
    said = [sample_saying(number) for number in range(400)]
    assert said == [sample_saying(number) for number in range(400)]
    assert {saying.kind for saying in said} == set(SAYING_WEIGHTS)
    assert sample_saying(3, "test") != sample_saying(3)


def test_a_transcript_has_small_letters_and_single_spaces() -> None:
    assert heard("What's the COLOUR, please?") == "what's the color please"
    assert all(sample_saying(number).heard.replace(" ", "").replace("'", "").isalpha() for number in range(300))


def test_no_saying_of_training_names_a_held_out_pair() -> None:
    for number in range(6000):
        saying = sample_saying(number)
        words = set(saying.heard.split())
        if saying.kind == "phrase":
            assert not any(words.issuperset(pair) for pair in HELD_OUT_PAIRS)
        if saying.asks:  # about two objects, a shape and a colour may stand in one question
            scene, question = saying.asks
            assert not any(f"{color} {shape}" in saying.heard for shape, color in HELD_OUT_PAIRS)
            assert (question.kind, heard(question.text)) == (question.kind, saying.heard)
            assert sample_scene(scene, "train").seed == scene


def test_no_voice_is_both_in_training_and_in_evaluation() -> None:
    seen, held_out, stranger = (set(map(str, voices.voices(group))) for group in ("seen", "held_out", "stranger"))
    assert not seen & held_out
    assert not {name.split("/")[0] for name in stranger} & {name.split("/")[0] for name in seen | held_out}
    assert {name.split("/")[0] for name in seen} == {name.split("/")[0] for name in held_out}


# --- How it is heard ---------------------------------------------------------------------------------------------------


def test_a_rough_sound_is_the_same_every_time_finite_and_within_full_scale() -> None:
    samples, rate = hum("what is said", "", random.Random(0))
    for seed in range(40):
        found = rough(samples, np.random.default_rng(seed), samples[::-1])
        assert found.tobytes() == rough(samples, np.random.default_rng(seed), samples[::-1]).tobytes()
        assert found.dtype == np.float32
        assert np.isfinite(found).all()
        assert 0.01 < np.abs(found).max() <= 1.0
        assert 0.8 * len(samples) < len(found) < 1.2 * len(samples) + 1.3 * RATE


# --- A corpus ----------------------------------------------------------------------------------------------------------


def test_a_corpus_that_was_interrupted_becomes_the_same_as_in_one_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(voices._SPEAK, "espeak", hum)
    whole = corpus.make(tmp_path / "whole", "espeak", 12, "train", "seen")
    for count in (5, 12):
        pieces = corpus.make(tmp_path / "pieces", "espeak", count, "train", "seen")
    assert pieces.read_bytes() == whole.read_bytes()
    for row in map(json.loads, whole.read_text().splitlines()):
        audio = [(folder / row["audio"]).read_bytes() for folder in (tmp_path / "whole", tmp_path / "pieces")]
        assert audio[0] == audio[1]
        assert soundfile.info(tmp_path / "whole" / row["audio"]).samplerate == RATE


def test_the_silence_around_a_saying_is_cut_off() -> None:
    samples = np.concatenate([np.zeros(9000), np.ones(500), np.zeros(9000)]).astype(np.float32)
    assert len(corpus.trimmed(samples)) <= 500 + 2 * corpus.MARGIN


# --- Conversations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["typed", "spoken", "two", "said", "beeps"])
def test_conversations_of_every_kind_have_an_item_for_each_block_and_an_answer_for_each_question(
    hummed: Path, kind: str
) -> None:
    drawn = Scenes(count=20, first=5, voices=str(hummed), mix={kind: 1.0}).conversations()
    assert isinstance(drawn, Heard)
    sounds = 0
    for number in range(len(drawn)):
        example, again = drawn[number], drawn[number]
        assert example.conversations == again.conversations
        for name, items in example.items.items():
            for chat in example.conversations:
                blocks = [block for message in chat for block in message["content"] if block["type"] == name]
                assert len(blocks) == len(items)
        answers = [each for chat in example.conversations for each in chat if each["role"] == "assistant"]
        assert all(answer["content"][0]["text"] for answer in answers)
        if example.unseen:
            assert len(example.unseen) == len(answers)
        sounds += len(example.items.get("audio", []))
        for samples, rate in example.items.get("audio", []):
            assert samples.dtype == np.float32
            assert rate == RATE
    assert (sounds == 0) == (kind == "typed")


def test_a_spoken_question_is_asked_about_its_own_scene(hummed: Path) -> None:
    drawn = Scenes(count=40, voices=str(hummed), mix={"spoken": 1.0}, rough=0).conversations()
    known = {row["scene"]: row for rows in drawn.sayings.rows.values() for row in rows if row["kind"] == "question"}
    for number in range(40):
        example = drawn[number]
        assert 1 <= len(example.items["audio"]) <= TURNS["spoken"]
        scene = next(seed for seed in known if drawn_picture(seed) == example.items["image"][0].tobytes())
        rows = [row for rows in drawn.sayings.rows.values() for row in rows if row.get("scene") == scene]
        answers = [each["content"][0]["text"] for each in example.conversations[0] if each["role"] == "assistant"]
        assert set(answers) <= {row["answer"] for row in rows}


def drawn_picture(seed: int) -> bytes:
    from omni.scenes.drawing import render

    return render(sample_scene(seed, "train")).tobytes()


def test_where_nobody_speaks_nothing_is_said(hummed: Path) -> None:
    drawn = Scenes(count=200, voices=str(hummed), mix={"said": 1.0}, rough=0).conversations()
    chats = [(example.items["audio"], example.conversations[0]) for example in map(drawn.__getitem__, range(200))]
    said = [
        (sound, message["content"][0]["text"])
        for sounds, chat in chats
        for sound, message in zip(sounds, chat[1::2], strict=True)
    ]
    silent = [sound for sound, text in said if text == NOTHING]
    assert 0.01 < len(silent) / len(said) < 0.09


def test_a_recipe_that_asks_for_a_synthesizer_that_is_not_there_is_refused(hummed: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no sayings of kokoro for 'train-seen'; make them with"):
        Scenes(count=4, voices=str(hummed), synthesizers={"kokoro": 1.0}).sayings()


def test_sounds_ask_where_questions_are_spoken(hummed: Path) -> None:
    assert Scenes(count=8, voices=str(hummed)).asked_by() == ["audio"]
    assert Scenes(count=8, voices=str(hummed), mix={"said": 1.0}).asked_by() == []
    assert Scenes(count=8).asked_by() == []


def test_voices_are_only_for_objectives_that_hear() -> None:
    with pytest.raises(ValueError, match="needs `voices`"):
        Scenes(count=4).check("transcription")
    with pytest.raises(ValueError, match="`voices` are for"):
        Scenes(count=4, voices="voices").check("dense")


def test_the_sets_of_an_evaluation_name_files_that_are_there(hummed: Path) -> None:
    written = write_sets(hummed, beeps=3)
    assert [path.name for path in written] == ["said-held_out.jsonl", "asked-held_out.jsonl", "beeps.jsonl"]
    for path in written:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows
        for row in rows:
            assert row["answer"]
            assert all((hummed / row[name]).is_file() for name in ("audio", "image") if name in row)
            assert (row["question"] == "") == path.name.startswith("asked")
