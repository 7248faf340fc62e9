"""A result in rows and columns: on the terminal and in a model card, which keeps everything else that it says."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from omni.evaluation import (
    Asked,
    EncoderSettings,
    EvaluationError,
    Hashes,
    ManifestSettings,
    Result,
    render,
    update_card,
)
from omni.evaluation.scores import Evaluation, score, sight_test
from omni.evaluation.tables import END, START, model_card_section, tabulate, title
from omni.scenes.evaluation import SceneSettings


def asked(kind: str, right: int, n: int, expected: str = "red") -> list[Asked]:
    return [Asked(kind, "?", expected, expected if place < right else "-") for place in range(n)]


def result(scores: list[Asked], **changes: Any) -> Result:
    values: dict[str, Any] = {
        "checkpoint": "a_checkpoint",
        "settings": SceneSettings(pictures=10),
        "date": "2030-01-02T03:04:05+00:00",
        "seconds": 1.0,
        "versions": {"omni": "1.2.3", "torch": "4.5", "transformers": "6.7", "python": "3.11"},
        "device": "cpu, float32",
        "hashes": Hashes(**{name: letter * 64 for name, letter in zip(Hashes.model_fields, "abcde", strict=True)}),
        "stopped": 0,
        "scores": score(scores),
    }
    return Result(**{**values, **changes})


REAL, BLANK = (
    [*asked("color", 9, 10), *asked("shape|kind", 8, 10, "a|b")],
    [*asked("color", 1, 10), *asked("shape|kind", 2, 10)],
)


@pytest.fixture
def tested() -> Result:
    passes = [Evaluation.of(REAL), Evaluation.of(BLANK, "blank")]
    sight = sight_test(passes, {"swapped": "there is but one row"})
    return result(REAL, sight=sight, stopped=3)


def test_every_score_is_a_row(tested: Result) -> None:
    assert tabulate(tested) == [
        ["kind", "n", "exact match", "95 % interval", "best constant answer", "blank"],
        ["color", "10", "0.900", "0.596 - 0.982", "1.000 (red)", "0.100"],
        ["shape|kind", "10", "0.800", "0.490 - 0.943", "1.000 (a|b)", "0.200"],
    ]


def test_outputs_of_an_encoder_stand_side_by_side() -> None:
    kinds = [("digit / kNN / cls", 5), ("digit / kNN / grid", 9), ("digit, projection / kNN / pixels", 7)]
    found = result([a for kind, right in kinds for a in asked(kind, right, 10, "3")], settings=EncoderSettings())
    assert tabulate(found) == [
        ["task / method", "n", "cls", "grid", "pixels", "best constant answer"],
        ["digit / kNN", "10", "0.500 (0.24-0.76)", "0.900 (0.60-0.98)", "", "1.000 (3)"],
        ["digit, projection / kNN", "10", "", "", "0.700 (0.40-0.89)", "1.000 (3)"],
    ]


def test_the_title_says_what_was_asked_about() -> None:
    about = (SceneSettings(), ManifestSettings(data="birds.jsonl"), EncoderSettings(pictures=20))
    assert [title(result([], settings=settings)) for settings in about] == [
        "a_checkpoint: 500 pictures of test, seen wordings",
        "a_checkpoint: birds.jsonl",
        "a_checkpoint: 20 held-out pictures of each sort",
    ]


def test_the_terminal_shows_all_of_it(tested: Result) -> None:
    console = Console(width=120, record=True)
    console.print(render(tested))
    text = " ".join(console.export_text().split())
    for part in (
        "a_checkpoint: 10 pictures of test",
        "0.596 - 0.982",
        "3 answers were stopped before they ended",
        "Sight test passed: over all 20 questions 0.850",
    ):
        assert part in text
    assert "The sight test left out swapped pictures: there is but one row." in text


def test_a_card_says_what_was_measured_and_stays_a_table(tested: Result) -> None:
    lines = model_card_section(tested).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 4
    assert {line.replace(r"\|", "").count("|") for line in rows} == {7}
    assert rows[1] == "| --- | ---: | ---: | ---: | ---: | ---: |"
    assert rows[3] == r"| shape\|kind | 10 | 0.800 | 0.490 - 0.943 | 1.000 (a\|b) | 0.200 |"
    text = "\n".join(lines)
    assert "Measured on 2030-01-02 with omni 1.2.3, transformers 6.7, torch 4.5, on cpu, float32; " in text
    assert "sha256 of the weights `aaaaaaaaaaaa`, of the data `bbbbbbbbbbbb`" in text
    assert "Sight test passed: over all 20 questions 0.850 (0.640 - 0.948) with the real pictures, 0.150" in text
    failed = tested.model_copy(update={"sight": tested.sight.model_copy(update={"passed": False})})  # type: ignore[union-attr]
    assert "Sight test FAILED" in model_card_section(failed)


def test_a_kind_cannot_end_the_section() -> None:
    section = model_card_section(result(asked(END + "<b>`*x*", 1, 1)))
    assert END not in section
    assert "<b>" not in section


@pytest.mark.parametrize("ending", ["", "\n", "\n\n"])
def test_a_section_is_added_once_and_then_replaced(ending: str, tested: Result, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n# A model" + ending, encoding="utf-8")
    update_card(card, tested)
    first = card.read_text()
    assert first == f"---\nlicense: mit\n---\n# A model\n\n{START}\n{model_card_section(tested)}{END}\n"
    update_card(card, tested)
    assert card.read_text() == first
    card.write_text(first + "\nMore about it: é.\n", encoding="utf-8")
    update_card(card, result(asked("count", 1, 2)))
    text = card.read_text(encoding="utf-8")
    assert text.startswith("---\nlicense: mit\n---\n# A model\n\n" + START)
    assert text.endswith(END + "\n\nMore about it: é.\n")
    assert "color" not in text
    assert "| count | 2 | 0.500 |" in text


@pytest.mark.parametrize("text", [START, END, f"{END}\n{START}", f"{START}{END}{START}{END}"])
def test_what_is_left_of_a_section_is_refused(text: str, tested: Result, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(text)
    with pytest.raises(EvaluationError, match="once each or not at all; found them"):
        update_card(card, tested)
    assert card.read_text() == text


def test_a_card_that_is_not_there_or_no_text(tested: Result, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="No such file or directory"):
        update_card(tmp_path / "README.md", tested)
    (tmp_path / "README.md").write_bytes(b"\xff")
    with pytest.raises(EvaluationError, match="no text in UTF-8"):
        update_card(tmp_path / "README.md", tested)
