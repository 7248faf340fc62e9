"""The sheet is one whole HTML file with its pictures in it, and begins with the mistakes."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omni import scenes
from omni.evaluation import Asked, EncoderSettings, Outcome, evaluate, write_answers, write_sheet
from omni.evaluation.scores import score
from omni.scenes.evaluation import SceneSettings

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Checks that every element ends where it should, and gathers pictures and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.pictures: list[Image.Image] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "img":
            kind, data = str(dict(attrs)["src"]).split(",", 1)
            assert kind == "data:image/jpeg;base64"
            assert dict(attrs)["alt"]
            picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            picture.load()
            self.pictures.append(picture)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(data.strip())


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    assert "script" not in reader.tags
    assert all(address.startswith("data:") for address in reader.addresses)
    return reader


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    """The shipped checkpoint on three pictures."""
    return evaluate("checkpoints/omni_tiny", SceneSettings(pictures=3, kinds=("color", "shape", "count")))


def invent(outcome: Outcome, *asked: Asked) -> Outcome:
    """The same with other questions and answers."""
    changed = outcome.result.model_copy(update={"scores": score(asked)})
    return Outcome(changed, asked, outcome.items, outcome.examples)


def test_a_sheet_is_whole_and_holds_its_pictures(outcome: Outcome, tmp_path: Path) -> None:
    write_sheet(tmp_path / "sheet.html", outcome)
    reader = read(tmp_path / "sheet.html")
    assert reader.tags.count("article") == 3
    shown = [np.asarray(picture, dtype=float) for picture in reader.pictures]
    real = [np.asarray(scenes.render(scenes.sample_scene(seed, "test")), dtype=float) for seed in range(3)]
    matches = [min(range(3), key=lambda seed: np.abs(picture - real[seed]).mean()) for picture in shown]
    assert sorted(matches) == [0, 1, 2]
    assert all(np.abs(picture - real[seed]).mean() < 6 for picture, seed in zip(shown, matches, strict=True))
    text = " ".join(reader.texts)
    for asked in outcome.asked:
        assert asked.question in text
        assert (f"✓ right: {asked.answer}" if asked.right else f"expected: {asked.expected}") in text


def test_mistakes_come_first_and_are_marked_in_words(outcome: Outcome, tmp_path: Path) -> None:
    asked = [
        Asked("color", "one", "red", "red", "scene A", 0),
        Asked("color", "two", "red", "red", "scene B", 1),
        Asked("shape", "three", "ring", "moon", "scene B", 1),
        Asked("color", "four", "red", "blue", "scene C", 2, complete=False),
        Asked("shape", "five", "ring", "", "scene C", 2),
    ]
    write_sheet(tmp_path / "sheet.html", invent(outcome, *asked))
    text = " ".join(read(tmp_path / "sheet.html").texts)
    order = ["scene C: 2 of 2 wrong", "four", "five", "scene B: 1 of 2 wrong", "three", "two", "scene A: 0 of 1 wrong"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "✗ wrong: blue (stopped) expected: red" in text
    assert "✗ wrong: nothing expected: ring" in text
    assert "3 of 3 examples are shown, those with the most mistakes first; 2 of all have mistakes" in text


def test_the_number_of_pictures_is_limited_and_said(outcome: Outcome, tmp_path: Path) -> None:
    write_sheet(tmp_path / "sheet.html", outcome, limit=2)
    reader = read(tmp_path / "sheet.html")
    assert len(reader.pictures) == 2
    assert "2 of 3 examples are shown" in " ".join(reader.texts)


def test_words_of_others_are_text(outcome: Outcome, tmp_path: Path) -> None:
    attack = "</li><script>alert('&amp;')</script>\"'é"
    write_sheet(tmp_path / "sheet.html", invent(outcome, Asked(attack, attack, attack, "x" + attack, attack, 0)))
    reader = read(tmp_path / "sheet.html")
    assert sum(attack in text for text in reader.texts) >= 4


def test_large_pictures_are_scaled_down(outcome: Outcome, tmp_path: Path) -> None:
    large = Image.new("RGB", (2000, 1000), "red")
    asked = [Asked("color", "?", "red", "red")]
    write_sheet(tmp_path / "sheet.html", Outcome(outcome.result, asked, lambda example: {"image": [large, large]}, 1))
    assert [picture.size for picture in read(tmp_path / "sheet.html").pictures] == [(448, 224)] * 2
    assert large.size == (2000, 1000)


def test_a_sheet_of_an_encoder(tmp_path: Path) -> None:
    settings = EncoderSettings(pictures=10, fit_pictures=100, kinds=("dark", "same objects"))
    outcome = evaluate("checkpoints/vision_tiny", settings)
    write_sheet(tmp_path / "sheet.html", outcome)
    reader = read(tmp_path / "sheet.html")
    assert len(reader.pictures) == 10 + 2 * 10
    assert "[dark / kNN / cls]" in reader.texts


def test_answers_are_a_line_each(outcome: Outcome, tmp_path: Path) -> None:
    write_answers(tmp_path / "answers.jsonl", outcome.asked)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["question"], line["expected"], line["answer"]) for line in lines] == [
        (asked.question, asked.expected, asked.answer) for asked in outcome.asked
    ]
    assert all(line["right"] == (line["expected"] == line["answer"]) for line in lines)
    assert {line["source"] for line in lines} == {f"scene {seed} of test" for seed in range(3)}
