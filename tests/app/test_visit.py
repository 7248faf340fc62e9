"""What a visitor has: pictures that come and go, and answers that belong to them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni.app.visit import MOST, Visit
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
