"""What a visitor has: items that come and go, and answers that belong to them."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from omni.app import markup
from omni.app.visit import IDLE, LONGEST, MOST, VISITORS, WIDTH, View, Visit, Visits
from omni.looking.attention import WordAttention, word_attention
from omni.looking.panels import overlay
from omni.modality import ItemError
from omni.questions import QuestionError
from omni.vision.pictures import read_picture

SCENE, SECOND = (Path("examples") / name for name in ("scene.png", "second.png"))
FILES = [(path.name, path.read_bytes()) for path in (SCENE, SECOND)]


def choose(visit: Visit, shipped: Any, *files: tuple[str, bytes], together: bool = False) -> None:
    for name, file in files:
        visit.choose(name, file, "image/png", shipped[1], together)


def test_the_number_of_items_is_limited(shipped: Any) -> None:
    visit = Visit()
    choose(visit, shipped, *FILES[:1] * MOST, together=True)
    with pytest.raises(ItemError, match=f"'second.png' is one too many, expected at most {MOST}; remove others first."):
        choose(visit, shipped, FILES[1], together=True)
    assert len(visit.items) == MOST
    choose(visit, shipped, FILES[0])
    choose(visit, shipped, FILES[1], together=True)
    assert [each.name for each in visit.items] == ["scene.png", "second.png"]


def test_files_that_come_at_once_are_all_kept_and_the_page_shows_a_whole_state(shipped: Any) -> None:
    visit, wrong = Visit(), list[str]()

    def add() -> None:
        choose(visit, shipped, *FILES[:1] * 2, together=True)

    def show() -> None:
        while any(each.is_alive() for each in adding):
            now = visit.as_it_is()
            found = markup.items(now).count("<figure")
            wrong.extend([] if found == len(now.items) else [f"{found} of {len(now.items)}"])

    adding = [threading.Thread(target=add) for _ in range(MOST // 2)]
    showing = threading.Thread(target=show)
    for thread in (*adding, showing):
        thread.start()
    for thread in (*adding, showing):
        thread.join()
    assert len(visit.items) == MOST
    assert wrong == []
    with pytest.raises(ItemError, match="one too many"):
        choose(visit, shipped, FILES[1], together=True)


def test_what_cannot_be_read_takes_no_place(shipped: Any) -> None:
    visit = Visit()
    choose(visit, shipped, FILES[0])
    with pytest.raises(ItemError, match="^'notes.png' is not a picture that can be read"):
        choose(visit, shipped, ("notes.png", b"some notes"))
    assert [each.name for each in visit.items] == ["scene.png"]


def test_other_pictures_end_an_answer_that_is_being_written(shipped: Any) -> None:
    visit = Visit()
    choose(visit, shipped, FILES[0])
    answers = visit.ask("describe the picture", *shipped)
    next(answers)
    choose(visit, shipped, FILES[1])
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
    assert not np.array_equal(view.picture, visit.items[0].seen)
    visit.remove(0)
    with pytest.raises(QuestionError, match="no sound or picture yet"):
        next(visit.ask("what is below the heart", *shipped))


@pytest.mark.parametrize("bound", ["MOST_BYTES", "MOST_OPEN"])
def test_items_have_a_bound_together(shipped: Any, monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    visit = Visit()
    choose(visit, shipped, *FILES, together=True)
    sizes = [len(each.file) if bound == "MOST_BYTES" else each.size for each in visit.items]
    monkeypatch.setattr(f"omni.app.visit.{bound}", sum(sizes))
    choose(visit, shipped, FILES[0])
    choose(visit, shipped, FILES[1], together=True)
    with pytest.raises(ItemError) as error:
        choose(visit, shipped, FILES[0], together=True)
    unit = "bytes" if bound == "MOST_BYTES" else "bytes when they are open"
    assert str(error.value) == (
        f"With 'scene.png' the files have {sum(sizes) + sizes[0]:,} {unit}, expected at most {sum(sizes):,}; remove "
        "others, or make it smaller."
    )
    assert len(visit.items) == 2
    choose(visit, shipped, FILES[0])  # in the place of the others


def test_the_size_of_an_open_item_is_that_of_its_values(hearing: Any, tone: bytes) -> None:
    visit, picture = Visit(), read_picture(SCENE)
    for name, file in (("a.wav", tone), FILES[0]):
        visit.choose(name, file, "", hearing[1], True)
    sound, scene = (each.size for each in visit.items)
    assert 4 * 8000 <= sound < 4 * 8000 + 2000
    assert 3 * picture.width * picture.height <= scene < 3 * picture.width * picture.height + 2000


def test_what_cannot_be_shown_is_named(hearing: Any, tone: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni.app.visit.get_modality", lambda name: SimpleNamespace(show=None))
    visit = Visit()
    visit.choose("a.wav", tone, "", hearing[1], False)
    (view,) = visit.views()
    assert (view.name, view.picture) == ("a.wav", None)
    assert "<figcaption>a.wav</figcaption>" in markup.items(visit)
    assert "<img" not in markup.items(visit)


@pytest.mark.new_chats
def test_attention_in_a_sound_is_a_band_over_time(hearing: Any, tone: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    visit = Visit()
    visit.choose("a.wav", tone, "", hearing[1], False)
    *_, last = visit.ask("", *hearing)
    words = last.answer.split()
    maps = np.zeros((len(words), 13), np.float32)
    maps[0, 3:5] = 0.25  # frames 3 and 4 of 13
    found = WordAttention(answer=last, words=tuple(words), maps=(maps,), cls=np.zeros(1), text=np.zeros(1))
    monkeypatch.setattr("omni.app.visit.session_attention", lambda session, question: found)
    visit.look(0)
    (view,) = visit.views()
    assert view.weight == 0.5
    seen = visit.items[0].seen
    np.testing.assert_array_equal(view.picture, overlay(seen, maps[0]))
    changed = np.asarray(overlay(seen, maps[0]), int) - np.asarray(overlay(seen, maps[1]), int)
    columns = np.flatnonzero(changed.any((0, 2)))
    assert [columns.min(), columns.max()] == pytest.approx([3 * WIDTH / 13, 5 * WIDTH / 13], abs=1.5)


@pytest.mark.new_chats
def test_an_item_without_places_is_shown_as_it_is(hearing: Any, tone: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    visit = Visit()
    visit.choose("a.wav", tone, "", hearing[1], False)
    *_, last = visit.ask("", *hearing)
    words = last.answer.split()
    maps = np.zeros((len(words), 0), np.float32)  # the Thinker gets CLS alone
    found = WordAttention(answer=last, words=tuple(words), maps=(maps,), cls=np.zeros(1), text=np.zeros(1))
    monkeypatch.setattr("omni.app.visit.session_attention", lambda session, question: found)
    visit.look(0)
    assert visit.views() == [View("a.wav", visit.items[0].seen, 0.0)]


def test_a_question_has_a_bound(shipped: Any) -> None:
    visit = Visit()
    choose(visit, shipped, FILES[0])
    with pytest.raises(QuestionError, match=f"{LONGEST + 1:,} characters"):
        next(visit.ask("a" * (LONGEST + 1), *shipped))


def test_the_number_of_answers_is_limited(shipped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni.app.visit.KEPT", 2)
    visit = Visit()
    choose(visit, shipped, FILES[0])
    for question in ("what is below the heart", "what color is the circle", "what is below the heart"):
        list(visit.ask(question, *shipped))
    choose(visit, shipped, FILES[1])
    assert [turn.answer for turn in visit.turns] == ["red", "cyan moon"]
    assert [view.name for view in visit.turns[0].about] == ["scene.png"]


def test_visits_are_limited_in_number_and_time(shipped: Any) -> None:
    now = 0.0
    visits = Visits(lambda: now)
    tokens = [visits.open() for _ in range(VISITORS)]
    first = visits.find(tokens[0])
    assert first is not None
    choose(first, shipped, FILES[0])
    newest = visits.open()
    assert visits.find(tokens[1]) is None  # it was not used for the longest time
    assert visits.find(tokens[0]) is first
    now = IDLE / 2
    assert visits.find(newest) is not None
    now = IDLE + 1
    visits.sweep()
    assert first.items == []
    assert [token for token in [*tokens, newest] if visits.find(token)] == [newest]


def test_a_visitor_who_leaves_is_forgotten_at_once(shipped: Any) -> None:
    visits = Visits()
    token = visits.open()
    visit = visits.find(token)
    assert visit is not None
    choose(visit, shipped, FILES[0])
    answers = visit.ask("describe the picture", *shipped)
    next(answers)
    visits.leave(token)
    assert (list(answers), visit.items, visits.find(token)) == ([], [], None)
    visits.leave(token)
