"""A user's own manifest: every answer is asked for, other rows lend their pictures, and what is wrong is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from omni.data.sources import ManifestError
from omni.evaluation import EvaluationError, ManifestSettings, evaluate
from omni.evaluation.manifest import ManifestQuestions
from omni.vision.pictures import PictureError, read_picture

Make = Callable[..., Path]


def test_rows_become_questions(make_manifest: Make) -> None:
    rows = [
        {"image": "0.png", "question": "what color is it", "answer": " red ", "kind": "color"},
        {"image": "1.png", "caption": "a star"},
    ]
    path = make_manifest(rows)
    one, two = ManifestQuestions(path, prompt="say what you see")
    assert [(q.kind, q.text, q.expected) for q in one.queries] == [("color", "what color is it", "red")]
    assert [(q.kind, q.text, q.expected) for q in two.queries] == [("answer", "say what you see", "a star")]
    assert one.source.endswith("data.jsonl, line 1")
    assert one.items["image"][0].tobytes() == read_picture(path.parent / "0.png").tobytes()
    shown = one.queries[0].show(one.items)
    assert [block["type"] for block in shown[0]["content"]] == ["image", "text"]
    assert shown[0]["content"][0]["image"] is one.items["image"][0]


def test_pictures_are_swapped_for_others_of_a_row_with_as_many(make_manifest: Make) -> None:
    def row(*names: str) -> dict[str, object]:
        return {"images": list(names), "question": "what is it", "answer": "red"}

    rows = [
        row("0.png"),
        row("0.png"),
        row("1.png"),
        row("0.png", "1.png"),
        row("0.png", "2.png"),
        row("2.png", "3.png"),
    ]
    path = make_manifest(rows)
    questions = ManifestQuestions(path)
    found = [[name(path, picture) for picture in questions.swapped(index, "image")] for index in range(6)]
    # the second row shows what the first one shows, and the fifth the first picture of the fourth
    assert found == [["1.png"], ["1.png"], ["0.png"], ["2.png", "3.png"], ["2.png", "3.png"], ["0.png", "1.png"]]
    assert questions.why_not_swapped("image") is None


def name(path: Path, picture: Image.Image) -> str:
    return next(file.name for file in path.parent.glob("*.png") if read_picture(file).tobytes() == picture.tobytes())


def test_a_picture_of_another_name_is_no_other_picture(make_manifest: Make) -> None:
    rows = [{"image": f"{n}.png", "question": "what is it", "answer": "red"} for n in (0, 1)]
    path = make_manifest(rows)
    (path.parent / "1.png").write_bytes((path.parent / "0.png").read_bytes())
    assert "data.jsonl, line 1 has 1 pictures, and no other row" in (
        ManifestQuestions(path).why_not_swapped("image") or ""
    )


def test_a_sight_test_without_partners_says_so(make_manifest: Make, fused: Path) -> None:
    rows = [
        {"image": "0.png", "question": "what color is the object", "answer": "red"},
        {"images": ["0.png", "1.png"], "question": "what color is the object", "answer": "red"},
    ]
    sight = evaluate(fused, ManifestSettings(data=str(make_manifest(rows)), sight=True)).result.sight
    assert sight is not None
    assert list(sight.overall) == ["real", "blank", "noise"]
    assert list(sight.left_out) == ["swapped"]
    assert "line 1 has 1 pictures, and no other row has as many" in sight.left_out["swapped"]


def test_a_sight_test_without_pictures_is_refused(make_manifest: Make, fused: Path) -> None:
    messages = [{"role": "user", "content": "what color is it"}, {"role": "assistant", "content": "red"}]
    settings = ManifestSettings(data=str(make_manifest([{"messages": messages}])), sight=True)
    with pytest.raises(EvaluationError, match="the sight test has none to take away"):
        evaluate(fused, settings)
    assert evaluate(fused, settings.model_copy(update={"sight": False})).result.score("answer").n == 1


def test_what_cannot_be_read_is_told_before_anything_is_asked(make_manifest: Make, fused: Path) -> None:
    path = make_manifest()
    (path.parent / "3.png").write_bytes(b"hello")
    asked: list[str] = []
    with pytest.raises(PictureError, match=r"data.jsonl, line 4: .*3.png' is not a picture"):
        evaluate(fused, ManifestSettings(data=str(path)), lambda label, done, total: asked.append(label))
    (path.parent / "3.png").unlink()
    with pytest.raises(PictureError, match=r"data.jsonl, line 4: .*3.png' does not exist"):
        evaluate(fused, ManifestSettings(data=str(path)), lambda label, done, total: asked.append(label))
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(ManifestError, match="line 5: expected"):
        ManifestQuestions(path)[4]
    assert set(asked) == {"reading files"}


def test_the_command_evaluates_a_manifest_in_a_process_of_its_own(
    make_manifest: Make, fused: Path, python: Callable[..., Any]
) -> None:
    path = make_manifest(pictures=12)
    result, answers = path.parent / "result.json", path.parent / "answers.jsonl"
    arguments = ["evaluate", fused, "--data", path, "--sight", "--output", result, "--answers", answers]
    done = python("-m", "omni", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"Wrote {result}\nWrote {answers}\n"
    assert "Sight test passed" in done.stdout
    written = json.loads(result.read_text())
    assert written["settings"]["data"] == str(path)
    assert written["checkpoint"] == str(fused)
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["question"], line["expected"]) for line in lines] == [
        (row["question"], row["answer"]) for row in rows
    ]
    right = sum(line["answer"] == line["expected"] for line in lines)
    assert written["scores"][0]["n"] == 12
    assert written["scores"][0]["accuracy"] == right / 12
    assert right >= 4  # colours are what it knows best
