"""What a visitor has: pictures that come and go, and answers that belong to them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni.app.visit import IDLE, LONGEST, MOST, VISITORS, Visit, Visits
from omni.looking.attention import word_attention
from omni.session import QuestionError
from omni.vision.pictures import read_picture

SCENE, SECOND = (Path("examples") / name for name in ("scene.png", "second.png"))
FILES = [(path.name, path.read_bytes()) for path in (SCENE, SECOND)]


def test_there_is_room_for_so_many() -> None:
    visit = Visit()
    assert visit.choose(FILES[:1] * (MOST + 1), None, False) == [
        f"'scene.png' is one too many, expected at most {MOST}; remove others first."
    ]
    assert len(visit.pictures) == MOST
    assert len(visit.choose(FILES, None, True)) == 2
    assert visit.choose(FILES, None, False) == []
    assert [each.name for each in visit.pictures] == ["scene.png", "second.png"]


def test_what_cannot_be_read_takes_no_place() -> None:
    visit = Visit()
    visit.choose(FILES[:1], None, False)
    (sentence,) = visit.choose([("notes.png", b"some notes")], None, False)
    assert sentence.startswith("'notes.png' is not a picture that can be read")
    assert [each.name for each in visit.pictures] == ["scene.png"]


def test_other_pictures_end_an_answer_that_is_being_written(shipped: Any) -> None:
    visit = Visit()
    visit.choose(FILES[:1], None, False)
    answers = visit.ask("describe the picture", *shipped)
    next(answers)
    visit.choose(FILES[1:], None, False)
    assert list(answers) == []
    visit.look(0)
    assert (visit.answer, visit.word) == (None, None)
    *_, last = visit.ask("what is below the heart", *shipped)
    found = word_attention(*shipped, [read_picture(SECOND)], "what is below the heart")
    assert last.answer == found.answer.answer
    visit.look(len(found.words))  # there is no such word
    assert visit.word is None
    visit.look(1)
    (view,) = visit.views()
    assert view.weight == pytest.approx(found.maps[0][1].sum())
    assert not np.array_equal(view.picture, visit.pictures[0].seen)
    visit.remove(0)
    with pytest.raises(QuestionError, match="no picture yet"):
        next(visit.ask("what is below the heart", *shipped))


@pytest.mark.parametrize("unit", ["bytes", "pixels"])
def test_pictures_have_a_bound_together(monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    pictures = [read_picture(file) for _, file in FILES]
    sizes = {"bytes": [len(file) for _, file in FILES], "pixels": [each.width * each.height for each in pictures]}[unit]
    monkeypatch.setattr(f"omni.app.visit.MOST_{unit.upper()}", sum(sizes))
    visit = Visit()
    assert visit.choose(FILES, None, False) == []
    assert visit.choose(FILES[:1], None, True) == [
        f"With 'scene.png' the pictures have {sum(sizes) + sizes[0]:,} {unit}, expected at most {sum(sizes):,}; remove "
        "others, or make it smaller."
    ]
    assert len(visit.pictures) == 2
    assert visit.choose(FILES[:1], None, False) == []  # in the place of the others


def test_a_question_has_a_bound(shipped: Any) -> None:
    visit = Visit()
    visit.choose(FILES[:1], None, False)
    with pytest.raises(QuestionError, match=f"{LONGEST + 1:,} characters"):
        next(visit.ask("a" * (LONGEST + 1), *shipped))


def test_so_many_visits_are_kept_for_so_long() -> None:
    now = 0.0
    visits = Visits(lambda: now)
    tokens = [visits.open() for _ in range(VISITORS)]
    first = visits.find(tokens[0])
    assert first is not None
    first.choose(FILES, None, False)
    newest = visits.open()
    assert visits.find(tokens[1]) is None  # it was not used for the longest time
    assert visits.find(tokens[0]) is first
    now = IDLE / 2
    assert visits.find(newest) is not None
    now = IDLE + 1
    visits.sweep()
    assert first.pictures == []
    assert [token for token in [*tokens, newest] if visits.find(token)] == [newest]


def test_who_leaves_is_forgotten_at_once(shipped: Any) -> None:
    visits = Visits()
    token = visits.open()
    visit = visits.find(token)
    assert visit is not None
    visit.choose(FILES[:1], None, False)
    answers = visit.ask("describe the picture", *shipped)
    next(answers)
    visits.leave(token)
    assert (list(answers), visit.pictures, visits.find(token)) == ([], [], None)
    visits.leave(token)
